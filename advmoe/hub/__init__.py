"""Checkpoints that travel: saved in a folder or in a repository of the Hugging Face Hub, each with a model card.

Folders need nothing but this package; the Hub needs the extra `hub`. Loading reads weights (safetensors) and their
description (JSON): it runs no code and unpickles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe.errors import InputError, lacking
from advmoe.files import read_object
from advmoe.hub.checkpoint import LIBRARY, PublishedModel
from advmoe.models import Classifier
from advmoe.models.runs import load_run

if TYPE_CHECKING:
    from advmoe.hub.mixin import HubCheckpoint

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]


def save_pretrained(
    model: str | Path | Classifier, folder: str | Path, *, source: str | None = None, license: str | None = None
) -> Path:
    """Save a run's model, or a model, as the Hub keeps it, and return the folder. No network, no extra.

    Args:
        model: a run directory, or a model; the card tells the settings and results of the run that it is or was loaded
            from, unless it has been changed since.
        folder: new, empty, or saved by this before: its files are replaced. Saved from a run, it is a run directory
            too: `advmoe evaluate FOLDER` takes it.
        source: `FILE.py:FACTORY` of the network, where the run trained one of the user's own; executed, not saved.
        license: of the weights, as the Hub names licences (`apache-2.0`); by default the card says `unknown`.

    Writes `model.safetensors` and `model.json`, `config.json` (the Hub's), `README.md` (the card), and, of a run,
    `config.yaml`, `manifest.json` and `evaluation.json`. Raises `ValueError` for a run that cannot be read or a folder
    that holds something else.
    """
    published, folder = PublishedModel.of(model, source, license), Path(folder)
    if not _can_be_filled(folder):
        raise InputError(f"folder must be new, empty or one that save_pretrained filled, got {str(folder)!r}")
    published.write(folder)
    return folder


def _can_be_filled(folder: Path) -> bool:
    """Whether a folder is new, empty, or one that this filled, or began to: `config.json` is what it writes first."""
    if not folder.is_dir():
        return not folder.exists()
    if all(each.name.endswith(".partial") for each in folder.iterdir()):
        return True
    try:
        return read_object(folder / "config.json").get("library_name") == LIBRARY
    except (OSError, ValueError):
        return False


def from_pretrained(
    name: str | Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Classifier:
    """The model in a folder or in a repository of the Hub, in eval mode on the CPU.

    Args:
        name: a folder that `save_pretrained` or training filled, or a repository as `owner/name`.
        source: `FILE.py:FACTORY` of the network, where it is one of its author's own: a file of yours, executed.
        revision: branch, tag or commit of the repository; by default `main`.
        token: of the Hub, by default the one that `hf auth login` stored; False sends none.
        cache_dir: the folder of downloads, by default the Hub's own cache. local_files_only: use nothing but those.

    Runs no code from what it loads. Raises `ValueError` of one line for a file that is missing or damaged, a repository
    or revision that cannot be had, or a missing extra.
    """
    if isinstance(name, Path) or (name and Path(name).is_dir()):
        if revision is not None:
            raise InputError(f"revision must be left out for a folder, got {revision!r}")
        return load_run(name, source)
    _require_repo_id("name", name)
    mixin = _mixin()
    with _client_errors(f"{name} cannot be had from the Hub"):
        loaded = mixin.from_pretrained(
            name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only, source=source
        )
    return loaded.published.model


def push_to_hub(
    model: str | Path | Classifier,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Push model with advmoe",
    source: str | None = None,
    license: str | None = None,
) -> str:
    """Upload what `save_pretrained` writes, in one commit, and return its URL. Needs the extra `hub`.

    Args:
        model, source, license: as of `save_pretrained`. repo_id: `owner/name`; a new repository if there is none.
        private: of a new repository. token: by default the one that `hf auth login` stored.
        branch: to commit to, by default `main`.

    Raises `ValueError` of one line for a run that cannot be read, a missing extra, or what the Hub refuses.
    """
    _require_repo_id("repo_id", repo_id)
    mixin, published = _mixin(), PublishedModel.of(model, source, license, repo_id)
    with _client_errors(f"{repo_id} cannot be pushed to the Hub"):
        url = mixin(published).push_to_hub(
            repo_id, private=private, token=token, branch=branch, commit_message=commit_message
        )
    return str(url)


def _mixin() -> type[HubCheckpoint]:
    """The class that knows the Hub. Raises `ValueError`, which names the extra, where its client is missing."""
    try:
        from advmoe.hub.mixin import HubCheckpoint
    except ImportError as error:
        raise lacking("the Hub", "hub", error) from error
    return HubCheckpoint


def _require_repo_id(name: str, text: str) -> None:
    owner, slash, rest = text.partition("/")
    if not (owner.strip(".~") and slash and rest and "/" not in rest):
        rule = "a folder that exists, or a repository as owner/name"
        if name == "repo_id":
            rule = "owner/name of a repository (into a folder: advmoe.save_pretrained(RUN, FOLDER))"
        raise InputError(f"{name} must be {rule}, got {text!r}")


@contextmanager
def _client_errors(what: str) -> Iterator[None]:
    """Make one line of what the client or the network raises; damaged files have theirs already."""
    from huggingface_hub import errors

    # `HTTPError` is that of the HTTP library that this version of the client stands on; its uploads wrap theirs.
    http: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except (OSError, RuntimeError, http, errors.EntryNotFoundError, errors.HFValidationError) as error:
        # The client's messages go on for lines, the first of which says what happened.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what}: {type(error).__name__}: {' '.join(lines)[:300]}") from error

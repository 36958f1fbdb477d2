"""What a training that was killed before its first checkpoint leaves: nothing that stands in the way of a new one.

One rule says which directories a training may start in. Imports no torch, as the command line asks too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from advmoe.files import read_object
from advmoe.locks import CLAIM

_EVENTS = "events.out.tfevents."
START_ANEW = "it was killed before its first checkpoint, so start it anew there by the command that began it"
"""What to do with a directory that is `begun`."""


def startable(folder: Path) -> bool:
    """Whether a training may start in `folder`: it is new or empty, or holds leftovers of ours alone."""
    if not folder.exists():
        return not folder.is_symlink()
    return folder.is_dir() and all(_is_left(each) for each in folder.iterdir())


def clear(folder: Path) -> None:
    """Delete the leftovers in `folder`, which must be `startable`, but for the claim of whoever holds it."""
    for each in folder.iterdir():
        if each.name == CLAIM:
            continue
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()


def begun(folder: Path) -> bool:
    """Whether a training of ours began in `folder` and left nothing to continue."""
    return folder.is_dir() and startable(folder) and any(folder.iterdir())


def _is_left(path: Path) -> bool:
    """Whether a training leaves this before its first checkpoint. Links are nobody's leftovers."""
    if path.is_symlink():
        return False
    name = path.name
    if path.is_dir():
        events = name == "tensorboard" and all(e.name.startswith(_EVENTS) and e.is_file() for e in path.iterdir())
        return events or _is_partial(name)
    if not path.is_file():
        return False
    if name == "manifest.json":
        return not _is_finished(path)
    if name == "metrics.jsonl":  # the line of an epoch comes before its checkpoint
        return path.read_bytes().count(b"\n") <= 1
    # The model is the one that the run started from, where it diverged before there was another.
    return name in (CLAIM, "config.yaml", "model.json", "model.safetensors") or _is_partial(name)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def _is_finished(manifest: Path) -> bool:
    try:
        return read_object(manifest).get("finished") is not None
    except ValueError:  # it is written whole: this is not ours
        return True

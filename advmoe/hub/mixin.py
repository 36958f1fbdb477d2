"""The Hub's own interface to a checkpoint. Imports `huggingface_hub`: the extra `hub`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from advmoe.errors import InputError
from advmoe.hub.card import Record
from advmoe.hub.checkpoint import PublishedModel
from advmoe.models import load_files
from advmoe.models.sources import load_module
from advmoe.rundir import MODEL, WEIGHTS

LOADED = (MODEL, WEIGHTS)
"""The files of a repository that loading downloads. In the client's cache they are links of the client's own."""


class HubCheckpoint(ModelHubMixin, library_name="advmoe"):
    """A checkpoint with `save_pretrained`, `from_pretrained` and `push_to_hub` as the Hub's client defines them."""

    # Not None: the mixin then makes no configuration of the constructor's arguments, which are no JSON.
    _hub_mixin_config: Any = {}  # noqa: RUF012

    def __init__(self, published: PublishedModel) -> None:
        self.published = published

    def _save_pretrained(self, save_directory: Path) -> None:
        self.published.write(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, source: str | None = None, **kwargs: Any) -> HubCheckpoint:
        """Load both files from one commit, even if another is pushed meanwhile."""
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        options = {name: kwargs[name] for name in names}
        folder = Path(snapshot_download(model_id, allow_patterns=list(LOADED), **options))
        try:
            module = None if source is None else load_module(source)
            return cls(PublishedModel(load_files(folder / MODEL, folder / WEIGHTS, module), Record()))
        except ValueError as error:
            raise InputError(f"{model_id}: {error}") from error

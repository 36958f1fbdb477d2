"""The files of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advmoe import __version__
from advmoe.errors import InputError
from advmoe.files import write_text
from advmoe.hub.card import RECORDED, Record, model_card, portable
from advmoe.models import Classifier, save_model
from advmoe.models.predictions import class_names
from advmoe.models.runs import load_run
from advmoe.models.state import digest
from advmoe.rundir import MODEL


def _recorded(model: Classifier) -> Record:
    """The record of the run that a model was loaded from; an empty one where it has been changed since."""
    origin = model.origin
    if origin is None or origin.run is None or not origin.run.is_dir() or digest(model) != origin.digest:
        return Record()
    return Record.read(origin.run, origin.digest)


LIBRARY = "advmoe"
"""What `config.json` calls this library."""


@dataclass(frozen=True)
class PublishedModel:
    """A model with the record of its run, as a folder or a repository holds them."""

    model: Classifier
    record: Record
    license: str | None = None
    repo_id: str | None = None
    """The repository that it goes to; None for a folder."""

    @staticmethod
    def of(
        model: str | Path | Classifier,
        source: str | None = None,
        license: str | None = None,
        repo_id: str | None = None,
    ) -> PublishedModel:
        """The model of a run directory (`source`: see `load_run`), or a model, which has a record unless it has been
        changed since it was loaded from its run. Raises `ValueError` for anything else.
        """
        if isinstance(model, str | Path) and model != "" and Path(model).is_dir():
            model = load_run(model, source)
        if isinstance(model, Classifier):
            others = {each.dtype for each in model.state_dict().values() if each.is_floating_point()} - {torch.float32}
            if others:
                raise InputError(f"model must be in float32 to be saved (model.float()), got {others.pop()}")
            class_names(model.spec)
            return PublishedModel(model, _recorded(model), license, repo_id)
        got = repr(str(model)) if isinstance(model, str | Path) else f"an object of type {type(model).__name__}"
        raise InputError(f"model must be a run directory or a model of advmoe's, got {got}")

    def write(self, folder: Path) -> None:
        """Fill `folder`; files of an earlier checkpoint there are replaced, or removed where this one has none."""
        name = self.repo_id or folder.resolve().name
        card = model_card(self.spec(), self.record, name=name, repo_id=self.repo_id, license=self.license)
        folder.mkdir(parents=True, exist_ok=True)
        # First, as it tells that the folder may be filled again, should this be cut short.
        write_text(folder / "config.json", json.dumps(self.hub_config(), indent=2) + "\n")
        save_model(self.model, folder)
        write_text(folder / MODEL, json.dumps(self.spec(), indent=2) + "\n")
        write_text(folder / "README.md", card)
        for file in RECORDED:
            if file in self.record.texts:
                write_text(folder / file, self.record.texts[file])
            else:
                (folder / file).unlink(missing_ok=True)

    def hub_config(self) -> dict[str, Any]:
        """`config.json`: the Hub counts downloads by it and shows it; models are rebuilt from `model.json`."""
        names = class_names(self.model.spec)
        labels = {
            "id2label": {str(k): name for k, name in enumerate(names)},
            "label2id": {name: k for k, name in enumerate(names)},
        }
        return {"library_name": LIBRARY, "advmoe_version": __version__, **labels, "model": self.spec()}

    def spec(self) -> dict[str, Any]:
        """What describes the model, without the folders of this machine."""
        spec: dict[str, Any] = dict(self.model.spec)
        return spec if spec.get("source") is None else spec | {"source": portable(spec["source"])}

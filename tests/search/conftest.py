"""A search as small as it can be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advmoe.config import merged
from advmoe.search.settings import SearchSettings
from advmoe.search.space import space
from advmoe.search.storage import open_study, ready
from advmoe.search.trials import TrialTask

pytest.importorskip("optuna")

BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "resnet18", "kind": "dense", "width": 4},
    "data": {"name": "digits", "image_size": 8, "train_examples": 160, "val_fraction": 0.25, "augment": False},
    "threat": {"eps": 0.1},
    "training": {"method": "at", "epochs": 2, "batch_size": 40, "attack_steps": 1, "val_attack_steps": 1},
    "attack": {"steps": 2},
}
ALLOW = ("gradients",)
"""Networks that have hardly been trained may have gradients of 0."""


@pytest.fixture
def make_settings() -> Callable[..., SearchSettings]:
    """Makes a search for the learning rate of a tiny network, with other groups of fields or options."""

    def make(groups: dict[str, dict[str, Any]] | None = None, **options: Any) -> SearchSettings:
        varied = options.pop("varied", {"training.lr": {"low": 0.01, "high": 0.2, "log": True}})
        return SearchSettings(space=space(varied), base=merged(BASE, groups or {}), **{"allow": ALLOW, **options})

    return make


@pytest.fixture
def make_trial(tmp_path: Path) -> Callable[..., TrialTask]:
    """Makes a trial of a search whose journal holds so many."""

    def make(settings: SearchSettings, number: int = 0) -> TrialTask:
        ready(open_study(tmp_path, settings), number + 1)
        return TrialTask(number, tmp_path, settings)

    return make

"""Runs as small as they can be, and what the tests of studies make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advmoe.config import merged
from advmoe.studies.plan import Planner
from advmoe.studies.spec import Run

TINY: dict[str, dict[str, Any]] = {
    "model": {"name": "resnet18", "kind": "dense", "width": 4},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.1, "augment": False},
    "threat": {"eps": 0.1},
    "training": {
        "method": "standard", "epochs": 1, "batch_size": 640, "attack_steps": 1, "step_size": 0.1,
        "val_attack_steps": 1,
    },
    "attack": {"steps": 2, "step_size": 0.05, "pathways": 1, "queries": 0},
}  # fmt: skip


@pytest.fixture
def tiny_run() -> Callable[..., Run]:
    """Makes a run on 8x8 digits of about a second: a plain ResNet-18 of width 4, by default trained without attacks."""

    def make(name: str, *, start: Run | None = None, **groups: dict[str, Any]) -> Run:
        return Run(name, merged(TINY, groups), {"routed": False}, start)

    return make


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """Plans runs of seed 0 in a folder of the test's own."""
    return Planner(tmp_path / "runs", [0])

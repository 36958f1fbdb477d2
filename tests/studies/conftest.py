"""Runs as small as they can be, and made-up results where none have to be trained."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from advmoe.config import merged
from advmoe.studies.plan import PlannedMeasure, PlannedRun, Planner
from advmoe.studies.results import RowResults, RunResults
from advmoe.studies.rows import TrainingRun

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
def tiny_run() -> Callable[..., TrainingRun]:
    """Makes a run on 8x8 digits of about a second: a plain ResNet-18 of width 4, by default trained without attacks."""

    def make(name: str, *, start: TrainingRun | None = None, **groups: dict[str, Any]) -> TrainingRun:
        return TrainingRun(name, merged(TINY, groups), {"routed": False}, start)

    return make


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """Plans runs of seed 0 in a folder of the test's own."""
    return Planner(tmp_path / "runs", [0])


@pytest.fixture(scope="session")
def write_weights() -> Callable[[Path], None]:
    """Writes a model's two files, which can be read."""

    def write(folder: Path) -> None:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "model.json").write_text("{}")

    return write


@pytest.fixture(scope="session")
def record(write_weights: Callable[[Path], None]) -> Callable[..., None]:
    """Writes what a finished run, or a measurement of it, leaves behind: content as JSON, arrays by file."""

    def write(task: PlannedRun | PlannedMeasure, content: Any, **arrays: Mapping[str, Any]) -> None:
        task.path.mkdir(parents=True, exist_ok=True)
        if isinstance(task, PlannedRun):
            (task.path / "manifest.json").write_text(json.dumps({"finished": "now", "wall_seconds": 10.0}))
            write_weights(task.path)
            (task.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in content))
            return
        task.result.write_text(json.dumps(content))
        for file, values in arrays.items():
            np.savez(task.path / f"{file.replace('_', '-')}.npz", **{name: np.array(v) for name, v in values.items()})
        (task.path / "done.json").write_text(json.dumps({"seconds": 2.0}))

    return write


Measured = tuple[str, dict[str, Any], dict[str, Mapping[str, Any]]]
"""A measurement: its kind, content, and arrays by file."""


@pytest.fixture(scope="session")
def evaluated() -> Callable[..., Measured]:
    """Makes an evaluation from strings of `1` (right) and `0` for the images: without an attack, and by attack."""

    def make(clean: str, attacks: Mapping[str, str], *, first: int = 0, **content: Any) -> Measured:
        right = {name: [mark == "1" for mark in marks] for name, marks in {"": clean, **attacks}.items()}
        robust = {name: [a and b for a, b in zip(marks, right[""], strict=True)] for name, marks in right.items()}
        worst = [all(each) for each in zip(*robust.values(), strict=True)]
        shares = {name: sum(marks) / len(marks) for name, marks in robust.items()}
        clean_share = shares.pop("")
        evaluation = {
            "clean_accuracy": clean_share, "robust_accuracy": shares, "worst_case": sum(worst) / len(worst),
            "masking_gap": 0.0, **content,
        }  # fmt: skip
        arrays = {"index": list(range(first, first + len(clean))), "clean_correct": right[""]}
        arrays |= {f"robust/{name}": robust[name] for name in attacks}
        return "evaluate", evaluation, {"evaluation_examples": arrays}

    return make


@pytest.fixture
def row(tmp_path: Path, record: Callable[..., None]) -> Callable[..., RowResults]:
    """Makes a row of results, as read from files: its labels and, by seed, measurements by name and `epochs`."""
    numbers = itertools.count()

    def make(labels: Mapping[str, Any], by_seed: Mapping[int, Mapping[str, Any]]) -> RowResults:
        results = {}
        for seed, measurements in by_seed.items():
            key = f"run-{next(numbers)}"
            run = PlannedRun(key, key, seed, {}, tmp_path / key, None)
            record(run, measurements.get("epochs", []))
            measures = {}
            for name, measurement in measurements.items():
                if name != "epochs":
                    kind, content, arrays = measurement
                    measures[name] = PlannedMeasure(run, kind, {}, None, f"{kind}-{name}")
                    record(measures[name], content, **arrays)
            results[seed] = RunResults(run, measures)
        return RowResults(", ".join(map(str, labels.values())), labels, results)

    return make

"""One task of a study, done in a worker process: a run is trained or continued, or something measured on it.

A task whose result is there already is not done again; of two processes that want the same one, the second waits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from advmoe.config import Config
from advmoe.errors import InputError, OtherSettings
from advmoe.files import write_arrays, write_text
from advmoe.locks import exclusive
from advmoe.pool import Preempted
from advmoe.rundir import CONFIG, DIGEST, DONE, JOURNAL, MANIFEST, digest_at, write_result
from advmoe.signals import Ended, described
from advmoe.studies.plan import PlannedMeasure, PlannedRun, StudyTask, put_away_source


def do(task: StudyTask, *, threads: int, accelerator: str) -> None:
    """Do `task` to its end. Whatever goes wrong is raised."""
    # A measurement's lock is its own: several of one run may be made at the same time.
    with exclusive(lock_of(task)):
        if task.state() == "finished":
            return
        _require_weights(task)
        if isinstance(task, PlannedMeasure):
            _measure(task, threads=threads, accelerator=accelerator)
        else:
            _train(task, threads=threads, accelerator=accelerator)


def _require_weights(task: StudyTask) -> None:
    """Raise `ValueError` where a task needs a run whose weights were dropped."""
    if (run := put_away_source(task)) is not None:
        rule = "must hold its weights, which --put-away dropped: remove the folder, and it is trained again"
        raise InputError(f"{run.path} {rule}, for {task.id}")


class Placed(Protocol):
    """A task whose result has a place of its own."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def path(self) -> Path:
        """The folder of its results."""


def lock_of(task: Placed) -> Path:
    """The file that is locked by who does a task."""
    run = task.run if isinstance(task, PlannedMeasure) else task
    return run.path.with_name(f".{task.id.replace('/', '-')}.lock")


def _train(run: PlannedRun, *, threads: int, accelerator: str) -> None:
    from advmoe.training.preemption import Stopped

    try:
        _trained(run, threads=threads, accelerator=accelerator)
    except Stopped as stop:
        raise Preempted(str(stop)) from stop


def _trained(run: PlannedRun, *, threads: int, accelerator: str) -> None:
    from advmoe.training import run as runs

    config = Config.from_dict(run.config)
    if (run.path / MANIFEST).is_file():
        config.dump(run.path / CONFIG)  # the same run, though its images may lie elsewhere by now
        runs.resume(run.path, accelerator=accelerator, threads=threads)
        return
    runs.train(config, run_dir=run.path, name=run.name, accelerator=accelerator, threads=threads)


def _measure(task: PlannedMeasure, *, threads: int, accelerator: str) -> None:
    started = time.perf_counter()
    task.path.mkdir(parents=True, exist_ok=True)
    _MEASURES[task.kind](task, threads, accelerator)
    settings = {"kind": task.kind, "options": task.options, "against": task.against and task.against.key}
    seconds = round(time.perf_counter() - started, 3)
    weights = {DIGEST: digest_at(task.run.path)}
    done = {**settings, **weights, **_here(accelerator), "threads": threads, "seconds": seconds}
    write_text(task.path / DONE, json.dumps(done, indent=2) + "\n")


def _here(accelerator: str) -> dict[str, Any]:
    """What the numbers of this process depend on besides its settings."""
    import torch

    from advmoe.training.manifest import describe

    device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    machine = describe(name="", seed=0, device=device, devices=1, command=None)
    return {name: machine[name] for name in ("cpu", "device", "versions", "git_commit")}


def _overrides(task: PlannedMeasure) -> dict[str, dict[str, Any]]:
    """The measurement's overrides, with the folder where the images lie now."""
    data = {name: task.run.config["data"][name] for name in ("root", "workers")}
    overrides: Mapping[str, Any] = task.options.get("overrides", {})
    return {**overrides, "data": {**data, **overrides.get("data", {})}}


def _arguments(task: PlannedMeasure, threads: int, accelerator: str) -> dict[str, Any]:
    # One seed for all: methods and seeds are compared on the same images.
    options = {"seed": 0, **task.options, "overrides": _overrides(task)}
    return {**options, "out": task.path, "threads": threads, "accelerator": accelerator}


def _evaluate(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    from advmoe.evaluation.runs import evaluate_run

    arguments = _arguments(task, threads, accelerator) | {"workers": 1}
    before = set((task.path / JOURNAL).glob("*.*.json"))
    try:
        try:
            evaluate_run(task.run.path, **arguments, resume=True)
        except OtherSettings:
            evaluate_run(task.run.path, **arguments)  # what was interrupted had another version of PyTorch, say
    except Ended as stop:
        if set((task.path / JOURNAL).glob("*.*.json")) - before:
            raise Preempted(f"{described(stop)[0]} within an evaluation") from stop
        raise


def _sweep(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    from advmoe.evaluation.runs import sweep_run

    sweep_run(task.run.path, **_arguments(task, threads, accelerator))


def _dissect(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    from advmoe.evaluation.runs import dissect_run

    _, dissections = dissect_run(task.run.path, **_arguments(task, threads, accelerator))
    arrays = {name: each.categories.numpy() for name, each in dissections.items()}
    right = next(iter(dissections.values())).clean_correct.numpy()
    write_arrays(task.path / "dissection-examples.npz", {**arrays, "clean_correct": right})


def _pathways(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    from advmoe.evaluation.pathways import pathways_run

    against = None if task.against is None else str(task.against.path)
    pathways_run(task.run.path, against=against, **_arguments(task, threads, accelerator))


def _cost(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    import torch

    from advmoe.evaluation.cost_report import cost_report

    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    report = cost_report(
        task.run.path, device=device, threads=threads, overrides={"data": _overrides(task)["data"]}, **task.options
    )
    write_result(task.result, report)


def _pace(task: PlannedMeasure, threads: int, accelerator: str) -> None:
    from advmoe.training.pace import pace

    assert task.against is not None
    configs = {"ours": Config.from_dict(task.run.config), "against": Config.from_dict(task.against.config)}
    result = pace(configs, accelerator=accelerator, threads=threads, **task.options)
    write_result(task.result, result)


_MEASURES = {
    "evaluate": _evaluate, "sweep": _sweep, "dissect": _dissect, "pathways": _pathways, "cost": _cost, "pace": _pace,
}  # fmt: skip

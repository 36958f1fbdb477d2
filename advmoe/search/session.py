"""A search, run: its trials are done by an engine, and what they come to is written. It may be killed at any time, and
called again goes on from there.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe.config import require
from advmoe.engines.remote import RETRIES
from advmoe.errors import InputError
from advmoe.files import require_writable
from advmoe.locks import hold
from advmoe.rundir import require_plain
from advmoe.search.findings import write_findings
from advmoe.search.settings import BEST, SearchSettings
from advmoe.search.storage import open_study, ready, require_optuna
from advmoe.search.trials import TrialTask, doing
from advmoe.studies.task_pool import Step, TaskWorkers, WorkOptions, run_tasks

Told = Callable[[Step, TrialTask, "Standing"], None]
"""Called as trials start and end: see `task_pool.Step`."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(WorkOptions):
    """How a search is run. Raises `InputError`, which names the option, for a value that cannot be."""

    out: Path
    """Its folder."""
    trials: int = 20
    """How many there are in all; a later call may ask for more."""
    command: Sequence[str] | None = None
    """What the user typed, for the record."""

    def __post_init__(self) -> None:
        for name in ("trials", "jobs", "threads"):
            require(getattr(self, name) >= 1, f"--{name}", ">= 1", getattr(self, name))
        require(self.out.is_dir() or not self.out.exists(), "--out", "a folder, or new", str(self.out))

    def workers(self) -> TaskWorkers:
        """The processes that do the trials."""
        return self.workers_in(self.out / "logs", prepare=doing, retries=RETRIES)

    def tasks(self, settings: SearchSettings) -> dict[str, TrialTask]:
        """The trials by id."""
        tasks = (TrialTask(number, self.out, settings) for number in range(self.trials))
        return {task.id: task for task in tasks}


@dataclass(frozen=True)
class Standing:
    """How far a search is."""

    ends: Mapping[str, Mapping[str, Any]]
    """How each trial ended, by id: see `TrialTask.ended`."""

    @staticmethod
    def of(tasks: Mapping[str, TrialTask]) -> Standing:
        """As the trials' files tell."""
        ends = {name: task.ended() for name, task in tasks.items()}
        return Standing({name: end for name, end in ends.items() if end is not None})

    @property
    def best(self) -> str | None:
        """The id of the best trial, the first of equals; None where none is finished."""
        values = {name: end["value"] for name, end in self.ends.items() if end["value"] is not None}
        return max(values, key=values.__getitem__) if values else None


def run_search(
    settings: SearchSettings, options: SearchOptions, told: Told = lambda step, task, standing: None
) -> tuple[Standing, dict[str, str]]:
    """Do the trials that are not done yet. After each the best configuration so far lies in `best.yaml`, and what there
    is to show in `study.json`.

    Returns how each trial ended, and the errors of those that failed in this call, by id (see
    `engines.MachineFailed`). Raises `InputError` for what cannot be run; nothing is written then.
    """
    require_optuna()
    _require_images(settings)
    require_plain(options.out)
    require_writable("--out", options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    alone = hold(options.out.resolve(), folder=True)
    if alone is None:
        raise InputError(f"--out must be free of other searches, got {str(options.out)!r}: one is under way there")
    try:
        settings.keep(options.out)
        ready(open_study(options.out, settings), options.trials)
        tasks = options.tasks(settings)

        def counted(step: Step, task: TrialTask) -> None:
            standing = Standing.of(tasks)
            if step not in ("starts", "queued"):
                _write(settings, options, tasks, standing)
            told(step, task, standing)

        errors = run_tasks(tasks, {}, options.workers(), counted)
        standing = Standing.of(tasks)
        _write(settings, options, tasks, standing)
        return standing, errors
    finally:
        alone.close()


def _require_images(settings: SearchSettings) -> None:
    """Raise `InputError` for images that cannot be read, or none to compare trials on: before anything is trained."""
    from advmoe.training.run import load_data

    images = len(load_data(settings.config).val)
    require(images > 0, "data.val_fraction", "so large that it leaves an image", settings.config.data.val_fraction)


def _write(
    settings: SearchSettings, options: SearchOptions, tasks: Mapping[str, TrialTask], standing: Standing
) -> None:
    if standing.best is not None:
        settings.configured(standing.ends[standing.best]["parameters"]).dump(options.out / BEST)
    command = shlex.join(options.command or ()) or None
    write_findings(options.out, settings, tasks, standing.ends, standing.best, command)

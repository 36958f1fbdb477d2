"""The tasks of a study or a search, done by several processes, here or on a cluster (`engines`), each after those that
it needs.

A worker imports PyTorch once and takes task after task. Each has one thread unless asked otherwise, as the number of
threads changes rounding: so results do not depend on how many processes share the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import mean
from typing import Any, Protocol, TypeVar

from advmoe.engines import Engine, EngineOptions, Ledger, MachineFailed, Skipped, Task, run
from advmoe.pool import Place, Prepare
from advmoe.progress import bar
from advmoe.studies.plan import PlannedMeasure, StudyTask, kind_of

__all__ = ["MachineFailed", "OnProgress", "Skipped", "Step", "TaskWorkers", "run_tasks"]


class Resumable(Task, Protocol):
    """A task that says how far it is."""

    def state(self) -> str:
        """`finished`, or anything else."""


T = TypeVar("T", bound=Resumable)


class Step(str):
    """What happens to a task, in a word (`starts`, `queued`, `done`) or by its error's text; and where the study is
    then.
    """

    left: int = 0
    """Tasks that are not ended."""
    seconds: float | None = None
    """What the task took; None where it starts, or was never begun."""
    seconds_left: float | None = None
    """About how long the tasks left will take; None before the first has ended well."""


OnProgress = Callable[[Step, T], None]
"""Called with a task and what happens to it."""


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """Which processes do tasks, as the user chooses."""

    jobs: int = 1
    """How many there are at most, each with a task."""
    threads: int = 1
    """CPU threads of each."""
    accelerator: str = "auto"
    """`auto`, `cpu` or `cuda`; GPUs are shared out in turn."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Who starts them, and where."""

    def workers_in(self, logs: Path, **more: Any) -> TaskWorkers:
        """The processes, whose output goes to the folder `logs`; `more` are fields of `TaskWorkers`."""
        chosen = {each.name: getattr(self, each.name) for each in fields(WorkOptions)}
        return TaskWorkers(**chosen, logs=logs, **more)


@dataclass(frozen=True, kw_only=True)
class TaskWorkers(WorkOptions):
    """The processes that do the tasks."""

    logs: Path
    """Folder of their output, and of what is known of the tasks."""
    prepare: Prepare | None = None
    """What has a process do tasks, given the threads, the accelerator and the ledger, if it is to say so there; None:
    what does those of studies.
    """
    retries: int = 0
    """How often a task is tried again whose process died, at least."""

    @property
    def ledger(self) -> Ledger:
        """What is known of the tasks."""
        return Ledger(self.logs)

    def places(self, number: int) -> list[Place]:
        """Where the first `number` of them run, as far as there are so many."""
        if not self.engine.local:
            return [Place(self.threads)] * min(number, self.jobs)
        cards = _cards(self.accelerator)
        return [
            Place(self.threads, only_card=cards[at % len(cards)] if cards else None, log=self.logs / f"worker-{at}.log")
            for at in range(min(number, self.jobs))
        ]

    def open(self, number: int, *, alone: bool) -> Engine:
        """The engine, which does up to `number` tasks at once; `alone`: with nothing else on the same machine."""
        arguments = (self.threads, self.accelerator, self.ledger if self.engine.local else None)
        prepare = _doing if self.prepare is None else self.prepare
        engine = self.engine.open(prepare, arguments, places=self.places(number), ledger=self.ledger, alone=alone)
        engine.retries = max(engine.retries, self.retries)
        return engine


def run_tasks(
    tasks: Mapping[str, T], errors: Mapping[str, str], workers: TaskWorkers, told: OnProgress[T]
) -> dict[str, str]:
    """Do those of `tasks` that are not finished; those that must run alone come last, one by one.

    Args:
        tasks: by id.
        errors: of tasks that failed before, by id: not tried again.
        told: called as tasks start and end.

    Returns `errors` with those of the tasks that failed now, or were skipped; see `MachineFailed`.
    """
    errors = dict(errors)
    todo = {name: task for name, task in tasks.items() if name not in errors and task.state() != "finished"}
    alone = {name: task for name, task in todo.items() if isinstance(task, PlannedMeasure) and task.alone}
    together = {name: task for name, task in todo.items() if name not in alone}
    clock = _Clock(todo, workers.jobs)
    with bar("study", len(todo), unit="task") as progress:

        def counted(word: str, task: T, seconds: float | None) -> None:
            step = clock.step(word, task, seconds)
            if word not in BEGUN:
                progress.update()
                if word != "done":
                    workers.ledger.failed(task.id, word)
            told(step, task)

        for part, number in ((together, len(together)), (alone, 1)):
            if part:
                workers.logs.mkdir(parents=True, exist_ok=True)
                with closing(workers.open(number, alone=part is alone)) as engine:
                    run(part, errors, engine, counted)
    return errors


BEGUN = ("starts", "queued")
"""What happens to a task that has not ended."""


class _Clock:
    """How long tasks take, by kind, and so about how long those left will take `jobs` processes."""

    def __init__(self, tasks: Mapping[str, Resumable], jobs: int) -> None:
        self.left, self.jobs = dict(tasks), jobs
        self.begun: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}

    def step(self, word: str, task: Resumable, seconds: float | None = None) -> Step:
        """What is told of a task's start or end; `seconds`: what it took, where that is known."""
        step, now = Step(word), time.perf_counter()
        if word == "starts":
            self.begun[task.id] = now
        elif word not in BEGUN:
            self.left.pop(task.id, None)
            step.seconds = seconds
            if seconds is None and task.id in self.begun:
                step.seconds = now - self.begun.pop(task.id)
            if word == "done" and step.seconds is not None:
                self.took.setdefault(kind_of(task), []).append(step.seconds)
        step.left, step.seconds_left = len(self.left), self._estimate(now)
        return step

    def _estimate(self, now: float) -> float | None:
        if not self.took:
            return None
        means = {kind: mean(seconds) for kind, seconds in self.took.items()}
        usual, together, alone, side_by_side = mean(means.values()), 0.0, 0.0, 0
        for task in self.left.values():
            passed = now - self.begun.get(task.id, now)
            rest = max(0.0, means.get(kind_of(task), usual) - passed)
            if isinstance(task, PlannedMeasure) and task.alone:
                alone += rest
            else:
                together, side_by_side = together + rest, side_by_side + 1
        return together / max(1, min(self.jobs, side_by_side)) + alone


def _cards(accelerator: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees; none where the CPU computes."""
    if accelerator == "cpu":
        return []
    import torch

    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


@contextmanager
def _doing(
    place: Place, threads: int, accelerator: str, ledger: Ledger | None
) -> Iterator[Callable[[StudyTask], None]]:
    """The function that does a task, in a worker; with a `ledger` it says so there."""
    from advmoe.studies.tasks import do

    def work(task: StudyTask) -> None:
        with nullcontext() if ledger is None else ledger.doing(task.id, log=place.log):
            do(task, threads=threads, accelerator=accelerator)

    yield work

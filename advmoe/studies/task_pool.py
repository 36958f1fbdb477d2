"""A study's tasks, done by several processes, each after those that it needs.

Where a task fails, that is reported, and those that need it are skipped.

A worker imports PyTorch once and takes task after task. Each has one thread unless asked otherwise, as the number of
threads changes rounding: so results do not depend on how many processes share the work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import mean

from advmoe.errors import BugElsewhere, of_machine
from advmoe.pool import Answer, Died, Place, Pool
from advmoe.progress import bar
from advmoe.studies.plan import PlannedMeasure, StudyTask, kind_of
from advmoe.text import cut, one_line


class Step(str):
    """What happens to a task, in a word (`starts`, `done`) or by its error's text; and where the study is then."""

    left: int = 0
    """Tasks that are not ended."""
    seconds: float | None = None
    """What the task took; None where it starts, or was never begun."""
    seconds_left: float | None = None
    """About how long the tasks left will take; None before the first has ended well."""


OnProgress = Callable[[Step, StudyTask], None]
"""Called with a task and what happens to it."""


@dataclass(frozen=True, kw_only=True)
class TaskWorkers:
    """The processes that do a study's tasks."""

    jobs: int
    """How many there are at most."""
    threads: int
    """CPU threads of each."""
    accelerator: str
    """`auto`, `cpu` or `cuda`; GPUs are shared out in turn."""
    logs: Path
    """Folder of their output."""

    def places(self, number: int) -> list[Place]:
        """Where the first `number` of them run, as far as there are so many."""
        cards = _cards(self.accelerator)
        return [
            Place(self.threads, only_card=cards[at % len(cards)] if cards else None, log=self.logs / f"worker-{at}.log")
            for at in range(min(number, self.jobs))
        ]


class MachineFailed(str):
    """The error of a task that failed by the machine's fault: tried again, it may succeed."""


class Skipped(str):
    """The error of a task that was not tried, as one that it needs failed; `cause` is that one's error."""

    def __new__(cls, error: str) -> Skipped:
        """Of a task that needs one that ended with `error`."""
        cause = error.cause if isinstance(error, Skipped) else error
        skipped = super().__new__(cls, f"skipped, as what it needs failed: {cause}")
        skipped.cause = cause
        return skipped

    cause: str


def run_tasks(
    tasks: Mapping[str, StudyTask], errors: Mapping[str, str], workers: TaskWorkers, told: OnProgress
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

        def counted(word: str, task: StudyTask) -> None:
            told(clock.step(word, task), task)
            if word != "starts":
                progress.update()

        for part, number in ((together, len(together)), (alone, 1)):
            if part:
                workers.logs.mkdir(parents=True, exist_ok=True)
                with closing(Pool(_doing, (workers.threads, workers.accelerator), workers.places(number))) as pool:
                    _run(part, errors, pool, counted)
    return errors


class _Clock:
    """How long tasks take, by kind, and so about how long those left will take `jobs` processes."""

    def __init__(self, tasks: Mapping[str, StudyTask], jobs: int) -> None:
        self.left, self.jobs = dict(tasks), jobs
        self.begun: dict[str, float] = {}
        self.took: dict[str, list[float]] = {}

    def step(self, word: str, task: StudyTask) -> Step:
        """What is told of a task's start or end."""
        step, now = Step(word), time.perf_counter()
        if word == "starts":
            self.begun[task.id] = now
        else:
            self.left.pop(task.id, None)
            if task.id in self.begun:
                step.seconds = now - self.begun.pop(task.id)
            if word == "done" and step.seconds is not None:
                self.took.setdefault(kind_of(task), []).append(step.seconds)
        step.left, step.seconds_left = len(self.left), self._estimate(now)
        return step

    def _estimate(self, now: float) -> float | None:
        if not self.took:
            return None
        means = {kind: mean(seconds) for kind, seconds in self.took.items()}
        usual, together, alone = mean(means.values()), 0.0, 0.0
        for task in self.left.values():
            passed = now - self.begun.get(task.id, now)
            rest = max(0.0, means.get(kind_of(task), usual) - passed)
            if isinstance(task, PlannedMeasure) and task.alone:
                alone += rest
            else:
                together += rest
        return together / self.jobs + alone


def _run(
    tasks: Mapping[str, StudyTask], errors: dict[str, str], pool: Pool, told: Callable[[str, StudyTask], None]
) -> None:
    """Do `tasks` in the workers of `pool`, in their order as far as what they need is done."""
    order = TopologicalSorter({name: [need for need in task.needs if need in tasks] for name, task in tasks.items()})
    order.prepare()
    place_of = {name: at for at, name in enumerate(tasks)}
    waiting: list[str] = []
    running = 0
    while order.is_active():
        waiting = sorted([*waiting, *order.get_ready()], key=place_of.__getitem__)
        for name in [name for name in waiting if any(need in errors for need in tasks[name].needs)]:
            waiting.remove(name)
            errors[name] = Skipped(next(errors[need] for need in tasks[name].needs if need in errors))
            told(errors[name], tasks[name])
            order.done(name)
        while waiting and pool.give(task := tasks[waiting[0]]):
            del waiting[0]
            running += 1
            told("starts", task)
        while len(pool) < running + len(waiting) and pool.start():
            pass
        for answer in pool.answers(seconds=1.0) if running or waiting else ():
            task = answer.order
            if task is not None:
                running -= 1
            elif isinstance(answer.error, Died) and not answer.error.at_start:
                continue  # one that had nothing to do was killed
            elif waiting:  # what cannot even start costs the next task
                task = tasks[waiting.pop(0)]
            else:
                continue
            if (error := _failure(answer)) is not None:
                errors[task.id] = error
            told(error or "done", task)
            order.done(task.id)


def _failure(answer: Answer) -> str | None:
    """The error of a task in one line; None where it went well."""
    error = answer.error
    if error is None:
        return None
    if isinstance(error, BugElsewhere):
        return cut(" ".join(error.summary.split()), 500)
    if isinstance(error, Died):
        return MachineFailed(error)
    return MachineFailed(one_line(error, 500)) if of_machine(error) else one_line(error, 500)


def _cards(accelerator: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees; none where the CPU computes."""
    if accelerator == "cpu":
        return []
    import torch

    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


@contextmanager
def _doing(place: Place, threads: int, accelerator: str) -> Iterator[Callable[[StudyTask], None]]:
    """The function that does a task, in a worker."""
    from advmoe.studies.tasks import do

    yield lambda task: do(task, threads=threads, accelerator=accelerator)

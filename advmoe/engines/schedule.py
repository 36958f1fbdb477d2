"""The loop that has tasks done by an engine, each after those that it needs.

Where a task fails, that is reported, and those that need it are skipped. One that was preempted is tried again; so is
one whose process died, as often as the engine allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from graphlib import TopologicalSorter
from typing import Any, Protocol, TypeVar

from advmoe.errors import BugElsewhere, InputError, of_machine
from advmoe.pool import Answer, Died, Preempted
from advmoe.progress import tell
from advmoe.text import cut, one_line


class Task(Protocol):
    """Something to be done once."""

    @property
    def id(self) -> str:
        """Its name, which no other task has."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The ids of those that come before."""


class Engine(Protocol):
    """Does orders somewhere, several at once. Orders are tasks; `pool.Pool` takes other values too."""

    given: str
    """What an order does once it is given: `starts`, or is `queued`."""
    retries: int
    """How often an order is given again whose process died."""

    def ready(self, number: int) -> None:
        """Make room for as many orders at once, as far as there may be so many; do not wait for it."""

    def give(self, order: Any) -> bool:
        """Take an order. False where there is no room for one more now."""

    def answers(self, seconds: float) -> Iterator[Answer]:
        """What became of orders, as far as it is known within about so many `seconds`."""

    def close(self) -> None:
        """Let go of all that the engine has."""


T = TypeVar("T", bound=Task)
Told = Callable[[str, T, float | None], None]
"""Called with what happens to a task (`starts`, `queued`, `done` or its error's text), the task, and the seconds that
it took where the engine knows them.
"""


class MachineFailed(str):
    """The error of a task that failed by the machine's fault: tried again, it may succeed."""


class Bug(str):
    """The error of a task that failed by a bug, whose traceback is in the task's log."""


class Skipped(str):
    """The error of a task that was not tried, as one that it needs failed; `cause` is that one's error."""

    def __new__(cls, error: str) -> Skipped:
        """Of a task that needs one that ended with `error`."""
        cause = error.cause if isinstance(error, Skipped) else error
        skipped = super().__new__(cls, f"skipped, as what it needs failed: {cause}")
        skipped.cause = cause
        return skipped

    cause: str


def run(tasks: Mapping[str, T], errors: dict[str, str], engine: Engine, told: Told[T]) -> None:
    """Have `engine` do `tasks`, by id, in their order as far as what they need is done.

    `errors` holds those of tasks that failed before, by id, and gets those of the ones that fail now or are skipped.
    """
    order = TopologicalSorter({name: [need for need in task.needs if need in tasks] for name, task in tasks.items()})
    order.prepare()
    place_of = {name: at for at, name in enumerate(tasks)}
    waiting: list[str] = []
    running = 0
    deaths = Counter[str]()
    while order.is_active():
        waiting = sorted([*waiting, *order.get_ready()], key=place_of.__getitem__)
        for name in [name for name in waiting if any(need in errors for need in tasks[name].needs)]:
            waiting.remove(name)
            errors[name] = Skipped(next(errors[need] for need in tasks[name].needs if need in errors))
            told(errors[name], tasks[name], None)
            order.done(name)
        while waiting and engine.give(task := tasks[waiting[0]]):
            del waiting[0]
            running += 1
            told(engine.given, task, None)
        engine.ready(running + len(waiting))
        for answer in engine.answers(seconds=1.0) if running or waiting else ():
            task = answer.order
            if task is not None:
                running -= 1
            elif isinstance(answer.error, Died) and not answer.error.at_start:
                continue  # one that had nothing to do was killed
            elif waiting:  # what cannot even start costs the next task
                task = tasks[waiting.pop(0)]
            else:
                continue
            if _again(answer.error, deaths, task.id, engine.retries):
                tell(f"note  {task.id}: {' '.join(str(answer.error).split())}; tried again")
                waiting.append(task.id)
                continue
            if (error := failure(answer.error)) is not None:
                errors[task.id] = error
            told(error or "done", task, answer.seconds)
            order.done(task.id)


def _again(error: Exception | None, deaths: Counter[str], name: str, retries: int) -> bool:
    """Whether a task that ended so is tried again."""
    deaths[name] += isinstance(error, Died)
    return isinstance(error, Preempted) or (isinstance(error, Died) and deaths[name] <= retries)


def failure(error: BaseException | None) -> str | None:
    """The error of a task in one line; None where it went well."""
    if error is None:
        return None
    if isinstance(error, BugElsewhere):
        return Bug(cut(" ".join(error.summary.split()), 500))
    if isinstance(error, Died):
        return MachineFailed(error)
    text = one_line(error, 500)
    return MachineFailed(text) if of_machine(error) else text if isinstance(error, InputError) else Bug(text)

"""How far each task of a study is, as its files tell: anybody may ask, at any time. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from advmoe.engines import Ledger
from advmoe.locks import busy
from advmoe.studies.task_pool import Resumable
from advmoe.studies.tasks import Placed, lock_of

STATES = ("finished", "running", "queued", "interrupted", "failed", "waiting")


@dataclass(frozen=True)
class TaskStatus:
    """How far a task is."""

    state: str
    """One of `STATES`: `queued` is one that a cluster has taken and not begun, `waiting` one that nobody has begun."""
    since: str | None = None
    """When that began, UTC."""
    error: str | None = None
    """Of a failed task, in one line."""
    host: str | None = None
    """Where it runs, or ran last."""
    job: str | None = None
    """The cluster's name of it."""
    log: str | None = None
    """The file that its output goes to."""


class Told(Resumable, Placed, Protocol):
    """A task that files tell of."""


def status_of(task: Told, ledger: Ledger) -> TaskStatus:
    """How far a task is: what lies where its result belongs counts before what its ledger says."""
    told, submitted = ledger.read(task.id), ledger.job(task.id)
    here = {name: told.get(name) for name in ("host", "job", "log")}
    if task.state() == "finished":
        return TaskStatus("finished", **here)
    if told.get("state") == "running" and busy(lock_of(task)):
        return TaskStatus("running", told.get("since"), **here)
    if submitted.get("job") not in (None, told.get("job")):
        return TaskStatus("queued", submitted.get("since"), job=submitted.get("job"), log=str(ledger.log(task.id)))
    if told.get("state") == "failed":
        return TaskStatus("failed", told.get("since"), told.get("error"), **here)
    if told:  # its process is gone, or was told to stop
        return TaskStatus("interrupted", told.get("since"), **here)
    return TaskStatus("interrupted" if task.state() == "interrupted" else "waiting")


def counted(states: Iterable[TaskStatus]) -> str:
    """How many tasks are in each state, in words."""
    numbers = Counter(each.state for each in states)
    return ", ".join(f"{numbers[state]} {state}" for state in STATES if numbers[state])

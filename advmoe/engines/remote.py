"""A task done by a process of a cluster, which finds there what the process that wants it has here: folder,
environment, plugins. What became of it is told by the ledger, which both see.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from advmoe.engines.ledger import ENDED, Ledger
from advmoe.engines.schedule import Bug, MachineFailed, failure
from advmoe.errors import BugElsewhere, InputError
from advmoe.pool import Answer, Died, Place, Preempted, Prepare, threads_set
from advmoe.progress import warnings_told
from advmoe.signals import Ended, described, handled, not_lost

RETRIES = 3
"""How often a task is tried again whose process died."""
SIGNALS = ("SIGTERM", "SIGUSR1")
"""What a cluster sends before it takes a machine away, or the time is over."""
_PASSED_ON = ("ADVMOE_", "OMP_", "GOMP_", "KMP_")


def settings_here() -> dict[str, str]:
    """The variables of this process's environment that its tasks are to have too."""
    return {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}


@dataclass(frozen=True, kw_only=True)
class Call:
    """How tasks are done there."""

    prepare: Prepare
    arguments: Sequence[Any]
    threads: int | None
    ledger: Ledger
    home: Path = field(default_factory=Path.cwd)
    environment: Mapping[str, str] = field(default_factory=settings_here)

    def __call__(self, order: Any, job: str | None = None) -> None:
        """Do a task, as a `job` (of SLURM: the one that this process is in). How it ended is in the ledger."""
        os.chdir(self.home)
        os.environ.update(self.environment)
        log, started = self.ledger.log(order.id), time.perf_counter()
        self.ledger.folder.mkdir(parents=True, exist_ok=True)
        with printed_to(log), self.ledger.doing(order.id, log=log, job=job or slurm_job()) as ended:
            try:
                with (
                    handled(SIGNALS, _end, unless=lambda handler: False),
                    not_lost(),
                    warnings_told(),
                    threads_set(self.threads),
                    self.prepare(Place(self.threads, log=log), *self.arguments) as work,
                ):
                    work(order)
            except Preempted as stop:
                ended |= {"state": "preempted", "error": str(stop)}
            except Ended as stop:  # nothing is kept: as if it had died
                told = f"{described(stop)[0]} before it had done anything that is kept"
                ended |= {"state": "failed", "error": told, "fault": "machine"}
            except Exception as error:
                traceback.print_exception(error)
                sys.stderr.flush()
                ended |= {"state": "failed", **_described(error)}
            ended["seconds"] = round(time.perf_counter() - started, 3)


def answer(ledger: Ledger, order: Any, job: str) -> Answer | None:
    """What became of an order whose `job` is over, as the ledger says; None where it does not."""
    told = ledger.read(order.id)
    if told.get("job") != job or told.get("state") not in ENDED:
        return None
    text = str(told.get("error"))
    error: Exception | None = None
    if told["state"] == "preempted":
        error = Preempted(text)
    elif told["state"] == "failed":
        error = _ERRORS.get(str(told.get("fault")), _ERRORS["machine"])(text)
    return Answer(order, error=error, seconds=told.get("seconds"))


def lost(order: Any, why: str) -> Answer:
    """The answer to an order whose process has died."""
    return Answer(order, error=Died(None, told=why))


def slurm_job() -> str | None:
    """The job of SLURM that this process is in, as `squeue` names it; None where it is in none."""
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array and number else os.environ.get("SLURM_JOB_ID")


_ERRORS: Mapping[str, Callable[[str], Exception]] = {
    "input": InputError,
    "machine": lambda text: Died(None, told=text),  # another one may do it
    "bug": lambda text: BugElsewhere(text, ""),
}


def _described(error: Exception) -> dict[str, str]:
    text = failure(error) or ""
    fault = "machine" if isinstance(text, MachineFailed) else "bug" if isinstance(text, Bug) else "input"
    return {"error": str(text), "fault": fault}


def _end(number: int, _: FrameType | None) -> None:
    raise Ended(number)


@contextmanager
def printed_to(log: Path) -> Iterator[None]:
    """Inside, what this process and its children print goes to the end of a file."""
    before = {stream: os.dup(stream) for stream in (1, 2)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        for stream in before:
            os.dup2(file, stream)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, kept in before.items():
            os.dup2(kept, stream)
            os.close(kept)
        os.close(file)

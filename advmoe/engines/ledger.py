"""What is known of tasks under way, in files that the process which wants them done and those that do them share.

Of each task there are at most three: `ID.json`, written by who does it, `ID.job`, the job that was submitted for it,
and `ID.log`, what a job of a cluster printed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.files import read_object, write_text
from advmoe.text import cut, one_line

ENDED = ("finished", "failed", "preempted")
"""States of a task that nobody is at."""


@dataclass(frozen=True)
class Ledger:
    """The files of tasks, in one folder."""

    folder: Path

    def _file(self, task: str, suffix: str) -> Path:
        return self.folder / f"{task.replace('/', '-')}{suffix}"

    def log(self, task: str) -> Path:
        """Where a job of a cluster prints what a task says."""
        return self._file(task, ".log")

    def read(self, task: str) -> dict[str, Any]:
        """What was last written of a task: `state` (`running` or one of `ENDED`), `since`, `job`, `log`, `host`,
        `process`, `seconds`, `error`; empty where that is nothing, or damaged.
        """
        return _read(self._file(task, ".json"))

    def job(self, task: str) -> dict[str, Any]:
        """The `job` that was last submitted for a task, `since` when; empty where there is none."""
        return _read(self._file(task, ".job"))

    def submitted(self, task: str, job: str) -> None:
        """Note the job that is to do a task."""
        self._write(task, ".job", job=job)

    def failed(self, task: str, error: str) -> None:
        """Note that a task failed, or was not tried."""
        known = {name: value for name, value in self.read(task).items() if name in ("job", "log")}
        self._write(task, ".json", **known, state="failed", error=cut(error, 500))

    @contextmanager
    def doing(self, task: str, *, log: Path | None, job: str | None = None) -> Iterator[dict[str, Any]]:
        """Inside, this process does a task, and says so; at its end too, with what is put into the dictionary."""
        known = {"job": job, "log": None if log is None else str(log), "host": socket.gethostname()}
        self._write(task, ".json", state="running", **known, process=os.getpid())
        ended: dict[str, Any] = {"state": "finished"}
        try:
            yield ended
        except BaseException as error:
            ended |= {"state": "failed", "error": one_line(error, 500)}
            raise
        finally:
            self._write(task, ".json", **known, **ended)

    def _write(self, task: str, suffix: str, **fields: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fields["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        write_text(self._file(task, suffix), json.dumps(fields) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}

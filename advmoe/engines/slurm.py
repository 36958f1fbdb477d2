"""Tasks as jobs of SLURM, submitted as arrays by submitit (extra `slurm`).

What is in the queue, or runs, outlives the process that submitted it: the next one that wants the same task waits for
that job. Which jobs there are is asked of `squeue`, as not every cluster keeps accounts (`sacct`).
"""

from __future__ import annotations

import getpass
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from advmoe.engines.remote import RETRIES, Call, answer, lost
from advmoe.errors import InputError, lacking
from advmoe.pool import Answer
from advmoe.progress import tell
from advmoe.text import few, one_line

if TYPE_CHECKING:
    from advmoe.engines.choice import EngineOptions

PAUSE = 3.0
"""Seconds between two looks at the queue. A task is given up for dead after two without its job, as what the job wrote
last may be seen late.
"""
_NAME = "advmoe"
"""Of every job."""
_NOTICE = 180
"""Seconds before the end of a job's time in which it is told to stop."""


def require_slurm() -> Any:
    """submitit. Raises `InputError` where it is not installed, or SLURM's programs are not there."""
    try:
        import submitit
    except ImportError as error:
        raise lacking("--engine slurm", "slurm", error) from error
    if missing := [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]:
        raise InputError(f"--engine slurm must be called where SLURM's programs are, got no {', '.join(missing)}")
    return submitit


class Slurm:
    """SLURM as an engine: see `schedule.Engine`. `most` tasks are in its queue at once."""

    given: str = "queued"
    retries: int = RETRIES

    def __init__(self, call: Call, options: EngineOptions, *, most: int, alone: bool = False) -> None:
        submitit = require_slurm()
        self._call, self._ledger, self._most = call, call.ledger, most
        self._folder = (call.ledger.folder / "slurm").resolve()
        self._executor = submitit.SlurmExecutor(folder=self._folder)
        asked: dict[str, Any] = {"partition": options.partition, "exclusive": alone or None}
        if options.gpus:
            asked["gres"] = f"gpu:{options.gpus}"
        self._executor.update_parameters(
            job_name=_NAME, time=max(1, round(options.hours * 60)), cpus_per_task=options.cpus or call.threads or 1,
            stderr_to_stdout=True, signal_delay_s=_NOTICE, array_parallelism=most,
            # A job that is stopped is followed by another one of ours, never by itself.
            additional_parameters={"signal": f"USR1@{_NOTICE}", "no-requeue": True},
            **{name: value for name, value in asked.items() if value is not None},
        )  # fmt: skip
        self._new: list[Any] = []
        self._jobs: dict[str, Any] = {}
        self._missed: set[str] = set()
        self._seen = queue()
        self._looked = time.monotonic()

    def ready(self, number: int) -> None:
        """Nothing: SLURM starts jobs."""

    def give(self, order: Any) -> bool:
        """Take an order: it is submitted with the others that come now, unless a job for it is in the queue."""
        if len(self._new) + len(self._jobs) >= self._most:
            return False
        job = self._ledger.job(order.id).get("job")
        if job in (self._seen or ()) and job not in self._jobs:
            self._jobs[str(job)] = order
        else:
            self._new.append(order)
        return True

    def answers(self, seconds: float) -> Iterator[Answer]:
        """What became of jobs that have left the queue."""
        self._submit()
        time.sleep(seconds)
        if time.monotonic() - self._looked < PAUSE:
            return
        self._looked, seen = time.monotonic(), queue()
        if seen is None:  # it does not answer now
            return
        self._seen = seen
        for job, order in list(self._jobs.items()):
            if job in seen:
                continue
            told = answer(self._ledger, order, job)
            if told is None and job not in self._missed:
                self._missed.add(job)
                continue
            del self._jobs[job]
            log = self._folder / f"{job}_0_log.out"
            yield told or lost(order, f"job {job} ended without an answer (see {self._ledger.log(order.id)} and {log})")

    def close(self) -> None:
        """Leave what is in the queue: the next process that wants the same waits for it."""
        if self._jobs:
            tell(f"note  jobs that stay with SLURM: {few(self._jobs, 10)} (to end them: scancel --name {_NAME})")

    def _submit(self) -> None:
        if not self._new:
            return
        try:
            jobs = self._executor.map_array(self._call, self._new)
        except Exception as error:  # whatever sbatch and submitit find wrong
            raise InputError(f"sbatch must take the tasks, got {one_line(error)}") from error
        for link in self._folder.glob(".submission_file_*.sh"):  # to scripts that SLURM has copied: no run holds links
            link.unlink(missing_ok=True)
        for job, order in zip(jobs, self._new, strict=True):
            self._ledger.submitted(order.id, job.job_id)
            self._jobs[job.job_id] = order
        self._new.clear()


def queue() -> set[str] | None:
    """Our jobs that wait or run, as `JOB` or `JOB_NUMBER` of an array; None where SLURM does not answer."""
    words = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}", f"--name={_NAME}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())

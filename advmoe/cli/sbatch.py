"""A batch script for SLURM that trains a run, and puts itself back into the queue until the run is finished."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe.rundir import CONFIG

NOTICE = 180
"""Seconds before its time is over that SLURM is asked for a signal: the run stops at the end of an iteration."""
LEAST_HOURS = 0.1
"""A job of less time would have its signal before it has begun."""


@dataclass(frozen=True)
class Job:
    """What SLURM is asked for."""

    run_dir: Path
    nodes: int
    tasks_per_node: int
    gpus: bool
    """Whether each task gets a GPU."""
    threads: int | None
    """CPUs of each task; None leaves it to SLURM."""
    hours: float | None
    """After which the job is queued anew; None leaves it to the partition."""


def script(job: Job, begin: str, resume: str) -> str:
    """The script; `begin` is the command line that starts the run, `resume` the one that continues it."""
    name = re.sub(r"[^\w.-]", "-", job.run_dir.name)
    asked = [
        f"--job-name={name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}",
        "--requeue", "--open-mode=append", f"--signal=USR1@{NOTICE}", f"--output={name}-%j.log",
    ]  # fmt: skip
    if job.gpus:
        asked.append("--gpus-per-task=1")
    if job.threads is not None:
        asked.append(f"--cpus-per-task={job.threads}")
    if job.hours is not None:
        minutes = max(1, round(60 * job.hours))
        asked.append(f"--time={minutes // 60}:{minutes % 60:02}:00")
    directives = "\n".join(f"#SBATCH {each}" for each in asked)
    return f"""#!/bin/bash
{directives}
# Lines of your own, of a partition or an environment, go here.

if [ -e {shlex.quote(str(job.run_dir / CONFIG))} ]; then
    set -- {resume}
else
    set -- {begin}
fi
srun --kill-on-bad-exit=1 "$@"
code=$?
# Told to stop: the run is saved (85), or had not begun (138). The same job goes on when there is room for it.
if [ "$code" -eq 85 ] || [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""


def without(argv: Sequence[str], *options: str) -> Iterator[str]:
    """The words of a command line but for `options`, each of which has a value: `--name value` or `--name=value`."""
    words = iter(argv)
    for word in words:
        option, equals, _ = word.partition("=")
        if option not in options:
            yield word
        elif not equals:
            next(words, None)

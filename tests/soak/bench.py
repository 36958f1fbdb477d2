"""What all kinds of cases share: a folder of their own, commands with their checks, and what is undamaged."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import processes
from processes import Ended, Kill

MEGABYTES = 4096
"""What a command on tiny models may take at most."""
LONGEST = 400
"""Letters of a message about a mistake."""
MISTAKE, MACHINE = 2, 3
"""Exit codes: a mistake in the input; the machine failed."""
REQUEUE = 85
"""The exit code of a training that was told to stop."""
STOPPED = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}

TINY = shlex.split(
    "--config digits-advmoe --accelerator cpu --threads 1 --model.name wrn-10-1 --model.width 8 --data.image_size 8 "
    "--data.train_examples 64 --training.batch_size 16 --training.epochs 3 --training.val_attack_steps 1 "
    "--training.attack_steps 1 --attack.steps 2"
)
"""The smallest training that has all parts of a large one."""


class Failure(Exception):
    """A case did not end as it should."""


@dataclass
class Soak:
    """One run of the soak: the command that it tries, where it works, and what was made once for all cases."""

    advmoe: list[str]
    python: str
    work: Path
    seconds: float
    """Time limit of one command."""
    patience: float
    """Seconds after a command's end in which its processes must end too."""
    root: bool
    """Whether file systems can be mounted."""
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reference(self, name: str, make: Callable[[Bench], None]) -> Path:
        """The folder that `make` filled when `name` was first asked for; nobody changes it."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        folder = self.work / "reference" / name
        with lock:
            if not (folder / "whole").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                make(Bench(self, folder, Random(name)))
                (folder / "whole").touch()
        return folder


@dataclass
class Bench:
    """A case at work: its folder, its random numbers, and what it counts."""

    soak: Soak
    folder: Path
    random: Random
    counts: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    """What was done, in order."""

    def command(self, *words: str, **options: Any) -> Ended:
        """Run `advmoe` with `words` in the case's folder; see `processes.run`."""
        return self.process([*self.soak.advmoe, *words], **options)

    def process(self, words: Sequence[str], **options: Any) -> Ended:
        """Run `words`, and check what holds for every command: no traceback, hang or bomb, and nothing left over."""
        self.counts["commands"] += 1
        notes = self.folder / ".notes"
        options = {"seconds": self.soak.seconds, "patience": self.soak.patience, "cwd": self.folder} | options
        env = {"TMPDIR": str(self._scratch()), "XDG_CACHE_HOME": str(self.soak.work / "cache")}
        options["env"] = env | options.get("env", {})
        ended = processes.run(words, notes=notes, **options)
        kill = options.get("kill")
        self.say(f"{ended}" + (f"\n({kill}{'' if ended.killed else ', too late'})" if kill is not None else ""))
        self.counts["kills"] += ended.killed
        if ended.hung:
            raise Failure(f"hangs: no end after {options['seconds']:.0f} s")
        if ended.left:
            raise Failure(f"leaves {len(ended.left)} process(es): {ended.left[0]}")
        if "Traceback (most recent call last)" in ended.err + ended.out:
            raise Failure(f"traceback, exit code {ended.code}: {last_line(ended.err)}")
        if ended.megabytes > MEGABYTES:
            raise Failure(f"takes {ended.megabytes:.0f} MB")
        if ended.code < 0 and not ended.killed:
            raise Failure(f"dies of signal {-ended.code}")
        return ended

    def say(self, text: str) -> None:
        """Note `text` for whoever reads what a failed case did."""
        self.log.append(text)

    def fine(self, *words: str, **options: Any) -> Ended:
        """Run a command that must succeed."""
        ended = self.command(*words, **options)
        if ended.code != 0:
            raise Failure(f"exit code {ended.code} for 0: {last_line(ended.err)}")
        return ended

    def _scratch(self) -> Path:
        folder = self.folder / ".tmp"
        folder.mkdir(exist_ok=True)
        return folder

    def kill(self, seconds: float, operations: int, *, children: bool = False) -> Kill:
        """A kill at a random moment of a command that takes `seconds` and so many file operations."""
        which = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        if operations and self.random.random() < 0.5:
            return Kill(which, operation=self.random.randint(1, operations))
        whom = self.random.choice(["main", "main", "group", *["child"] * children])
        return Kill(which, after=self.random.uniform(0.1, 1.1) * seconds, whom=whom)


def last_line(text: str) -> str:
    """The last line of an output, as it fits into a table."""
    lines = text.strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def require_line(ended: Ended, rule: str = "") -> str:
    """The one line on stderr that a refused or failed command says, below its notes. Raises `Failure` for anything
    else.
    """
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("note  ")]
    if len(lines) != 1:
        raise Failure(f"exit code {ended.code} with {len(lines)} lines on stderr{rule}: {last_line(ended.err)}")
    if len(lines[0]) > LONGEST:
        raise Failure(f"exit code {ended.code} with a line of {len(lines[0])} letters: {lines[0][:200]}")
    return lines[0]


def require_stopped(ended: Ended, kill: Kill, *, done: bool) -> None:
    """Raise `Failure` unless a command that was killed ended as it should.

    A signal before the command has begun (Python itself starts), or after its work is done, may end it outright.
    """
    if kill.whom == "child" or not ended.killed or ended.code == 0:
        return
    if kill.signal == signal.SIGKILL or (ended.code == -kill.signal and (done or not ended.begun)):
        return
    requeued = kill.signal == signal.SIGTERM and ended.code == REQUEUE  # a training, which saved what it had
    if ended.code != STOPPED[signal.Signals(kill.signal)] and not requeued:
        raise Failure(f"exit code {ended.code} after {kill}: {last_line(ended.err)}")
    require_line(ended, f" after {kill}")


def finished(run: Path) -> bool:
    """Whether the training in `run` came to its end."""
    try:
        return bool(json.loads((run / "manifest.json").read_text()).get("finished"))
    except (OSError, ValueError):
        return False


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder, links and all."""
    shutil.copytree(source, target, symlinks=True)
    return target

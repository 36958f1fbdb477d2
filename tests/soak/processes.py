"""One command in a process of its own: killed where asked, limited in time and memory, and what it leaves behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

HOOK = Path(__file__).with_name("hook")
MEMORY = 12 * 2**30
"""Bytes of address space that a command may map: far above what it takes, far below what a bomb would."""


@dataclass(frozen=True)
class Kill:
    """A signal to a command, after some seconds or before its n-th file operation."""

    signal: int
    after: float | None = None
    operation: int = 0
    whom: str = "main"
    """`main`, the `group` as a terminal does it, or a `child`, which only goes with `after`."""

    def __str__(self) -> str:
        when = f"operation {self.operation}" if self.after is None else f"{self.after:.2f} s"
        return f"{signal.Signals(self.signal).name} to {self.whom} at {when}"


@dataclass
class Ended:
    """What became of a command."""

    words: Sequence[str]
    code: int
    """The exit code, minus the signal's number where one ended the process."""
    out: str
    err: str
    seconds: float
    megabytes: float
    killed: bool = False
    """Whether the kill reached it."""
    begun: bool = False
    """Whether it had opened a file in its folder when the kill reached it; before, Python itself may die of it."""
    hung: bool = False
    left: list[str] = field(default_factory=list)
    """Processes that were still there afterwards."""
    operations: int = 0
    """File operations inside the folder that was watched."""

    def __str__(self) -> str:
        text = f"$ {' '.join(self.words)}\nexit code {self.code} after {self.seconds:.1f} s, {self.megabytes:.0f} MB"
        return f"{text}\nstdout:\n{self.out[-3000:]}\nstderr:\n{self.err[-5000:]}"


def run(
    words: Sequence[str], *, cwd: Path, notes: Path, seconds: float, kill: Kill | None = None,
    env: Mapping[str, str] | None = None, limits: Mapping[int, int] | None = None, polite: float | None = None,
    patience: float = 20.0,
) -> Ended:  # fmt: skip
    """Run `words` in `cwd` to its end.

    Args:
        notes: a folder for its output. seconds: after so many it counts as hung and is killed.
        limits: by `resource`'s number. polite: seconds after which it gets SIGINT, which is no failure of its.
        patience: seconds after its end in which the processes that it started must end too.
    """
    notes.mkdir(parents=True, exist_ok=True)
    for name in ("begun", "killed", "operations"):
        (notes / name).unlink(missing_ok=True)
    mark = f"SOAK_MARK={uuid4().hex}"
    hook = (kill.operation, kill.signal) if kill is not None and kill.after is None else (0, 0)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "COLUMNS": "120", "HF_HUB_OFFLINE": "1",
        "ADVMOE_LOG_FORMAT": "quiet",
        "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", **(env or {}),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH", "")])),
        "SOAK_HOOK": f"{hook[0]} {hook[1]} {cwd}/ {notes}", "SOAK_MARK": mark.partition("=")[2],
    }  # fmt: skip
    started = time.monotonic()
    with (notes / "stdout").open("wb") as out, (notes / "stderr").open("wb") as err:
        process = subprocess.Popen(
            words, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        for which, limit in {resource.RLIMIT_AS: MEMORY, **(limits or {})}.items():
            try:
                resource.prlimit(process.pid, which, (limit, limit))
            except ProcessLookupError:
                break
        code, used, killed, begun, hung = _watched(process, mark, notes, seconds, kill, polite)
    took = time.monotonic() - started
    left = _swept(mark, patience)
    begun, killed = begun or (notes / "killed").exists(), killed or (notes / "killed").exists()
    counted = (notes / "operations").read_text() if (notes / "operations").exists() else "0"
    texts = [(notes / name).read_text(errors="replace") for name in ("stdout", "stderr")]
    return Ended(words, code, *texts, took, used, killed, begun, hung, left, int(counted or 0))


def _watched(
    process: subprocess.Popen[bytes], mark: str, notes: Path, seconds: float, kill: Kill | None,
    polite: float | None,
) -> tuple[int, float, bool, bool, bool]:  # fmt: skip
    """Wait for `process` and kill it when it is time: its code, its megabytes, whether it was killed, had begun, and
    hung.
    """
    started, killed, begun, hung, asked = time.monotonic(), False, False, False, False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss / 1024, killed, begun, hung
        passed = time.monotonic() - started
        if kill is not None and kill.after is not None and not killed and passed >= kill.after:
            begun = (notes / "begun").exists()
            killed = _struck(process.pid, mark, kill)
        if polite is not None and not asked and passed > polite:
            asked = True
            os.kill(process.pid, signal.SIGINT)
        if passed > seconds and not hung:
            hung = True
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


def _struck(pid: int, mark: str, kill: Kill) -> bool:
    """Send a signal; whether it was the command itself that got it. A child that is not there yet is waited for."""
    if kill.whom == "group":
        os.killpg(pid, kill.signal)
    elif kill.whom == "main":
        os.kill(pid, kill.signal)
    else:
        for child in _marked(mark):
            if child != pid:
                try:
                    os.kill(child, kill.signal)
                except ProcessLookupError:
                    continue
                return True
        return False
    return True


def _marked(mark: str) -> list[int]:
    """Living processes whose environment holds `mark`: children inherit it, whatever group they are in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX":
                        found.append(int(entry.name))
            except OSError:
                continue
    return found


def _swept(mark: str, patience: float) -> list[str]:
    """What is left of a command some time after its end, which is then killed."""
    until = time.monotonic() + patience
    while (left := _marked(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    names = []
    for pid in left:
        try:
            names.append((Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    return names

"""Kill, damage, starve and misuse the command line for some minutes, and count what comes of it.

    python tests/soak/soak.py --minutes 60 [--seed S] [--kinds train,damage] [--case KIND:SEED]

See docs/soak.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import count
from pathlib import Path
from random import Random, SystemRandom

import damage
import lines
import measurements
import surroundings
import trainings
from bench import Bench, Failure, Soak
from results import Differs

KINDS: dict[str, Callable[[Bench], None]] = {
    "train": trainings.case,
    "measure": measurements.case,
    "damage": damage.case,
    "line": lines.case,
    "machine": surroundings.case,
}
"""What a case of each kind does."""
COLUMNS = ("cases", "commands", "kills", "resumptions", "refusals", "failures")


@dataclass(frozen=True)
class Case:
    """One case, which its kind and its seed repeat."""

    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}"


class Session:
    """Cases done, two at a time, and what they counted."""

    def __init__(self, soak: Soak, again: str) -> None:
        self.soak, self.again = soak, again
        self.counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.failed: list[str] = []
        self._lock = threading.Lock()

    def do(self, case: Case) -> None:
        """Do one case. The folder of one that fails is kept, with its log."""
        folder = self.soak.work / f"{case.kind}-{case.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        bench, started = Bench(self.soak, folder, Random(str(case))), time.monotonic()
        trouble = None
        try:
            KINDS[case.kind](bench)
        except (Failure, Differs) as error:
            trouble = str(error)
        except Exception:  # a fault of the soak itself must not hide: it counts as a failure
            trouble = "the soak itself: " + " ".join(traceback.format_exc().split())[-300:]
        with self._lock:
            counts = self.counts[case.kind]
            counts.update(bench.counts)
            counts["cases"] += 1
            with (self.soak.work / "cases.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
                what = " ".join((bench.log or [""])[0].splitlines()[:1])[:200]
                file.write(f"{case}  {time.monotonic() - started:.0f} s  {trouble or 'fine'}  {what}\n")
            if trouble is not None:
                counts["failures"] += 1
                self.failed.append(f"{case}  {trouble}")
                text = "\n\n".join([*bench.log, f"FAILED: {trouble}"])
                (folder / "log.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
                print(f"FAILED  {case}: {trouble}\n        again: {self.again} --case {case}   log: {folder}/log.txt")
                sys.stdout.flush()
        if trouble is None:
            shutil.rmtree(folder, ignore_errors=True)

    def table(self) -> str:
        """The counts of each kind."""
        rows = [("", *COLUMNS)]
        rows += [(kind, *(f"{counts[name]:,}" for name in COLUMNS)) for kind, counts in self.counts.items()]
        total = sum(self.counts.values(), Counter())
        rows.append(("all", *(f"{total[name]:,}" for name in COLUMNS)))
        return "\n".join(f"{row[0]:8}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows)


def cases(kinds: list[str], seed: int) -> Iterator[Case]:
    """Cases without end: the kinds in turn, each with a seed of its own."""
    return (Case(kinds[number % len(kinds)], seed * 1_000_000 + number) for number in count())


def main() -> int:
    """Run the soak; the exit code is 0 without failures, 1 else."""
    options = _options()
    kinds = options.kinds.split(",")
    seed = SystemRandom().randrange(1, 10_000) if options.seed is None else options.seed
    work = Path(options.work or tempfile.mkdtemp(prefix="advmoe-soak-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    advmoe = options.advmoe.split()
    soak = Soak(
        advmoe, sys.executable, work, options.limit, options.patience, hasattr(os, "geteuid") and os.geteuid() == 0
    )
    session = Session(soak, f"{sys.executable} {' '.join(sys.argv[:1])} --work {work} --advmoe '{options.advmoe}'")
    sys.stdout.reconfigure(errors="backslashreplace")  # cases have words that are no UTF-8
    print(f"seed {seed}, {options.minutes:g} minutes, {options.jobs} at a time, kinds {', '.join(kinds)}, in {work}")
    started = time.monotonic()
    if options.case:
        for text in options.case:
            kind, _, number = text.partition(":")
            session.do(Case(kind, int(number)))
    else:
        _all(session, kinds, seed, options, started)
    took = time.monotonic() - started
    print(f"\n{session.table()}\n\nseed {seed}, {took / 60:.1f} minutes, {_machine()}")
    for line in session.failed:
        print(f"FAILED  {line}")
    if not session.failed and not options.work:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if session.failed else 0


def _all(session: Session, kinds: list[str], seed: int, options: argparse.Namespace, started: float) -> None:
    """Begin cases until the time is over, or there were as many as wanted."""
    queue, lock, stopped = enumerate(cases(kinds, seed)), threading.Lock(), threading.Event()

    def work() -> None:
        while time.monotonic() - started < 60 * options.minutes and not stopped.is_set():
            with lock:
                number, case = next(queue)
            if options.cases is not None and number >= options.cases:
                return
            session.do(case)

    with ThreadPoolExecutor(options.jobs) as pool:
        workers = [pool.submit(work) for _ in range(options.jobs)]
        try:
            for each in workers:
                each.result()
        except KeyboardInterrupt:
            print("interrupted: the cases under way are the last")
            stopped.set()


def _machine() -> str:
    """What the counts were found on."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in about if "model name" in line), platform.machine())
    versions = []
    for package in ("advmoe", "torch", "numpy", "lightning-fabric"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([f"{os.cpu_count()} cores of {cpu}", f"Python {platform.python_version()}", *versions])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60, help="begin cases for so long (default: 60)")
    add("--seed", type=int, help="of all cases (default: a random one, which is printed)")
    add("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)")
    add("--case", action="append", help="KIND:SEED: only this one; may be given again")
    add("--cases", type=int, help="so many at most")
    add("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    add("--limit", type=float, default=300, help="seconds after which a command hangs (default: 300)")
    add("--patience", type=float, default=20, help="seconds in which processes of a command must end after it")
    beside = Path(sys.executable).with_name("advmoe")
    add("--advmoe", default=str(beside) if beside.exists() else "advmoe", help="the command that is tried")
    add("--work", help="a folder to work in, which is kept (default: one that goes where nothing fails)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

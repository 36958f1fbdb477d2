"""An evaluation's batches done by an engine (`engines`): a shard, some batches of one attack, is a task.

A shard's results go into the journal, batch by batch, so that one which is tried again goes on where it was. Each
opens the run anew, and does nothing where its numbers would be others than those that the journal holds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advmoe.attacks.routed import RoutedPlan
from advmoe.engines import Bug, EngineOptions, Ledger, MachineFailed, run
from advmoe.errors import BugElsewhere, InputError, OtherSettings
from advmoe.evaluation.fingerprint import fingerprint
from advmoe.evaluation.harness import BatchTask, Job, Journal, in_file_name, tell_finished
from advmoe.evaluation.outcomes import make_job
from advmoe.evaluation.scoring import measuring, size, take
from advmoe.evaluation.subject import Options, open_subject
from advmoe.locks import exclusive
from advmoe.pool import Place, Preempted
from advmoe.progress import bar, outermost, tell
from advmoe.rundir import EVALUATION, read_result, require_plain
from advmoe.signals import Ended, described

USUAL = 8
"""Shards of an attack, which are done at the same time, unless the user says otherwise."""
_LATE = 120.0
"""Seconds after which a network's file system shows what another machine has written."""


@dataclass(frozen=True)
class Shard:
    """Some batches of one attack."""

    attack: str
    batches: tuple[int, ...]
    """The positions of their first examples."""
    mark: str
    """Stands for all that the numbers depend on."""
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Its task's name."""
        return f"{in_file_name(self.attack)}.{self.batches[0]}-{self.batches[-1]}.{self.mark}"

    def tasks(self) -> Iterator[BatchTask]:
        """Its batches."""
        return (BatchTask(self.attack, first) for first in self.batches)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How an engine makes attacks on a run, or on a classifier of the user's own."""

    target: str
    options: Options
    engine: EngineOptions
    number: int
    """Shards of each attack; as many are done at once."""
    folder: Path
    """What is known of them, and what they print."""

    @property
    def device(self) -> str:
        """The kind of device that they compute on."""
        return "cuda" if self.engine.gpus else "cpu"

    def attack(self, job: Job, names: Sequence[str], journal: Journal) -> None:
        """Have all tasks of the attacks `names` done that `journal`, which has a folder and is open, lacks.

        Raises the first error of a shard, when all have ended.
        """
        assert journal.path is not None
        require_plain(self.folder, itself=True)
        left = {shard: number for shard in self.cut(job, names, journal.path) if (number := _left(shard, journal))}
        if left:
            self._have_done(left, job, journal)
        for name in names:
            if not _arrived(left, name, journal):
                raise OSError(f"{journal.path} must hold every batch of {name} by now: try again")

    def _have_done(self, left: Mapping[Shard, int], job: Job, journal: Journal) -> None:
        """Have shards done, of each of which so many batches are `left`."""
        by_attack, started, speaks = Counter(shard.attack for shard in left), time.perf_counter(), outermost()
        ledger, places = Ledger(self.folder), [Place(self.options.threads)] * min(self.number, len(left))
        arguments = self.target, replace(self.options, accelerator=self.device), journal.path
        errors: dict[str, str] = {}
        with (
            bar("attack", sum(left.values()), unit="batch") as drawn,
            closing(self.engine.open(_attacking, arguments, places=places, ledger=ledger)) as engine,
        ):

            def told(word: str, shard: Shard, _: float | None) -> None:
                if word == engine.given:
                    return
                drawn.update(left[shard])
                by_attack[shard.attack] -= 1
                if word != "done":
                    tell(f"failed: {word}  {shard.id}  log {ledger.log(shard.id)}", "failed")
                elif speaks and not by_attack[shard.attack] and _arrived(left, shard.attack, journal):
                    tell_finished(job, journal, shard.attack, time.perf_counter() - started)

            run({shard.id: shard for shard in left}, errors, engine, told)
        for name, error in errors.items():
            raise _raised(error, f"{error} (see {ledger.log(name)})")

    def cut(self, job: Job, names: Sequence[str], journal: Path) -> Iterator[Shard]:
        """The shards, whatever is done of them."""
        known = read_result(journal / EVALUATION)["fingerprint"]
        mark = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        batches = range(0, size(job.data), job.batch_size)
        each = -(-len(batches) // self.number)
        for name in names:
            for at in range(0, len(batches), each):
                yield Shard(name, tuple(batches[at : at + each]), mark)


def _left(shard: Shard, journal: Journal) -> int:
    """How many of a shard's batches the journal lacks."""
    return sum(journal.get(task) is None for task in shard.tasks())


def _arrived(shards: Iterable[Shard], attack: str, journal: Journal) -> bool:
    """Whether the journal holds all of an attack's shards, which may be seen some time after they were written."""
    end = time.monotonic() + _LATE
    while any(_left(shard, journal) for shard in shards if shard.attack == attack):
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def _raised(error: str, text: str) -> Exception:
    if isinstance(error, MachineFailed):
        return OSError(text)
    return BugElsewhere(text, text) if isinstance(error, Bug) else InputError(text)


@contextmanager
def _attacking(place: Place, target: str, options: Options, path: Path) -> Iterator[Callable[[Shard], None]]:
    """The function that does a shard, whose results go into the journal at `path`."""
    subject = open_subject(target, options, writes=False)
    device = subject.device
    predict = subject.load(device)
    job, _ = make_job(predict, subject.data, subject.measurement(), device)
    head = read_result(path / EVALUATION)
    known = head["fingerprint"]
    if "plan" in head:
        job = replace(job, plan=RoutedPlan.from_json(head["plan"]))
    require_same(known, fingerprint(predict, job, known["attacks"], device, ()))

    def attack(shard: Shard) -> None:
        journal, done = Journal(path), 0
        try:
            for task in shard.tasks():
                _require_current(path, known)
                with exclusive(path / f".{task.file}.lock"):
                    if journal.get(task) is None:
                        result, _ = job.run(task, predict, *take(job.data, job.examples(task), device))
                        _require_current(path, known)
                        journal.put(task, result)
                        done += 1
        except Ended as stop:
            if done:
                raise Preempted(f"{described(stop)[0]} after {done} batches") from stop
            raise

    with measuring(predict, device):
        yield attack


def require_same(known: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `OtherSettings` where this process's numbers would be others than those of a fingerprint."""
    for name, value in json.loads(json.dumps(here)).items():
        if known.get(name) != value and not (name == "model" and known.get(name) is None):
            rule = f"compute as the process that wants them ({name}: {known.get(name)})"
            raise OtherSettings(f"every process of an evaluation must {rule}, got {value}")


def _require_current(path: Path, known: Mapping[str, Any]) -> None:
    if not (path / EVALUATION).exists() or read_result(path / EVALUATION).get("fingerprint") != known:
        raise OtherSettings(f"{path} must hold the evaluation that this shard is of, got another, or none")

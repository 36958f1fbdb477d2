"""Attacks over a data set: each batch is a task, whose result is stored when it is done; processes share the tasks.

Axes: `N` examples, `C` channels, `H W` size.

A batch's seeds follow from the position of its first example, so that neither the number of processes nor an
interruption changes a result. (The number of threads may: convolutions of small batches round differently, and an
attack's signs amplify it.)
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import RoutedPlan
from advmoe.errors import InputError, OtherSettings
from advmoe.evaluation.randomised import averaged
from advmoe.evaluation.scoring import Counted, EvaluationData, Outcome, measuring, run_attack, size, stream, take
from advmoe.evaluation.suite import Setting, build
from advmoe.locks import CLAIM, Hold, hold
from advmoe.pool import Died, Place, Pool
from advmoe.progress import bar, outermost, tell
from advmoe.rundir import EVALUATION, read_result, require_plain, write_result
from advmoe.text import duration, percent, radius
from advmoe.threat import ThreatModel

Load = Callable[[torch.device], Predict]
"""Makes the classifier, on a device; each process calls it once."""
Result = dict[str, Any]
"""The result of one task, as plain values."""


def in_file_name(attack: str) -> str:
    """An attack's name as a part of a file's: one that has more than lower case, digits and dashes, and might become
    another's, with a digest of its own.
    """
    plain = re.sub("[^a-z0-9-]", "_", attack)
    return plain if plain == attack else f"{plain}-{hashlib.sha256(attack.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class BatchTask:
    """One attack on one batch."""

    attack: str
    first: int
    """The position of the batch's first example."""

    @property
    def file(self) -> str:
        """The name of the file of its result."""
        return f"{in_file_name(self.attack)}.{self.first}.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs besides the model."""

    data: EvaluationData
    setting: Setting
    batch_size: int
    seed: int
    plan: RoutedPlan | None = None

    def tasks(self, names: Iterable[str]) -> Iterator[BatchTask]:
        """Every task of the attacks `names`, one attack after another."""
        return (BatchTask(name, first) for name in names for first in range(0, size(self.data), self.batch_size))

    def examples(self, task: BatchTask) -> slice:
        """The positions of a task's examples."""
        return slice(task.first, task.first + self.batch_size)

    def run(self, task: BatchTask, predict: Predict, x: Tensor, y: Tensor) -> tuple[Result, Outcome]:
        """Do one task, on its images `x` (N, C, H, W) of classes `y`. The model must be as `measuring` sets it."""
        counted = Counted(predict)
        with averaged(counted, self.setting.eot, self.seed, task.first, task.attack) as asked:
            attack = build(task.attack, asked, self.setting, self.plan)
            outcome = run_attack(attack, asked, x, y, threat=self.setting.threat, purpose=(self.seed, task.first))
        result = {
            "robust": outcome.robust.int().tolist(), "predicted": outcome.predicted.tolist(), "parts": outcome.parts,
            "flags": outcome.flags, "seconds": outcome.seconds, "settings": dict(attack.settings),
            "model_calls": {"forward": counted.forward, "gradient": counted.gradient},
            "gradient_passes": counted.gradient_passes,
        }  # fmt: skip
        return result, outcome


@dataclass
class Journal:
    """Results by task: in memory and, where there is a directory, in a file each, written whole."""

    path: Path | None = None
    results: dict[BatchTask, Result] = field(default_factory=dict)
    _lock: Hold | None = field(init=False, default=None)

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Begin an evaluation, or with `resume` continue the interrupted one whose results are here.

        Returns what is stored beside these results, None for an evaluation that begins. Raises `OtherSettings` where
        the interrupted one had other settings, and `InputError` where another process is at it.
        """
        if self.path is None:
            return None
        require_plain(self.path, itself=True)
        for file in self.path.iterdir() if self.path.exists() else ():
            if file.is_dir():
                raise InputError(f"{file} must be a file, got a folder")
        if not self._hold():
            raise InputError(
                f"out must be free of other evaluations, got {str(self.path.parent)!r}: one is at work there"
            )
        head = self.path / EVALUATION
        if resume and head.exists():
            stored = read_result(head)
            if not isinstance(known := stored.get("fingerprint"), dict):
                raise OtherSettings(
                    f"{head} must hold the settings that --resume continues (fingerprint), got {known!r}"
                )
            for name, value in json.loads(json.dumps(fingerprint)).items():
                if known.get(name) != value:
                    rule = f"repeat the settings of the evaluation that it continues ({name})"
                    raise OtherSettings(f"--resume must {rule}: {known.get(name)}, got {value}")
            return stored
        for file in self.path.iterdir():
            if file.name != CLAIM:
                file.unlink()
        write_result(head, {"fingerprint": fingerprint})
        return None

    def note(self, **values: Any) -> None:
        """Store `values` beside the fingerprint."""
        if self.path is not None:
            head = self.path / EVALUATION
            write_result(head, read_result(head) | values)

    def get(self, task: BatchTask) -> Result | None:
        """The result of a task, if it is done; one that is damaged is not."""
        if task not in self.results and self.path is not None and (file := self.path / task.file).exists():
            try:
                self.results[task] = read_result(file, required=True)
            except ValueError as error:
                tell(f"note  {error}; done again")
        return self.results.get(task)

    def holds(self, task: BatchTask) -> bool:
        """Whether there is a file of the task's, sound or not."""
        return self.path is not None and (self.path / task.file).exists()

    def put(self, task: BatchTask, result: Result) -> None:
        """Store a result."""
        self.results[task] = result
        if self.path is not None:
            write_result(self.path / task.file, result, indent=None)

    def close(self) -> None:
        """Let other processes continue or replace the evaluation."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Delete the directory, unless another process is at it."""
        if self.path is not None and self.path.exists():
            require_plain(self.path, itself=True)
        if self.path is not None and self.path.exists() and self._hold():
            shutil.rmtree(self.path)
            self.close()

    def _hold(self) -> bool:
        """Lock the directory until `close`, or the process's end; False where another process has locked it."""
        assert self.path is not None
        if self._lock is None:
            self._lock = hold(self.path, folder=True)
        return self._lock is not None


def run_tasks(
    job: Job, names: Iterable[str], predict: Predict, journal: Journal, device: torch.device,
    helpers: Helpers | None = None,
) -> None:  # fmt: skip
    """Do the tasks of the attacks `names` that `journal` lacks.

    They are done in this process, which has the classifier `predict` on `device`, and in those of its `helpers`.
    """
    names = list(names)
    tasks = [task for task in job.tasks(names) if journal.get(task) is None]
    left, started, speaks = Counter(task.attack for task in tasks), time.perf_counter(), outermost()
    with bar("attack", len(tasks), unit="batch") as drawn:

        def begin(task: BatchTask) -> None:
            drawn.set_description(task.attack)

        def keep(task: BatchTask, result: Result) -> None:
            journal.put(task, result)
            drawn.update()
            left[task.attack] -= 1
            if speaks and not left[task.attack]:
                tell_finished(job, journal, task.attack, time.perf_counter() - started)

        if helpers is not None and len(tasks) > 1:
            helpers.share(job, tasks, predict, device, begin, keep)
            return
        batches = stream(job.data, [job.examples(task) for task in tasks], device)
        with measuring(predict, device), closing(batches):
            for task, (x, y) in zip(tasks, batches, strict=True):
                begin(task)
                keep(task, job.run(task, predict, x, y)[0])


def tell_finished(job: Job, journal: Journal, name: str, seconds: float) -> None:
    """Tell that all batches of an attack are done, and in the journal."""
    results = [journal.get(task) for task in job.tasks([name])]
    robust = [held for result in results if result is not None for held in result["robust"]]
    tell_attack(name, sum(robust) / len(robust), job.setting.threat, seconds)


def tell_attack(name: str, share: float, threat: ThreatModel, seconds: float) -> None:
    """Tell that an attack is done: `share` of the images withstood it, `seconds` after the first attack began."""
    at = radius(threat.eps, threat.norm)
    line = f"{name}  {percent(share)} % robust at eps {at}  {duration(seconds)} since the attacks began"
    tell(line, "attack", name=name, eps=threat.eps, robust_accuracy=share, seconds=round(seconds, 1))


# Several processes


class Helpers:
    """Processes that share the tasks of the attacks `names` of `job` with this one.

    Each runs at one of `places` and loads the classifier by `load`. Starting takes them seconds, for which this process
    need not wait.
    """

    def __init__(self, load: Load, places: Sequence[Place], job: Job, names: Sequence[str]) -> None:
        tasks = list(job.tasks(names))
        self.number_of = {task: number for number, task in enumerate(tasks)}
        self.task_of = tasks
        self.pool = Pool(_attacking, (load, job, tasks), places)
        try:
            while self.pool.start():
                pass
        except BaseException:
            self.pool.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        self.pool.close()

    def share(
        self, job: Job, tasks: list[BatchTask], predict: Predict, device: torch.device,
        begin: Callable[[BatchTask], None], keep: Callable[[BatchTask, Result], None],
    ) -> None:  # fmt: skip
        """Do `tasks`, with the plan of `job`, in this process, which has `predict` on `device`, and in the others.

        `begin` is called with each task that this process begins, `keep` with every result. A task that a process has
        not finished when it dies is done by another. Raises the error of any process.
        """
        shared = _Shared(tasks, keep)
        desk = _Desk(self, job.plan, shared)
        desk.start()
        try:
            with measuring(predict, device):
                while (task := shared.next()) is not None:
                    begin(task)
                    x, y = take(job.data, job.examples(task), device)
                    shared.done(task, job.run(task, predict, x, y)[0])
        finally:
            desk.stopped = True
            desk.join()


class _Shared:
    """Tasks that several processes do: those that wait, and those that have begun."""

    def __init__(self, tasks: Iterable[BatchTask], keep: Callable[[BatchTask, Result], None]) -> None:
        self.waiting, self.begun = deque(tasks), set[BatchTask]()
        self.keep, self.changed = keep, threading.Condition()
        self.error: Exception | None = None

    def next(self) -> BatchTask | None:
        """Wait for a task and take it; None once all are done. Raises the error of another process."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or not self.begun or self.error)
            if self.error is not None:
                raise self.error
            return self.taken()

    def taken(self) -> BatchTask | None:
        """Take a waiting task, None where there is none."""
        with self.changed:
            if not self.waiting:
                return None
            task = self.waiting.popleft()
            self.begun.add(task)
            return task

    def done(self, task: BatchTask, result: Result) -> None:
        """Store the result of a task."""
        with self.changed:
            self.keep(task, result)
            self.begun.remove(task)
            self.changed.notify()

    def lost(self, task: BatchTask) -> None:
        """Put a task back, as the process that was at it has died."""
        with self.changed:
            self.begun.remove(task)
            self.waiting.appendleft(task)
            self.changed.notify()

    def failed(self, error: Exception) -> None:
        """Raise `error` in `next`."""
        with self.changed:
            self.error = error
            self.changed.notify()


class _Desk(threading.Thread):
    """Gives the other processes their tasks and stores their results, while this one is at work, until `stopped`."""

    def __init__(self, helpers: Helpers, plan: RoutedPlan | None, shared: _Shared) -> None:
        super().__init__(daemon=True)
        self.helpers, self.plan, self.shared = helpers, plan, shared
        self.stopped = False

    def run(self) -> None:
        """Serve."""
        pool, shared = self.helpers.pool, self.shared
        try:
            while len(pool) and not self.stopped:
                while pool.idle and (task := shared.taken()) is not None:
                    if not pool.give((self.plan, self.helpers.number_of[task])):
                        shared.lost(task)
                for answer in pool.answers(seconds=0.1):
                    task = None if answer.order is None else self.helpers.task_of[answer.order[1]]
                    if isinstance(answer.error, Died):
                        self._lost(task, answer.error)
                    elif answer.error is not None:
                        raise answer.error
                    elif task is not None:
                        shared.done(task, answer.result)
        except Exception as problem:  # an error in another process; a full disk
            shared.failed(problem)

    def _lost(self, task: BatchTask | None, died: Died) -> None:
        if task is None:
            return
        if died.exit_code:
            tell(f"note  a worker process died (exit code {died.exit_code}): what it had not finished is done again")
        self.shared.lost(task)


@contextmanager
def _attacking(
    place: Place, load: Load, job: Job, tasks: list[BatchTask]
) -> Iterator[Callable[[tuple[RoutedPlan | None, int]], Result]]:  # pragma: no cover - runs in a process of its own
    """In a process of its own: the function that does a task, by its number, with a plan."""
    device = torch.device(place.device)
    predict = load(device)
    with measuring(predict, device):

        def attack(order: tuple[RoutedPlan | None, int]) -> Result:
            plan, number = order
            x, y = take(job.data, job.examples(tasks[number]), device)
            return replace(job, plan=plan).run(tasks[number], predict, x, y)[0]

        yield attack

"""Attacks over a data set: in batches that are tasks of their own, kept as they finish, shared by processes.

Axes: `N` examples. A batch is fixed by the position of its first example and draws its seeds from it, so that neither
the number of processes nor an interruption changes a result. (The threads of a process may: convolutions of small
batches round differently, and an attack's signs amplify it.)
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing

from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import RoutedPlan
from advmoe.evaluation.scoring import Counted, EvaluationData, Outcome, measuring, run_attack, size, stream, take
from advmoe.evaluation.suite import Setting, build
from advmoe.files import read_object, write_text
from advmoe.progress import bar, tell

Load = Callable[[torch.device], Predict]
"""Makes the classifier, on a device; each process calls it once."""
Result = dict[str, Any]
"""What one task found, as plain values."""


@dataclass(frozen=True)
class Task:
    """One attack on one batch."""

    attack: str
    first: int
    """The position of the batch's first example."""

    @property
    def file(self) -> str:
        """The name that its result is kept under."""
        return f"{re.sub('[^a-z0-9-]', '_', self.attack)}.{self.first}.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a process needs besides the model."""

    data: EvaluationData
    setting: Setting
    batch_size: int
    seed: int
    plan: RoutedPlan | None = None

    def tasks(self, names: Iterable[str]) -> Iterator[Task]:
        """Every task of the attacks `names`, one attack after another."""
        return (Task(name, first) for name in names for first in range(0, size(self.data), self.batch_size))

    def examples(self, task: Task) -> slice:
        """The positions of a task's examples."""
        return slice(task.first, task.first + self.batch_size)

    def run(self, task: Task, predict: Predict, x: Tensor, y: Tensor) -> tuple[Result, Outcome]:
        """Do one task, on its images `x` (N, C, H, W) of classes `y`. The model must be as `measuring` sets it."""
        counted = Counted(predict)
        attack = build(task.attack, counted, self.setting, self.plan)
        outcome = run_attack(attack, counted, x, y, threat=self.setting.threat, purpose=(self.seed, task.first))
        result = {
            "robust": outcome.robust.int().tolist(), "predicted": outcome.predicted.tolist(), "parts": outcome.parts,
            "flags": outcome.flags, "seconds": outcome.seconds, "settings": dict(attack.settings),
            "model_calls": {"forward": counted.forward, "gradient": counted.gradient},
        }  # fmt: skip
        return result, outcome


@dataclass
class Journal:
    """Results by task: in memory, and in a directory where there is one, each file written whole."""

    path: Path | None = None
    kept: dict[Task, Result] = field(default_factory=dict)

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Begin, or with `resume` continue what an interrupted evaluation left here.

        Returns the plan that was stored with it, if any. Raises `ValueError` where it had other settings.
        """
        if self.path is None:
            return None
        head = self.path / "evaluation.json"
        if resume and head.exists():
            stored = read_object(head)
            if not isinstance(known := stored.get("fingerprint"), dict):
                raise ValueError(f"{head} must hold the settings that --resume continues (fingerprint), got {known!r}")
            for name, value in json.loads(json.dumps(fingerprint)).items():
                if known.get(name) != value:
                    rule = f"repeat the settings of the evaluation that it continues ({name})"
                    raise ValueError(f"--resume must {rule}: {known.get(name)}, got {value}")
            return stored
        self.remove()
        self.path.mkdir(parents=True)
        write_text(head, json.dumps({"fingerprint": fingerprint}))
        return None

    def note(self, **values: Any) -> None:
        """Store `values` beside the fingerprint."""
        if self.path is not None:
            head = self.path / "evaluation.json"
            write_text(head, json.dumps(read_object(head) | values))

    def get(self, task: Task) -> Result | None:
        """The result of a task, if it is done; one that is damaged is not."""
        if task not in self.kept and self.path is not None and (file := self.path / task.file).exists():
            with suppress(ValueError):
                self.kept[task] = read_object(file)
        return self.kept.get(task)

    def holds(self, task: Task) -> bool:
        """Whether there is a file of the task's, sound or not."""
        return self.path is not None and (self.path / task.file).exists()

    def put(self, task: Task, result: Result) -> None:
        """Keep a result."""
        self.kept[task] = result
        if self.path is not None:
            write_text(self.path / task.file, json.dumps(result))

    def remove(self) -> None:
        """Delete the directory, once the results stand elsewhere or are not wanted."""
        if self.path is not None and self.path.exists():
            shutil.rmtree(self.path)


def run_tasks(
    job: Job, names: Iterable[str], predict: Predict, journal: Journal, device: torch.device,
    helpers: Helpers | None = None,
) -> None:  # fmt: skip
    """Do the tasks that `journal` lacks, in this process, which has the classifier `predict` on `device`, and in those
    of its `helpers`.
    """
    tasks = [task for task in job.tasks(names) if journal.get(task) is None]
    with bar("attack", len(tasks), unit="batch") as drawn:

        def begin(task: Task) -> None:
            drawn.set_description(task.attack)

        def keep(task: Task, result: Result) -> None:
            journal.put(task, result)
            drawn.update()

        if helpers is not None and len(tasks) > 1:
            helpers.share(job, tasks, predict, device, begin, keep)
            return
        batches = stream(job.data, [job.examples(task) for task in tasks], device)
        with measuring(predict, device), closing(batches):
            for task, (x, y) in zip(tasks, batches, strict=True):
                begin(task)
                keep(task, job.run(task, predict, x, y)[0])


# Several processes


class Helpers:
    """Processes that each `load` the classifier, on a device of `places`, and share the tasks `names` of `job`, or
    those of them that are left to do, with this one.

    To start takes them seconds, which this process need not wait for. None is left after `close`.
    """

    def __init__(
        self, load: Load, places: list[torch.device], threads: int | None, job: Job, names: Sequence[str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks = list(job.tasks(names))
        self.following, self.done = context.Value("q", 0), context.Queue()
        self.orders, self.processes = [], []
        try:
            for place in places:
                theirs, ours = context.Pipe(duplex=False)
                # The images here and not in the order: only a process that starts takes memory over without a socket.
                arguments = (load, place, threads, job, self.tasks, theirs, self.following, self.done)
                process = context.Process(target=_work, args=arguments, daemon=True)
                self.processes.append(process)
                process.start()
                theirs.close()
                self.orders.append(ours)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            if process.pid is not None:
                process.terminate()
                process.join()

    def share(
        self, job: Job, tasks: list[Task], predict: Predict, device: torch.device, begin: Callable[[Task], None],
        keep: Callable[[Task, Result], None],
    ) -> None:  # fmt: skip
        """Do `tasks`, with the plan of `job`, in this process, which has `predict` on `device`, and in the others.

        `begin` hears of what this one begins, `keep` gets all results as they come. What a process that dies has not
        finished is done again here; an error in one is raised.
        """
        number_of = {task: number for number, task in enumerate(self.tasks)}
        for order in self.orders:
            with suppress(BrokenPipeError):  # of one that has failed, and said why
                order.send((job.plan, [number_of[task] for task in tasks]))
        collector = _Collector(self, tasks, keep)
        collector.start()
        try:
            with measuring(predict, device):

                def do(task: Task) -> None:
                    begin(task)
                    x, y = take(job.data, job.examples(task), device)
                    collector.kept(task, job.run(task, predict, x, y)[0])

                while not collector.errors and (number := _claimed(len(tasks), self.following)) is not None:
                    do(tasks[number])
                collector.join()
                if collector.errors:
                    raise collector.errors[0]
                codes = [process.exitcode for process in self.processes if process.exitcode]
                if collector.left and codes:
                    tell(f"a worker process died (exit code {codes[0]}): what it had not finished is done again")
                for task in list(collector.left):
                    do(task)
        finally:
            collector.stopped = True
            collector.join()


class _Collector(threading.Thread):
    """Keeps what other processes find as they find it, while this one is at work: until nothing is left of `tasks`, an
    error has come, or none of them lives.
    """

    def __init__(self, helpers: Helpers, tasks: list[Task], keep: Callable[[Task, Result], None]) -> None:
        super().__init__(daemon=True)
        self.helpers, self.keep = helpers, keep
        self.left, self.lock = dict.fromkeys(tasks), threading.Lock()
        self.errors: list[Exception] = []
        self.stopped = False

    def kept(self, task: Task, result: Result) -> None:
        """Keep a result, from whichever process."""
        with self.lock:
            if task in self.left:
                self.keep(task, result)
                del self.left[task]

    def run(self) -> None:
        """Collect."""
        while self.left and not self.stopped:
            ended = all(process.exitcode is not None for process in self.helpers.processes)
            try:
                task, result, error = self.helpers.done.get(timeout=0.2)
            except queue.Empty:
                if ended:  # seen before the queue was empty
                    return
                continue
            if error is not None:
                self.errors.append(error)
                return
            try:
                self.kept(task, result)
            except Exception as problem:  # a full disk, say
                self.errors.append(problem)
                return


def _claimed(count: int, following: Any) -> int | None:
    """The number of the next task, of `count`, that no process has; None where there is none left."""
    with following.get_lock():
        number: int = following.value
        following.value += 1
    return number if number < count else None


def _work(
    load: Load, device: torch.device, threads: int | None, job: Job, tasks: list[Task], orders: Any, following: Any,
    done: Any,
) -> None:  # pragma: no cover - runs in a process of its own  # fmt: skip
    """Do tasks until none is left, or until the parent process is gone."""
    parent = os.getppid()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        predict = load(device)
        try:
            plan, numbers = orders.recv()
        except EOFError:  # the parent is gone
            return
        job = replace(job, plan=plan)
        with measuring(predict, device):
            while os.getppid() == parent and (number := _claimed(len(numbers), following)) is not None:
                task = tasks[numbers[number]]
                x, y = take(job.data, job.examples(task), device)
                done.put((task, job.run(task, predict, x, y)[0], None))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        done.put((None, None, error if isinstance(error, ValueError) else RuntimeError(f"in a worker: {error!r}")))


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """PyTorch's CPU threads inside, where a number is given; restored after."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Tasks done by several processes, each after those that it needs; a failed one is reported and what needs it skipped.

A worker imports PyTorch once and takes task after task. It ends itself when the process that started it is gone,
however that ended. Each has one thread unless asked otherwise, as the number of threads changes rounding:
so results do not depend on how many processes share the work.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from advmoe.errors import of_machine
from advmoe.progress import bar, unshared
from advmoe.signals import leave_to_parent
from advmoe.studies.plan import PlannedMeasure, Task
from advmoe.text import one_line

Told = Callable[[str, Task], None]
"""Called with `starts`, `done` or an error's text, and the task, as it happens."""


class MachineFailed(str):
    """What went wrong with a task, where the machine is to blame: done again once that is mended, it may go well."""


def run_tasks(
    tasks: Mapping[str, Task],
    errors: Mapping[str, str],
    *,
    jobs: int,
    threads: int,
    accelerator: str,
    logs: Path,
    told: Told,
) -> dict[str, str]:
    """Do those of `tasks` that are not finished, `jobs` at a time; those that must run alone come last, one by one.

    Args:
        tasks: by id, each after those that it needs. errors: of tasks that failed before, by id: not tried again.
        threads: of each process. logs: folder of the workers' output.

    Returns `errors` with those of the tasks that failed now, or were skipped; see `MachineFailed`.
    """
    errors = dict(errors)
    todo = {name: task for name, task in tasks.items() if name not in errors and task.state() != "finished"}
    alone = {name: task for name, task in todo.items() if isinstance(task, PlannedMeasure) and task.alone}
    together = {name: task for name, task in todo.items() if name not in alone}
    with bar("study", len(todo), unit="task") as drawn:

        def counted(word: str, task: Task) -> None:
            told(word, task)
            if word != "starts":
                drawn.update()

        for part, number in ((together, jobs), (alone, 1)):
            if part:
                _Pool(min(number, len(part)), threads, accelerator, logs).run(part, errors, counted)
    return errors


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    number: int
    task: Task | None = None


class _Pool:
    def __init__(self, jobs: int, threads: int, accelerator: str, logs: Path) -> None:
        self.jobs, self.settings, self.logs = jobs, (threads, accelerator), logs
        self.cards = _cards(accelerator)
        self.context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []

    def run(self, tasks: Mapping[str, Task], errors: dict[str, str], told: Told) -> None:
        waiting = dict(tasks)
        try:
            while waiting or any(worker.task for worker in self.workers):
                self._give(waiting, errors, told)
                busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
                for pipe in wait(list(busy), timeout=1.0):
                    assert isinstance(pipe, Connection)
                    self._take(busy[pipe], errors, told)
        finally:
            for worker in self.workers:
                worker.pipe.close()  # an idle process then ends by itself, and tidies up
                if worker.task is not None:
                    worker.process.kill()
            for worker in self.workers:
                worker.process.join()

    def _give(self, waiting: dict[str, Task], errors: dict[str, str], told: Told) -> None:
        """Start what can be started; drop what needs something that failed."""
        running = {worker.task.id for worker in self.workers if worker.task is not None}
        for name, task in list(waiting.items()):
            if broken := next((need for need in task.needs if need in errors), None):
                del waiting[name]
                errors[name] = f"skipped, as what it needs failed: {_cause(errors[broken])}"
                told(errors[name], task)
            elif not any(need in waiting or need in running for need in task.needs):
                worker = self._idle()
                if worker is None:
                    return
                del waiting[name]
                worker.task = task
                worker.pipe.send(task)
                running.add(name)
                told("starts", task)

    def _idle(self) -> _Worker | None:
        """A worker without a task, a new one where there may be more; None where all are busy."""
        # One may have been killed since its last task, for want of memory, say.
        self.workers = [each for each in self.workers if each.task is not None or each.process.is_alive()]
        idle = next((each for each in self.workers if each.task is None), None)
        return self._new() if idle is None and len(self.workers) < self.jobs else idle

    def _new(self) -> _Worker:
        self.logs.mkdir(parents=True, exist_ok=True)
        ours, theirs = self.context.Pipe()
        number = min(set(range(self.jobs)) - {each.number for each in self.workers})
        card = self.cards[number % len(self.cards)] if self.cards else None
        arguments = (theirs, self.logs / f"worker-{number}.log", card, *self.settings)
        process = self.context.Process(target=_work, args=arguments, daemon=False)
        process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours, number))
        return self.workers[-1]

    def _take(self, worker: _Worker, errors: dict[str, str], told: Told) -> None:
        """The end of a worker's task, or of the worker."""
        task = worker.task
        assert task is not None
        try:
            error = worker.pipe.recv()
        except (EOFError, ConnectionResetError):  # reset: it died before it had read its task
            worker.process.join()
            error = MachineFailed(f"its process died (exit code {worker.process.exitcode})")
            self.workers.remove(worker)
        worker.task = None
        if error is not None:
            errors[task.id] = error
        told(error or "done", task)


def _cause(error: str) -> str:
    return error.removeprefix("skipped, as what it needs failed: ")


def _cards(accelerator: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees; none where the CPU computes."""
    if accelerator == "cpu":
        return []
    import torch

    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or [str(number) for number in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def _work(pipe: Connection, log: Path, card: str | None, threads: int, accelerator: str) -> None:
    """Do the tasks that come through `pipe` and answer each with None or what went wrong, in one line. `card`: the
    one GPU that this process is to see.
    """
    leave_to_parent()
    unshared()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if card is not None:  # not a matter of `set_device`: whoever asks for one device gets the first that is seen
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    import torch

    from advmoe.studies.work import do

    torch.set_num_threads(threads)
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        error = None
        try:
            do(task, threads=threads, accelerator=accelerator)
        except Exception as problem:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            text = one_line(problem, 500)
            error = MachineFailed(text) if of_machine(problem) else text
        pipe.send(error)

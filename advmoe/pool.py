"""Worker processes that answer orders, each at its place: so many CPU threads, or one GPU.

A worker prepares once, which may take seconds, then answers order after order. It shares no lock with another, which
could be killed while it has it: each has its own pipe. It ends when the process that started it ends, for whatever
reason.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from advmoe.errors import portable
from advmoe.progress import unshared, warnings_told
from advmoe.signals import leave_to_parent


@dataclass(frozen=True)
class Place:
    """Where a worker computes."""

    threads: int | None = None
    """CPU threads; None: PyTorch's choice."""
    device: str = "cpu"
    """As PyTorch names it."""
    only_card: str | None = None
    """The one GPU that the worker sees, as CUDA_VISIBLE_DEVICES names it; `device` alone would leave it all of them."""
    log: Path | None = None
    """The file that its output goes to, in a folder that exists; None: where this process prints."""


Prepare = Callable[..., AbstractContextManager[Callable[[Any], Any]]]
"""`prepare(place, *arguments)` yields, in the worker, the function that answers orders: `order -> result`. Both are
pickled.
"""


class Died(Exception):
    """A worker's process ended, with this exit code, before it answered; `at_start`: before it was prepared."""

    def __init__(self, exit_code: int | None, at_start: bool = False, told: str | None = None) -> None:
        super().__init__(told or f"its process died (exit code {exit_code})")
        self.exit_code, self.at_start = exit_code, at_start


class Preempted(Exception):
    """Work was told to stop before its end, and kept what there is: tried again, it goes on."""


@dataclass(frozen=True)
class Answer:
    """The answer to an order: a result, or an error.

    The order is None where a worker ended without one, or could not be prepared.
    """

    order: Any
    result: Any = None
    error: Exception | None = None
    seconds: float | None = None
    """What it took, where that is less than the time since the order."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    place: Place
    ready: bool = False
    order: Any = None


class Pool:
    """Up to one worker at each of `places`; none is left after `close`. An engine: see `engines`."""

    given: str = "starts"
    """What an order does once it is given."""
    retries: int = 0
    """How often an order is given again whose process died."""

    def __init__(self, prepare: Prepare, arguments: Sequence[Any], places: Sequence[Place]) -> None:
        self._prepare, self._arguments, self._places = prepare, tuple(arguments), list(places)
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def __len__(self) -> int:
        return len(self._workers)

    def start(self) -> bool:
        """Start a worker at a place without one, and do not wait for it. False where all places have one."""
        free = list(self._places)
        for worker in self._workers:
            free.remove(worker.place)
        if not free:
            return False
        ours, theirs = self._context.Pipe()
        # Not daemonic: what it does may start processes in its turn. Arguments come now and not with an order, as only
        # a process that starts takes memory over without a socket.
        process = self._context.Process(target=_serve, args=(theirs, free[0], self._prepare, self._arguments))
        self._workers.append(_Worker(process, ours, free[0]))
        try:
            process.start()
        finally:
            theirs.close()
        return True

    def ready(self, number: int) -> None:
        """Start workers until there are `number`, or one at each place; do not wait for them."""
        while len(self) < number and self.start():
            pass

    def _idle(self) -> Iterator[_Worker]:
        # One may have been killed since its last answer, for want of memory, say.
        return (each for each in self._workers if each.ready and each.order is None and each.process.is_alive())

    @property
    def idle(self) -> bool:
        """Whether a worker is ready for an order."""
        return any(True for _ in self._idle())

    def give(self, order: Any) -> bool:
        """Give an order (not None) to an idle worker. False where none is idle."""
        worker = next(self._idle(), None)
        if worker is None:
            return False
        worker.order = order
        with suppress(BrokenPipeError):  # that it died is heard of next
            worker.pipe.send(order)
        return True

    def answers(self, seconds: float) -> Iterator[Answer]:
        """The answers that come within so many `seconds`. A worker that has ended leaves the pool."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(by_pipe), timeout=seconds):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            order = worker.order
            try:
                result, error = pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                worker.process.join()
                self._workers.remove(worker)
                yield Answer(order, error=Died(worker.process.exitcode, not worker.ready))
                continue
            if not worker.ready and error is not None:  # nothing was prepared: it ends, and gets no order
                worker.process.join()
                self._workers.remove(worker)
                yield Answer(None, error=error)
                continue
            first, worker.ready, worker.order = not worker.ready, True, None
            if not first:
                yield Answer(order, result, error)

    def close(self) -> None:
        """End the workers: an idle one ends by itself and tidies up, a busy one is killed."""
        for worker in self._workers:
            worker.pipe.close()
            if worker.process.pid is not None and (worker.order is not None or not worker.ready):
                worker.process.kill()
        for worker in self._workers:
            if worker.process.pid is not None:
                worker.process.join()
        self._workers.clear()


def _serve(
    pipe: Connection, place: Place, prepare: Prepare, arguments: tuple[Any, ...]
) -> None:  # pragma: no cover - runs in a process of its own
    """Prepare, say so, then answer order after order until the pipe is closed."""
    leave_to_parent()
    unshared()
    if place.log is not None:
        file = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(file, stream)
    if place.only_card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.only_card
    with suppress(BrokenPipeError):  # the parent is gone
        try:
            with warnings_told(), threads_set(place.threads), prepare(place, *arguments) as work:
                pipe.send((None, None))
                while (order := _ordered(pipe)) is not None:
                    result, problem = None, None
                    try:
                        result = work(order)
                    except Exception as error:
                        problem = _told(error, place)
                    pipe.send((result, problem))
        except Exception as error:
            pipe.send((None, _told(error, place)))


def _ordered(pipe: Connection) -> Any:  # pragma: no cover - runs in a process of its own
    """The next order; None where the pipe is closed."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _told(error: Exception, place: Place) -> Exception:  # pragma: no cover - runs in a process of its own
    if place.log is not None:
        traceback.print_exception(error)
        sys.stderr.flush()
    return portable(error, Preempted)


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """Inside, PyTorch has so many CPU threads; None changes nothing. Restored after."""
    import torch

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

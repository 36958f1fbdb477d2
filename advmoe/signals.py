"""How processes end: signals that end a command as Ctrl-C does, and children that never outlive their parent."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1")
"""Signals that ask a process to end, besides Ctrl-C's SIGINT; not every system has all. Clusters send the last."""


class Ended(KeyboardInterrupt):
    """A signal asked this process to end. Code that tidies up after Ctrl-C tidies up after this too."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def described(error: KeyboardInterrupt) -> tuple[str, int]:
    """How an interruption is told, and the exit code that a shell shows of it."""
    if isinstance(error, Ended):
        return f"ended by {signal.Signals(error.number).name}", 128 + error.number
    return "interrupted", 130


@contextmanager
def handled(
    names: Iterable[str], handler: Callable[[int, FrameType | None], None], *, unless: Callable[[Any], bool]
) -> Iterator[None]:
    """Inside, the main thread's signals of `names` that this system has go to `handler`, `unless` one has a handler
    that is to stay. Nothing in another thread, where none can be set.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        present = [number for name in names if (number := getattr(signal, name, None)) is not None]
        before = {number: known for number in present if not unless(known := signal.getsignal(number))}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, the signals of `NAMES` raise `Ended` in the main thread, once; those that are ignored (nohup) stay so.
    None is lost, nor is Ctrl-C.
    """

    def end(number: int, _: FrameType | None) -> None:
        for name in NAMES:  # a second one must not cut short what the first began
            if (other := getattr(signal, name, None)) is not None and signal.getsignal(other) is end:
                signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    with handled(NAMES, end, unless=lambda known: known != signal.SIG_DFL), not_lost():
        yield


@contextmanager
def not_lost() -> Iterator[None]:
    """Inside, `Ended` and Ctrl-C come again where Python discarded them: in callbacks of weak references, `__del__`."""
    usual, waiting = sys.unraisablehook, dict[signal.Signals, Any]()

    def again(number: int, _: FrameType | None) -> None:
        signal.signal(number, waiting.pop(signal.Signals(number)))
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):  # another came through, and what it began goes on
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)

    def discarded(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(error := lost.exc_value, KeyboardInterrupt):
            usual(lost)
            return
        number = signal.Signals(error.number if isinstance(error, Ended) else signal.SIGINT)
        waiting.setdefault(number, signal.getsignal(number))
        signal.signal(number, again)
        threading.Thread(target=_send, args=(number, waiting), daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = discarded
    try:
        yield
    finally:
        if sys.unraisablehook is discarded:
            sys.unraisablehook = usual
        while waiting:
            signal.signal(*waiting.popitem())


def _send(number: signal.Signals, waiting: Mapping[signal.Signals, Any]) -> None:
    """Send the main thread a signal, if it still waits, once that has left the code whose exceptions are discarded."""
    time.sleep(0.05)
    if number not in waiting:
        return
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(number)


def leave_to_parent(*, terminable: bool = False) -> None:
    """Have this process, a child by `multiprocessing`, ignore the signals that reach the whole group.

    They are for the parent, which kills the child, or terminates it where it is `terminable`. The child ends itself
    when the parent is gone, for whatever reason.
    """
    for name in ("SIGINT", "SIGHUP", *(() if terminable else ("SIGTERM",))):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

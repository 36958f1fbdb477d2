"""Progress bars with an ETA over long loops: on a terminal, and where whoever called asked for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

BRIEF = 1.0
"""Seconds that a loop inside another lasts before it is drawn."""

_delay: ContextVar[float | None] = ContextVar("advmoe_progress", default=None)
"""Seconds after which bars are drawn, None for not at all."""


@contextmanager
def shown(wanted: bool = True, *, delay: float = 0.0) -> Iterator[None]:
    """Inside, loops draw their bars once they have lasted `delay` seconds; with `wanted` false they draw none.

    Other threads and processes draw none unless they ask for it.
    """
    token = _delay.set(delay if wanted else None)
    try:
        yield
    finally:
        _delay.reset(token)


def unshared() -> None:
    """Give the bars of this process a lock of its own: a shared one would outlive a child that is killed."""
    tqdm.set_lock(threading.RLock())


def bar(what: str, total: int | None, *, unit: str, done: int = 0, **more: Any) -> tqdm[Any]:
    """A bar to be updated by hand, over `total` steps of which `done` are; quiet where stderr is no terminal.

    Once it is closed it stays where no other stands above it. `more`: as tqdm takes it.
    """
    delay = _delay.get()
    hidden = True if delay is None or total == 0 else None  # None: quiet unless on a terminal
    more = {"leave": None, **more, "delay": max(delay or 0.0, more.get("delay", 0.0))}
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, **more)


def tell(line: str) -> None:
    """Write a line to stderr, above the bars that are drawn there; nothing if stderr is closed."""
    with suppress(BrokenPipeError):
        tqdm.write(line, file=sys.stderr)


@contextmanager
def counting(what: str, total: int | None, *, unit: str, delay: float = 0.0) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each of `total` steps; the bar is gone after the last.

    Args:
        delay: seconds that must pass until the bar is drawn: `BRIEF` where the loop is inside another and mostly short.
    """
    if _delay.get() is None:  # tqdm would make a lock, which a worker that is ended leaves behind
        yield lambda: None
        return
    with bar(what, total, unit=unit, delay=delay, leave=False) as drawn:
        yield drawn.update


def tracked(
    items: Iterable[T], what: str, *, total: int | None = None, unit: str = "batch", delay: float = 0.0
) -> Iterator[T]:
    """`items`, counted by a bar as of `counting`; a single one is not. `total`: how many, where they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if total == 1:
        yield from items
        return
    with counting(what, total, unit=unit, delay=delay) as step:
        for item in items:
            yield item
            step()

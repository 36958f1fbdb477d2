"""Progress bars with an ETA over long loops: on a terminal, and where whoever called asked for them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

BRIEF = 1.0
"""Seconds that a loop inside another must last before it is drawn."""

_wanted: ContextVar[bool] = ContextVar("advmoe_progress", default=False)


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Loops inside draw their bars, or with `wanted` false none, as a loop does that would flicker. Other threads and
    processes draw none unless they ask for it.
    """
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def bar(what: str, total: int | None, *, unit: str, done: int = 0, **more: Any) -> tqdm[Any]:
    """A bar to be updated by hand, over `total` steps of which `done` are; quiet where stderr is no terminal.

    `more`: as tqdm takes it.
    """
    hidden = None if _wanted.get() else True  # None: quiet unless on a terminal
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, **more)


def tell(line: str) -> None:
    """Write a line to stderr, above the bars that are drawn there."""
    tqdm.write(line, file=sys.stderr)


def tracked(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "batch") -> Iterator[T]:
    """`items`, counted by a bar that is gone after the last. `total`: how many, where they have no length."""
    if not _wanted.get():  # tqdm would make a lock between processes, which those that are ended leave behind
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(what, total, unit=unit, delay=BRIEF, leave=False) as drawn:
        for item in items:
            yield item
            drawn.update()

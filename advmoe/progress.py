"""What long work tells while it runs, on stderr: bars with an ETA on a terminal, one in a notebook, a line a minute
elsewhere, and a line where a part of it is done.

`ADVMOE_LOG_FORMAT` says how, for this process and those that it starts: `text`, `json` (an object a line), or `quiet`
(notes alone).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from advmoe.text import duration

T = TypeVar("T")

LOG_FORMAT = "ADVMOE_LOG_FORMAT"
LOG_FORMATS = ("text", "json", "quiet")
MINUTE = 60.0
"""Seconds between two lines of one loop, where no bar can be drawn."""
WATCH = 1.0
"""Seconds between two looks at whether a minute is over, of a loop whose steps are longer."""
BRIEF = 1.0
"""Seconds that a loop inside another lasts before it is drawn."""

_delay: ContextVar[float | None] = ContextVar("advmoe_progress", default=None)
"""Seconds after which bars are drawn, None for not at all."""
_bars: WeakSet[tqdm[Any]] = WeakSet()
"""Those of a notebook; a hidden or closed one has `disable` set."""


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


def bar(what: str, total: int | None, *, unit: str, done: int = 0, **more: Any) -> tqdm[Any] | Lines:
    """A bar to be updated by hand, over `total` steps of which `done` are; a line a minute where stderr is no terminal.

    Once it is closed it stays where no other stands above it. `more`: as tqdm takes it.
    """
    delay, form = _delay.get(), log_format()
    hidden = delay is None or total == 0 or form == "quiet"
    if not hidden and (form == "json" or not drawable()):
        return Lines(what, total, unit=unit, done=done)
    if one := _notebook():  # no cursor moves up there: each step of a second bar would be a line more
        hidden = hidden or any(not each.disable for each in _bars)
    more = {"leave": None, **more, "delay": max(delay or 0.0, more.get("delay", 0.0))}
    made = tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden, **more)
    if one:
        _bars.add(made)
    return made


def outermost() -> bool:
    """Whether loops draw their bars at once: none of ours stands above them."""
    return _delay.get() == 0.0


def postfix(drawn: Any, text: Callable[[], str]) -> None:
    """Show `text()` behind the bar `drawn`, at most once a second: numbers on a GPU have the host wait for them."""
    now = time.monotonic()
    if getattr(drawn, "disable", True) or now - getattr(drawn, "postfix_shown", 0.0) < 1:
        return
    drawn.postfix_shown = now
    drawn.set_postfix_str(text(), refresh=False)


def drawable() -> bool:
    """Whether stderr is a terminal's or a notebook's, where a line can be drawn over.

    A notebook gives a command (`!advmoe ...`) a terminal as well, but keeps all that is drawn there.
    """
    return (sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ) or _notebook()


def _notebook() -> bool:
    return "ipykernel" in sys.modules and not sys.stderr.isatty()


def log_format() -> str:
    """One of `LOG_FORMATS`, by the environment."""
    asked = os.environ.get(LOG_FORMAT, "")
    return asked if asked in LOG_FORMATS else LOG_FORMATS[0]


class Lines:
    """A bar's stand-in where none can be drawn: a line a minute, however long a step is.

    Of several inside one another the outermost speaks, and names the innermost.
    """

    _open: ClassVar[list[Lines]] = []

    def __init__(self, what: str, total: int | None, *, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.first, self.n = what, total, unit, done, done
        self.started = self.told = time.monotonic()
        self._ended, self._telling = threading.Event(), threading.Lock()
        if not Lines._open:
            with suppress(RuntimeError):  # no thread is to be had: then steps alone tell
                threading.Thread(target=self._watch, daemon=True).start()
        Lines._open.append(self)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def set_description(self, what: str) -> None:
        """Say otherwise what is counted."""
        self.what = what

    def update(self, steps: float = 1) -> None:
        """Count `steps` more, and tell of it if it is time."""
        self.n += int(steps)
        if Lines._open[:1] == [self]:
            self._tell_if_due()

    def close(self) -> None:
        """End it."""
        self._ended.set()
        if self in Lines._open:
            Lines._open.remove(self)

    def _watch(self) -> None:
        while not self._ended.wait(WATCH):
            self._tell_if_due()

    def _tell_if_due(self) -> None:
        with self._telling:
            now = time.monotonic()
            if self._ended.is_set() or now - self.told < MINUTE:
                return
            self.told = now
        seconds, done = now - self.started, self.n - self.first
        fields: dict[str, Any] = {"what": self.what, "done": self.n, "total": self.total, "seconds": round(seconds, 1)}
        text = self._count()
        if (inner := Lines._open[-1:]) and inner != [self]:
            text += f" ({inner[0]._count()})"
            fields["inside"] = {"what": inner[0].what, "done": inner[0].n, "total": inner[0].total}
        text += f"  {duration(seconds)}"
        if self.total and done:
            text += f"  left {duration((self.total - self.n) * seconds / done)}"
        tell(text, "progress", **fields)

    def _count(self) -> str:
        counts = [self.n, *([self.total] if self.total else [])]
        if self.unit == "B":
            return f"{self.what}  {'/'.join(f'{each / 1e6:.1f}' for each in counts)} MB"
        return f"{self.what}  {'/'.join(map(str, counts))} {self.unit}"


LOUD = ("note", "warning", "failed", "error")
"""Events that those who want it quiet see too."""


def tell(line: str, event: str = "note", **fields: Any) -> None:
    """Write a line to stderr, above the bars that are drawn there; nothing if stderr is closed.

    As JSON it is an object with `event`, `fields` and, as `text`, the line; those that want it quiet see `LOUD` alone.
    """
    form = log_format()
    if form == "quiet" and event not in LOUD:
        return
    if form == "json":
        line = json.dumps({"event": event, **fields, "text": line}, allow_nan=False)
    with suppress(BrokenPipeError):
        tqdm.write(line, file=sys.stderr)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Inside, Python's warnings are objects like all else that is told, where these are JSON."""
    usual = warnings.showwarning
    if log_format() == "json":
        warnings.showwarning = _tell_warning
    try:
        yield
    finally:
        warnings.showwarning = usual


def _tell_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    tell(f"{category.__name__}: {message}", "warning")


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

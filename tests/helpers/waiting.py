"""Waiting for other processes."""

import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 300
"""Seconds after which a test gives up on a process."""


def until(true: Callable[[], bool]) -> None:
    """Return once `true()`; fails when it has not been within `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Whether the process of this number runs (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

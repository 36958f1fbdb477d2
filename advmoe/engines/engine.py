"""What every engine can do: it is given orders, and tells what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from advmoe.pool import Answer


class Engine(Protocol):
    """Does orders somewhere, several at once. Orders are tasks; `pool.Pool` takes other values too."""

    given: str
    """What an order does once it is given: `starts`, or is `queued`."""
    retries: int
    """How often an order is given again whose process died."""

    def ready(self, number: int) -> None:
        """Make room for as many orders at once, as far as there may be so many; do not wait for it."""

    def give(self, order: Any) -> bool:
        """Take an order. False where there is no room for one more now."""

    def answers(self, seconds: float) -> Iterator[Answer]:
        """What became of orders, as far as it is known within about so many `seconds`."""

    def close(self) -> None:
        """Let go of all that the engine has."""

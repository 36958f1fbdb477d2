"""How errors and lists are told on one line."""

from __future__ import annotations

from collections.abc import Iterable


def one_line(error: BaseException, most: int = 200) -> str:
    """Type and text of an error, of which `most` characters are shown."""
    text = " ".join(str(error).split())
    text = text if len(text) <= most else f"{text[:most]}..."
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def few(names: Iterable[str]) -> str:
    """Up to 3 of `names`, and how many more; nothing where there are none."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""How errors, lists and names are told on one line."""

from __future__ import annotations

import unicodedata
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


def printable(name: str) -> str:
    """A name as it can be shown anywhere: accented letters as one character each (NFC), and escapes (`\\xe9`) for bytes
    that are not UTF-8, control characters and line ends.
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(map(_shown, unicodedata.normalize("NFC", name)))


def _shown(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    if "\udc80" <= character <= "\udcff":  # a byte, as Python keeps it in names of files
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()

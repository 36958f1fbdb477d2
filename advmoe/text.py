"""How values, numbers, names and tables are written, for people to read."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Sequence

from advmoe.errors import InputError

MOST_OF_A_VALUE = 80
"""Characters that are shown of a value."""


def cut(text: str, most: int) -> str:
    """`text`, or its first `most` characters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}..."


class _Short(reprlib.Repr):
    """Looks at no more of a value than it shows: what is nested or shared can be far larger than its text was."""

    def __init__(self) -> None:
        super().__init__()
        # Its own ellipsis stands in the middle, beyond what is shown.
        self.maxlevel, self.maxstring, self.maxother = 4, 4 * MOST_OF_A_VALUE, 4 * MOST_OF_A_VALUE
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 10

    def repr_int(self, x: int, level: int) -> str:
        # Python itself makes no text of integers of thousands of digits.
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


_short = _Short()


def show(value: object, most: int = MOST_OF_A_VALUE) -> str:
    """What a message shows of a `value`: its `repr`, of which `most` characters."""
    return cut(_short.repr(value), most)


def one_line(error: BaseException, most: int = 200) -> str:
    """Type and text of an error, of which `most` characters are shown; of an `InputError` the text says all."""
    text = cut(" ".join(str(error).split()), most)
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def nearest(name: object, names: Iterable[str]) -> str:
    """A hint at the one of `names` that a mistyped `name` may have meant, to end a message with; empty without any."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7) if isinstance(name, str) else []
    return f" (did you mean {near[0]}?)" if near else ""


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


def percent(share: float | None, digits: int = 1, *, missing: str = "-") -> str:
    """A fraction in percent, without the sign: 0.583 is 58.3."""
    return missing if share is None else f"{100 * share:.{digits}f}"


def radius(eps: float, norm: str) -> str:
    """An attack's radius, as `--eps` takes it: in l-inf in grey levels of 255 where that is shorter, 8/255 but 0.1."""
    decimal = f"{eps:.6g}"
    return decimal if norm != "linf" else min(decimal, f"{255 * eps:.6g}/255", key=len)


def macs_unit(gmacs: Iterable[float | None]) -> tuple[str, float]:
    """The unit of numbers that stand together, MMACs where the largest would start with zeros, and its number in one
    GMAC.
    """
    largest = max((each for each in gmacs if each is not None), default=1.0)
    return ("GMACs", 1.0) if largest >= 0.1 else ("MMACs", 1000.0)


def macs(gmacs: float) -> str:
    """A number of multiply-accumulates with its unit: 0.56 GMACs, 31.2 MMACs."""
    unit, factor = macs_unit([gmacs])
    return f"{gmacs * factor:.3g} {unit}"


def duration(seconds: float) -> str:
    """A time as one reads it: 12.3 s, 4 min, 1 h 30 min."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def aligned(rows: Sequence[Sequence[str]], sides: str = "<") -> list[str]:
    """Rows of cells as lines, in columns two spaces apart.

    `sides` says where a column's text stands: `<` left, `>` right; the last one holds for the columns that follow.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = sides.ljust(len(widths), sides[-1])
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    ]

"""How values, numbers, names and tables are written, for people to read."""

from __future__ import annotations

import difflib
import reprlib
import textwrap
import traceback
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advmoe.errors import InputError

WIDTH = 80
"""Columns of a terminal that what is printed keeps to."""
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


def split_words(text: str) -> list[str]:
    """The words of a list separated by commas."""
    return [word for word in (part.strip() for part in text.split(",")) if word]


def one_line(error: BaseException, most: int = 200) -> str:
    """Type and text of an error, of which `most` characters are shown; of an `InputError` the text says all."""
    text = cut(" ".join(str(error).split()), most)
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def as_option(name: str) -> str:
    """An argument's `name` as the command line writes it: `--dry-run` for `dry_run`."""
    return f"--{name.replace('_', '-')}"


def in_file(error: BaseException, file: object) -> str:
    """An error and, where it passed through `file`, the last line there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{one_line(error)}{where}"


def nearest(name: object, names: Iterable[str]) -> str:
    """A hint at the one of `names` that a mistyped `name` may have meant, to end a message with; empty without any."""
    near = []
    if isinstance(name, str):
        near = difflib.get_close_matches(name, [each for each in names if each != name], n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def few(names: Iterable[str], most: int = 3) -> str:
    """Up to `most` of `names`, and how many more; nothing where there are none."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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


def by_layer(shares: Sequence[float]) -> str:
    """Fractions of layers 0, 1, ... in percent, neighbours of one value together: 0: 98.0, 1 to 3: 0.0."""
    told: list[tuple[int, int, str]] = []
    for layer, share in enumerate(map(percent, shares)):
        first = told.pop()[0] if told and told[-1][2] == share else layer
        told.append((first, layer, share))
    return ", ".join(f"{first if first == last else f'{first} to {last}'}: {share}" for first, last, share in told)


def radius(eps: float, norm: str) -> str:
    """An attack's radius, as `--eps` takes it: in l-inf in grey levels of 255 where that is shorter, 8/255 but 0.1."""
    decimal = f"{eps:.6g}"
    return decimal if norm != "linf" else min(decimal, f"{255 * eps:.6g}/255", key=len)


def passes(evaluation: Mapping[str, Any]) -> str:
    """A sentence on how many gradient passes an evaluation's masking gap is made of; empty where it does not say."""
    told = evaluation.get("gradient_passes")
    usual, worst = (told.get(name) for name in ("straight_through", "worst_case")) if isinstance(told, dict) else (0, 0)
    if not (isinstance(usual, int) and isinstance(worst, int) and worst):
        return ""
    return f"Gradient passes that a robust image withstood: {worst:,} in the worst case, {usual:,} under that PGD."


def complete(evaluation: Mapping[str, Any]) -> str:
    """A sentence where an attack left no pathway within reach out, else nothing."""
    reports = (evaluation.get("attacks") or {}).values()
    if all((report.get("settings") or {}).get("routing") != "complete" for report in reports):
        return ""
    return f"Every pathway within reach was attacked: {MISSED}, and the gap holds the flips that PGD missed."


MISSED = "what the worst case still misses is the prediction's"
"""Where the routing hides nothing."""


def macs_unit(gmacs: Iterable[float | None]) -> tuple[str, float]:
    """The unit of numbers that stand together, MMACs where the largest would start with zeros, and its number in one
    GMAC.
    """
    largest = max((each for each in gmacs if each is not None), default=1.0)
    return ("GMACs", 1.0) if largest >= 0.1 else ("MMACs", 1000.0)


def macs(gmacs: float) -> str:
    """A number of multiply-accumulates with its unit: 0.56 GMACs, 31.2 MMACs."""
    unit, factor = macs_unit([gmacs])
    return f"{gmacs * factor:.4g} {unit}"


def macs_column(
    columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """A table of `study.json` with its column `gmacs`, if it has one, in the unit of `macs_unit`, the paper's too."""
    cells = [cell for row in rows if isinstance(cell := row.get("gmacs"), Mapping)]
    unit, factor = macs_unit(cell.get("mean") for cell in cells)
    if factor == 1:
        return list(columns), list(rows)

    def scaled(row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(cell := row.get("gmacs"), Mapping):
            return row
        numbers = {name: cell[name] * factor for name in _OF_CELL if cell.get(name) is not None}
        return {**row, "gmacs": {**cell, **numbers}}

    heads = [{**each, "title": unit} if each["key"] == "gmacs" else each for each in columns]
    return heads, list(map(scaled, rows))


_OF_CELL = ("mean", "std", "paper", "paper_std")


def duration(seconds: float) -> str:
    """A time as one reads it: 12.3 s, 4 min, 1 h 30 min. Below three minutes seconds tell more."""
    if seconds < 180:
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


def wrapped(text: str, hang: str = "", width: int = WIDTH) -> list[str]:
    """`text` as lines of `WIDTH` columns, those after the first behind `hang`; words, as of a path, stay whole."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, width, subsequent_indent=hang, **options) or [""]  # type: ignore[arg-type]


def listing(rows: Sequence[Sequence[str]], sides: str = "<", *, indent: str = "") -> list[str]:
    """Rows of short cells and a text, which goes on below itself where it is longer than the line."""
    lines = []
    for line, row in zip(aligned(rows, sides), rows, strict=True):
        whole = indent + line
        hang = " " * (len(whole) - len(row[-1].rstrip()))
        lines += [whole] if len(whole) <= WIDTH or not row[-1] else wrapped(whole, hang)
    return lines


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "<", labels: int = 1) -> list[str]:
    """`rows` below `heads` as lines of at most `WIDTH` columns, as far as words allow.

    Where they are wider, first heads, then the cells of the first `labels` columns go on below themselves; then the
    other columns stand in several tables, each with the labels.
    """
    sides = sides.ljust(len(heads), sides[-1])
    columns = [list(column) for column in zip(heads, *rows, strict=True)]
    if _fits(columns):
        return aligned([heads, *rows], sides)
    for width in _HEADS:
        for column, head in zip(columns, heads, strict=True):
            column[0] = _narrow(head, max([width, *map(len, column[1:])]))
        if _fits(columns):
            break
    else:
        columns[:labels] = [[_narrow(cell, _LABEL) for cell in column] for column in columns[:labels]]
    lines: list[str] = []
    for part in _parts(columns, labels):
        lines += ["", *_stacked([columns[at] for at in part], "".join(sides[at] for at in part))]
    return lines[1:]


_HEADS = (24, 18, 12)
"""Columns of a head in a table that is too wide otherwise, as far as it must be."""
_LABEL = 24
"""Columns of a label where that is not enough."""


def _narrow(cell: str, width: int) -> str:
    """A cell as lines of `width` columns or its longest word."""
    return "\n".join(wrapped(cell, width=max([width, *map(len, cell.split())]) or 1))


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def _fits(columns: Sequence[Sequence[str]]) -> bool:
    return sum(_width(column) + 2 for column in columns) - 2 <= WIDTH


def _parts(columns: Sequence[Sequence[str]], labels: int) -> list[list[int]]:
    """Which columns stand together: the labels, and as many others as fit."""
    parts = [list(range(labels))]
    for at in range(labels, len(columns)):
        if len(parts[-1]) > labels and not _fits([columns[each] for each in (*parts[-1], at)]):
            parts.append(list(range(labels)))
        parts[-1].append(at)
    return parts


def _stacked(columns: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Rows whose cells have several lines, as lines; heads end with their last line, others begin with their first."""
    lines: list[list[str]] = []
    for number, row in enumerate(zip(*columns, strict=True)):
        cells = [cell.split("\n") for cell in row]
        height = max(map(len, cells))
        padded = [[""] * (height - len(c)) + c if number == 0 else c + [""] * (height - len(c)) for c in cells]
        lines += [list(line) for line in zip(*padded, strict=True)]
    return aligned(lines, sides)

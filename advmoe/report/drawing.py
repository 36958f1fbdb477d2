"""What all figures share: colours, style, and a file written whole.

A figure is a pure function of its data: the same file, byte for byte, from the same data and version of matplotlib
(and, where names need other fonts than its own, from the same fonts).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from advmoe.errors import InputError
from advmoe.files import write_whole
from advmoe.report.fonts import fallback_fonts
from advmoe.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart under every common colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
LINES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
MARKS = "osD^vPX*"  # one more than colours, so that a series looks like none before it
# Black is a line's colour alone: a dark page turns it, and what stands on it would be lost.
EXPERTS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#F0E442", "#882255")
LIGHT = {ORANGE, SKY, PURPLE, "#F0E442"}
"""Colours on which text is dark."""
GREY = "#595959"
# What stands on a coloured part keeps its colour where a dark page turns black axes and text white.
INK, PAPER = "#010101", "#FEFEFE"

WIDTH = 4.6
"""Inches: a phone shows the whole width of a figure, its ten-point text still readable; two stand on a page's width."""

LEGEND_ROW = 0.2
"""Inches."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "hatch.linewidth": 0.8,
    "text.parse_math": False,  # names may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
    "svg.hashsalt": "advmoe",
}


def require_fields(result: Mapping[str, Any], fields: tuple[str, ...], what: str) -> None:
    """Raise `ValueError` where `result`, shown as `what`, lacks one of `fields`."""
    missing = [name for name in fields if not isinstance(result, Mapping) or name not in result]
    if missing:
        raise InputError(f"result must be a {what} with {', '.join(fields)}, got one without {', '.join(missing)}")


def require_matplotlib() -> None:
    """Raise `ValueError`, which names the extra, where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("figures need matplotlib (pip install 'advmoe[figures]'), got none installed") from None


@contextmanager
def drawn(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure (inches), written to `path` once it is drawn; no settings are left behind."""
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"path must end in .svg or .png, got {str(path)!r}")
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    kind = path.suffix.lower()[1:]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        content = io.BytesIO()
        with fallback_fonts(figure):
            figure.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, lambda partial: partial.write_bytes(content.getvalue()))


def nan_or(value: Any) -> float:
    """A number, NaN for None: a gap in a drawing."""
    return math.nan if value is None else float(value)


def wrapped(text: str, width: int) -> str:
    """A text on lines of at most `width` characters."""
    text = printable(text)
    return "\n".join(textwrap.wrap(text, max(8, width))) or text


def finish(axes: Axes, title: str | None, *, legend: bool) -> None:
    """Title at the left; the legend below the axes, where it hides nothing, in as many columns as its names allow; the
    figure grows with it, so that the axes keep their height.
    """
    if title is not None:
        axes.set_title(wrapped(title, 52), loc="left", fontsize=11)
    if legend:
        handles, names = axes.get_legend_handles_labels()
        names = [wrapped(name, 46) for name in names]
        longest = max((len(line) for name in names for line in name.splitlines()), default=1)
        columns = max(1, min(len(names), 52 // (longest + 6)))
        figure = cast("Figure", axes.get_figure())
        rows = -(-sum(1 + name.count("\n") for name in names) // columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (rows - 1))
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)

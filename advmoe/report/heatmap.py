"""Heat maps: a table of numbers as colours. They need the extra `figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.errors import InputError
from advmoe.report.drawing import INK, PAPER, WIDTH, drawn, finish, nan_or
from advmoe.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize


def heatmap_figure(
    table: Mapping[str, Any],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    spread: bool = False,
    title: str | None = None,
) -> None:
    """Draw a table of numbers as colours, with the numbers themselves while they are few.

    The scale runs from 0 to 1 where all values lie there, so that pictures compare; else over the values.

    Args:
        table: {"rows": names, "columns": names, "values": a row for each of `rows`, a number (None: unknown, left grey)
            for each of `columns`}. With "members", names too, every column is a group of so many, set apart.
        path: file to write, .svg or .png.
        xlabel, ylabel, title: texts.
        spread: let the scale run over the values in any case.

    Raises `ValueError` too where the names do not fit the values.
    """
    values, row_names, column_names = table["values"], table["rows"], table["columns"]
    group = len(table.get("members") or [1])
    _require_named(values, len(row_names), group * len(column_names))
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    numbers = [[nan_or(value) for value in row] for row in values]
    known = [value for row in numbers for value in row if not math.isnan(value)] or [0.0]
    unit = min(known) >= 0 and max(known) <= 1
    scale = Normalize(0, 1) if unit and not spread else Normalize(min(known), max(known))
    rows, columns = len(numbers), len(numbers[0])
    numbered = columns <= 14 and rows <= 24
    lines: dict[str, Any] = (
        {"edgecolors": PAPER, "linewidth": 0.6} if rows * columns <= 400 else {"edgecolors": "face", "linewidth": 0}
    )
    width = min(9.0, max(WIDTH, (0.36 if numbered else 0.24) * columns + 1.6))
    with drawn(path, width, min(9.0, max(2.2, 0.28 * rows + 1.3))) as figure:
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(
            numbers, norm=scale, cmap=colormaps["cividis"], rasterized=rows * columns > 2500, **lines
        )
        axes.set_facecolor("#BBBBBB")
        if numbered:
            _number_cells(axes, numbers, scale, ".2f" if unit else ".3g")
        for at in range(group, columns, group) if group > 1 else ():
            axes.axvline(at, color=PAPER, linewidth=3)
        _name_side(axes, "x", column_names, 30, group)
        _name_side(axes, "y", row_names, 40)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(mesh, ax=axes, shrink=0.85, aspect=18).outline.set_visible(False)
        finish(axes, title, legend=False)


def _require_named(values: Sequence[Sequence[Any]], rows: int, columns: int) -> None:
    widths = sorted({len(row) for row in values})
    if (len(values), widths) != (rows, [columns]) or not rows * columns:
        rule = f"values must be {rows} x {columns}, as the names are, and not empty"
        raise InputError(f"{rule}, got {len(values)} x {widths}")


def _number_cells(axes: Axes, numbers: Sequence[Sequence[float]], scale: Normalize, form: str) -> None:
    """Each cell's number, in the colour that can be read on it."""
    for r, row in enumerate(numbers):
        for c, value in enumerate(row):
            if not math.isnan(value):
                ink = INK if scale(value) > 0.55 else PAPER
                axes.text(c + 0.5, r + 0.5, format(value, form), ha="center", va="center", fontsize=8, color=ink)


def _name_side(axes: Axes, side: str, names: Sequence[str], most: int, group: int = 1) -> None:
    """The names of one side's cells, or of groups of them; every so-manieth where all of them would be too many."""
    step = math.ceil(len(names) / most)
    shown = [_short(str(name)) for name in names[::step]]
    places = [(at + 0.5) * group for at in range(0, len(names), step)]
    if side == "y":
        axes.set_yticks(places, shown)
    else:
        long = max(map(len, shown)) > 3 and len(shown) > 6
        axes.set_xticks(places, shown, rotation=40 if long else 0, ha="right" if long else "center")


def _short(text: str, most: int = 22) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"

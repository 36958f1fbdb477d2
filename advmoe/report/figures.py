"""Pictures of plain data: lines, bars, shares, histograms and heat maps. They need the extra `figures`.

Every function takes data as dictionaries and lists, as JSON holds them, and a path ending in .svg or .png; it raises
`ValueError` without matplotlib, for another suffix, and for data that hold nothing to draw. Heights are drawn in the
unit they come in; what is called a share is a fraction and is shown in percent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.report.drawing import GREY, INK, LINES, MARKS, PAPER, WIDTH, drawn, require_matplotlib
from advmoe.report.result_figures import dissection_figure, sweep_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "bars_figure", "dissection_figure", "heatmap_figure", "histogram_figure", "lines_figure", "require_matplotlib",
    "stacked_figure", "sweep_figure",
]  # fmt: skip

_HATCHES = ("", "////", "....", "xxxx")


def lines_figure(
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    references: Sequence[tuple[str, float]] = (),
) -> None:
    """Draw a line for each series, with its interval where points have one.

    Args:
        series: name to points {"x", "y", "low", "high"}; a point whose y is None leaves a gap, low and high may be
            missing or None.
        path: file to write, .svg or .png.
        xlabel, ylabel, title: texts.
        references: (name, y) of dashed horizontal lines, as for another's published numbers.
    """
    _require_some(series, "series")
    with drawn(path, WIDTH, 3.3) as figure:
        axes = figure.add_subplot()
        for (name, points), colour, mark in zip(series.items(), cycle(LINES), cycle(MARKS), strict=False):
            places = [float(point["x"]) for point in points]
            heights = [_number(point.get("y")) for point in points]
            many = len(points) > 25
            axes.plot(places, heights, color=colour, marker="" if many else mark, markersize=5, label=name)
            _spread(axes, places, points, colour, band=len(points) > 12)
        for (name, height), colour in zip(references, cycle([GREY, *LINES]), strict=False):
            axes.axhline(height, color=colour, linestyle="--", linewidth=1.2, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="y")
        places = sorted({float(point["x"]) for points in series.values() for point in points})
        if all(place.is_integer() for place in places):
            if len(places) <= 8:
                axes.set_xticks(places, [f"{place:.0f}" for place in places])
            else:
                axes.locator_params(axis="x", integer=True)
        _finish(axes, title, legend=len(series) + len(references) > 1)


def _spread(axes: Axes, places: list[float], points: Sequence[Mapping[str, Any]], colour: str, *, band: bool) -> None:
    """The interval of each point that has one: a band where points are many, else whiskers."""
    low, high = (
        [math.nan if point.get("y") is None else _number(point.get(end)) for point in points] for end in ("low", "high")
    )
    if all(math.isnan(each) for each in [*low, *high]):
        return
    if band:
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.vlines(places, low, high, color=colour, linewidth=1.2)
        for end in (low, high):
            axes.plot(places, end, color=colour, marker="_", markersize=7, linestyle="", label="_")


def bars_figure(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | Path, *, ylabel: str, title: str | None = None
) -> None:
    """Draw bars side by side in groups, with intervals where there are any and, while they are few, their heights.

    Args:
        groups: group to {bar's name: {"y", "low", "high"}}; low and high may be missing or None, and a group may lack
            some of the bars.
        path: file to write, .svg or .png.
        ylabel, title: texts.
    """
    _require_some(groups, "groups")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    crowded = len(groups) * len(names)
    width = 0.8 / len(names)
    inches = min(9.0, max(WIDTH, 0.28 * crowded + 1))
    with drawn(path, inches, 3.3) as figure:
        axes = figure.add_subplot()
        for number, (name, colour) in enumerate(zip(names, cycle(LINES), strict=False)):
            places = [at + (number - (len(names) - 1) / 2) * width for at in range(len(groups))]
            points = [bars.get(name, {}) for bars in groups.values()]
            heights = [_number(point.get("y")) for point in points]
            hatch = _HATCHES[number // len(LINES) % len(_HATCHES)]
            axes.bar(places, heights, 0.92 * width, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0, label=name)
            _whiskers(axes, places, points)
            if crowded <= 20:
                _number_bars(axes, places, points)
        axes.set(ylabel=ylabel, xticks=range(len(groups)), xlim=(-0.5, len(groups) - 0.5))
        axes.set_xticklabels([_wrapped(group, int(10 * inches / len(groups))) for group in groups])
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.12)
        axes.grid(axis="y")
        _finish(axes, title, legend=len(names) > 1)


def _whiskers(axes: Axes, places: list[float], points: Iterable[Mapping[str, Any]]) -> None:
    for at, point in zip(places, points, strict=True):
        low, high = _number(point.get("low")), _number(point.get("high"))
        if not math.isnan(low + high):
            axes.plot([at, at], [low, high], color=GREY, linewidth=1.4, marker="_", markersize=6)


def _number_bars(axes: Axes, places: list[float], points: Iterable[Mapping[str, Any]]) -> None:
    """The height of each bar, above it and above its interval."""
    for at, point in zip(places, points, strict=True):
        if point.get("y") is not None:
            top = max(float(point["y"]), float(point.get("high") or -math.inf), 0.0)
            text, place = f"{point['y']:.3g}", (at, top)
            axes.annotate(text, place, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8.5, color=GREY)


def stacked_figure(
    rows: Mapping[str, Mapping[str, float]], path: str | Path, *, xlabel: str, title: str | None = None
) -> None:
    """Draw one horizontal bar a row, made of its parts, in percent.

    Args:
        rows: bar's name to {part: share}; shares are fractions, and a row may lack some of the parts.
        path: file to write, .svg or .png.
        xlabel, title: texts.
    """
    _require_some(rows, "rows")
    parts = list(dict.fromkeys(part for shares in rows.values() for part in shares))
    with drawn(path, WIDTH, 1.3 + 0.42 * len(rows) + 0.2 * math.ceil(len(parts) / 3)) as figure:
        axes = figure.add_subplot()
        left = [0.0] * len(rows)
        for number, (part, (colour, ink)) in enumerate(zip(parts, _fills(len(parts)), strict=True)):
            widths = [100 * float(shares.get(part) or 0) for shares in rows.values()]
            hatch = _HATCHES[number // len(LINES) % len(_HATCHES)] if len(parts) <= 2 * len(LINES) else ""
            drawn_bars = axes.barh(
                range(len(rows)), widths, 0.72, left=left, color=colour, hatch=hatch, label=part, edgecolor=PAPER,
                linewidth=0.6,
            )  # fmt: skip
            axes.bar_label(
                drawn_bars, [f"{width:.0f}" if width >= 7 else "" for width in widths], label_type="center", color=ink,
                fontsize=8.5,
            )  # fmt: skip
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [_wrapped(row, 20) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=xlabel, xlim=(0, max(100.0, max(left))))
        _finish(axes, title, legend=True)


def _fills(count: int) -> list[tuple[str, str]]:
    """Colours of `count` parts, each with the colour of the number on it."""
    light = {"#E69F00", "#56B4E9", "#CC79A7"}
    return [(LINES[k % len(LINES)], INK if LINES[k % len(LINES)] in light else PAPER) for k in range(count)]


def histogram_figure(
    series: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    bins: int | None = None,
    title: str | None = None,
) -> None:
    """Draw distributions over one another, each as an outline filled lightly, in percent.

    Args:
        series: name to {"edges": B + 1 ascending numbers, "shares": B fractions}.
        path: file to write, .svg or .png.
        xlabel, ylabel, title: texts.
        bins: at most so many bins are drawn: neighbours are joined, equally many everywhere (None: all).

    Raises `ValueError` too where a series' edges are not one more than its shares.
    """
    _require_some(series, "series")
    for name, each in series.items():
        if len(each["edges"]) != len(each["shares"]) + 1:
            got = f"{len(each['edges'])} and {len(each['shares'])}"
            raise ValueError(f"series must have one more edge than shares, got {got} in {name!r}")
    with drawn(path, WIDTH, 3.3) as figure:
        axes = figure.add_subplot()
        styles = zip(cycle(LINES), cycle(["-", "--", ":", "-."]), strict=False)
        for (name, each), (colour, dashes) in zip(series.items(), styles, strict=False):
            edges, shares = _joined(each["edges"], each["shares"], bins)
            heights = [100 * share for share in shares]
            axes.stairs(heights, edges, color=colour, linewidth=1.8, linestyle=dashes, label=name)
            axes.stairs(heights, edges, color=colour, alpha=0.18, fill=True, label="_")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        _finish(axes, title, legend=len(series) > 1)


def _joined(edges: Sequence[float], shares: Sequence[float], bins: int | None) -> tuple[list[float], list[float]]:
    """Neighbouring bins joined, equally many everywhere, until at most `bins` are left."""
    have = len(shares)
    if bins is not None and bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    step = next(k for k in range(1, have + 1) if have % k == 0 and (bins is None or have // k <= bins)) if have else 1
    return list(edges[::step]), [sum(shares[at : at + step]) for at in range(0, have, step)]


def heatmap_figure(
    values: Sequence[Sequence[float | None]],
    path: str | Path,
    *,
    row_names: Sequence[str],
    column_names: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str | None = None,
) -> None:
    """Draw a table of numbers as colours, with the numbers themselves while they are few.

    The scale runs from 0 to 1 where all values lie there, so that pictures compare; else over the values.

    Args:
        values: a row for each of `row_names`, a number (None: unknown, left grey) for each of `column_names`.
        path: file to write, .svg or .png.
        row_names, column_names: the names along the sides.
        xlabel, ylabel, title: texts.

    Raises `ValueError` too where the names do not fit the values.
    """
    shape = (len(values), len(values[0]) if len(values) else 0)
    if shape != (len(row_names), len(column_names)) or any(len(row) != shape[1] for row in values) or not all(shape):
        raise ValueError(
            f"values must be {len(row_names)} x {len(column_names)}, as the names are, and not empty, got "
            f"{shape[0]} x {sorted({len(row) for row in values})}"
        )
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    numbers = [[_number(value) for value in row] for row in values]
    known = [value for row in numbers for value in row if not math.isnan(value)] or [0.0]
    unit = min(known) >= 0 and max(known) <= 1
    scale = Normalize(0, 1) if unit else Normalize(min(known), max(known))
    colours = colormaps["cividis"]
    rows, columns = shape
    numbered = columns <= 14 and rows <= 24
    width = min(9.0, max(WIDTH, (0.36 if numbered else 0.24) * columns + 1.6))
    with drawn(path, width, min(9.0, max(2.2, 0.28 * rows + 1.3))) as figure:
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(
            numbers, norm=scale, cmap=colours, edgecolors=PAPER if rows * columns <= 400 else "face",
            linewidth=0.6 if rows * columns <= 400 else 0, rasterized=rows * columns > 2500,
        )  # fmt: skip
        axes.set_facecolor("#BBBBBB")
        if numbered:
            for r, row in enumerate(numbers):
                for c, value in enumerate(row):
                    ink = INK if scale(value) > 0.55 else PAPER
                    text = "" if math.isnan(value) else f"{value:.2f}" if unit else f"{value:.3g}"
                    axes.text(c + 0.5, r + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
        _name_side(axes, "x", column_names, 30)
        _name_side(axes, "y", row_names, 40)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(mesh, ax=axes, shrink=0.85, aspect=18).outline.set_visible(False)
        _finish(axes, title, legend=False)


def _name_side(axes: Axes, side: str, names: Sequence[str], most: int) -> None:
    """The names of one side's cells, every so-manieth where all of them would be too many."""
    step = math.ceil(len(names) / most)
    shown = [_short(str(name)) for name in names[::step]]
    places = [at + 0.5 for at in range(0, len(names), step)]
    if side == "y":
        axes.set_yticks(places, shown)
    else:
        long = max(map(len, shown)) > 3 and len(shown) > 6
        axes.set_xticks(places, shown, rotation=40 if long else 0, ha="right" if long else "center")


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, max(8, width))) or text


def _finish(axes: Axes, title: str | None, *, legend: bool) -> None:
    """Title at the left; the legend below the axes, where it hides nothing, in as many columns as its names allow."""
    if title is not None:
        axes.set_title(_wrapped(title, 52), loc="left", fontsize=11)
    if legend:
        handles, names = axes.get_legend_handles_labels()
        names = [_wrapped(name, 46) for name in names]
        longest = max((len(line) for name in names for line in name.splitlines()), default=1)
        columns = max(1, min(len(names), 52 // (longest + 6)))
        figure = axes.get_figure()
        assert figure is not None
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _require_some(data: Mapping[str, Any], what: str) -> None:
    if not data or not any(len(each) for each in data.values()):
        raise ValueError(f"{what} must hold something to draw, got {dict(data)!r}")

"""Pictures of plain data: lines, bars, shares and histograms; the other kinds are imported here too.

They need the extra `figures`.

Every function takes data as dictionaries and lists, as JSON holds them, and a path ending in .svg or .png; it raises
`ValueError` without matplotlib, for another suffix, and for data that hold nothing to draw. Heights are drawn in the
unit they come in; what is called a share is a fraction and is shown in percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.errors import InputError
from advmoe.report.drawing import (
    GREY,
    INK,
    LIGHT,
    LINES,
    MARKS,
    PAPER,
    WIDTH,
    drawn,
    finish,
    nan_or,
    require_matplotlib,
    wrapped,
)  # fmt: skip
from advmoe.report.flow import flow_figure
from advmoe.report.heatmap import heatmap_figure
from advmoe.report.result_figures import dissection_figure, sweep_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "bars_figure", "dissection_figure", "flow_figure", "heatmap_figure", "histogram_figure", "lines_figure",
    "require_matplotlib", "stacked_figure", "sweep_figure",
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
            heights = [nan_or(point.get("y")) for point in points]
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
        finish(axes, title, legend=len(series) + len(references) > 1)


def _spread(axes: Axes, places: list[float], points: Sequence[Mapping[str, Any]], colour: str, *, band: bool) -> None:
    """The interval of each point that has one: a band where points are many, else whiskers."""
    low, high = (
        [math.nan if point.get("y") is None else nan_or(point.get(end)) for point in points] for end in ("low", "high")
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
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    *,
    ylabel: str,
    xlabel: str = "",
    title: str | None = None,
) -> None:
    """Draw bars side by side in groups, with intervals where there are any and, while they are few, their heights.
    Where the groups' names are too long to stand side by side, the bars lie.

    Args:
        groups: group to {bar's name: {"y", "low", "high"}}; low and high may be missing or None, and a group may lack
            some of the bars.
        path: file to write, .svg or .png.
        ylabel, xlabel, title: texts; `xlabel` says what the groups are.
    """
    _require_some(groups, "groups")
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    inches = min(9.0, max(WIDTH, 0.28 * len(groups) * len(names) + 1))
    slot = int(10 * inches / len(groups))
    if max(len(word) for group in groups for word in (group.split() or [""])) > slot:  # it would run into the next
        with drawn(path, WIDTH, 1.2 + (0.16 * len(names) + 0.14) * len(groups)) as figure:
            _lying_bars(figure.add_subplot(), groups, names, ylabel, title)
        return
    with drawn(path, inches, 3.3) as figure:
        axes = figure.add_subplot()
        for name, places, points, look in _bars(groups, names):
            heights = [nan_or(point.get("y")) for point in points]
            axes.bar(places, heights, 0.92 * 0.8 / len(names), label=name, **look)
            _whiskers(axes, places, points)
            if len(groups) * len(names) <= 20:
                _number_bars(axes, places, points)
        axes.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(groups)), xlim=(-0.5, len(groups) - 0.5))
        axes.set_xticklabels([wrapped(group, slot) for group in groups])
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.12)
        axes.grid(axis="y")
        finish(axes, title, legend=len(names) > 1)


_Points = list[Mapping[str, Any]]


def _bars(
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Sequence[str]
) -> Iterator[tuple[str, list[float], _Points, dict[str, Any]]]:
    """Of each bar's name: the places of its bars, what they show, and how they look."""
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, cycle(LINES), strict=False)):
        places = [at + (number - (len(names) - 1) / 2) * width for at in range(len(groups))]
        hatch = _HATCHES[number // len(LINES) % len(_HATCHES)]
        look = {"color": colour, "hatch": hatch, "edgecolor": PAPER, "linewidth": 0}
        yield name, places, [bars.get(name, {}) for bars in groups.values()], look


def _lying_bars(
    axes: Axes, groups: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Sequence[str], label: str,
    title: str | None,
) -> None:  # fmt: skip
    """Bars from left to right, the first group on top: room for long names and for every number."""
    for name, places, points, look in _bars(groups, names):
        lengths = [nan_or(point.get("y")) for point in points]
        axes.barh(places, lengths, 0.92 * 0.8 / len(names), label=name, **look)
        _whiskers(axes, places, points, lying=True)
        _number_bars(axes, places, points, lying=True)
    axes.set(xlabel=label, yticks=range(len(groups)), ylim=(len(groups) - 0.5, -0.5))
    axes.set_yticklabels([wrapped(group, 20) for group in groups])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.grid(axis="x")
    finish(axes, title, legend=len(names) > 1)


def _whiskers(axes: Axes, places: list[float], points: _Points, *, lying: bool = False) -> None:
    for at, point in zip(places, points, strict=True):
        low, high = nan_or(point.get("low")), nan_or(point.get("high"))
        if not math.isnan(low + high):
            ends = ([low, high], [at, at]) if lying else ([at, at], [low, high])
            axes.plot(*ends, color=GREY, linewidth=1.4, marker="|" if lying else "_", markersize=6)


def _number_bars(axes: Axes, places: list[float], points: _Points, *, lying: bool = False) -> None:
    """What each bar shows, beyond its end and that of its interval."""
    for at, point in zip(places, points, strict=True):
        if point.get("y") is not None:
            end = max(float(point["y"]), float(point.get("high") or -math.inf), 0.0)
            place, offset = ((end, at), (4, 0)) if lying else ((at, end), (0, 3))
            axes.annotate(
                f"{point['y']:.3g}", place, offset, textcoords="offset points", fontsize=8.5, color=GREY,
                ha="left" if lying else "center", va="center" if lying else "baseline",
            )  # fmt: skip


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
        axes.set_yticks(range(len(rows)), [wrapped(row, 20) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel=xlabel, xlim=(0, max(100.0, max(left))))
        finish(axes, title, legend=True)


def _fills(count: int) -> list[tuple[str, str]]:
    """Colours of `count` parts, each with the colour of the number on it."""
    return [(LINES[k % len(LINES)], INK if LINES[k % len(LINES)] in LIGHT else PAPER) for k in range(count)]


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
        bins: at most so many bins are drawn where all series have the same edges: empty ones at both ends are left out
            and neighbours are joined (None: all are drawn).

    Raises `ValueError` too where a series' edges are not one more than its shares.
    """
    _require_some(series, "series")
    for name, each in series.items():
        if len(each["edges"]) != len(each["shares"]) + 1:
            got = f"{len(each['edges'])} and {len(each['shares'])}"
            raise InputError(f"series must have one more edge than shares, got {got} in {name!r}")
    with drawn(path, WIDTH, 3.3) as figure:
        axes = figure.add_subplot()
        styles = zip(cycle(LINES), cycle(["-", "--", ":", "-."]), strict=False)
        for (name, each), (colour, dashes) in zip(coarser(series, bins).items(), styles, strict=False):
            heights = [100 * share for share in each["shares"]]
            axes.stairs(heights, each["edges"], color=colour, linewidth=1.8, linestyle=dashes, label=name)
            axes.stairs(heights, each["edges"], color=colour, alpha=0.18, fill=True, label="_")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        finish(axes, title, legend=len(series) > 1)


def coarser(
    series: Mapping[str, Mapping[str, Sequence[float]]], bins: int | None
) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """Join the bins of distributions, equally many at a time, until at most `bins` of them are drawn.

    Empty bins at both ends are left out. Unchanged where `bins` is None, all bins are empty, or the edges differ.
    """
    if bins is not None and bins < 1:
        raise InputError(f"bins must be >= 1, got {bins}")
    grids = {tuple(each["edges"]) for each in series.values()}
    filled = [at for each in series.values() for at, share in enumerate(each["shares"]) if share > 1e-4]
    if bins is None or len(grids) > 1 or not filled:
        return series
    (edges,) = grids
    low, high, whole = min(filled), max(filled) + 1, len(edges) - 1
    least = next(step for step in range(1, whole + 1) if -(-high // step) - low // step <= bins)
    step = next(
        (step for step in range(least, 2 * least) if whole % step == 0), least
    )  # bins equally wide, if it can be
    cuts = [min(step * at, whole) for at in range(low // step, -(-high // step) + 1)]
    inside = [0, *cuts[1:-1], whole]  # the tails, of next to nothing, go to the ends
    return {
        name: {
            "edges": [edges[cut] for cut in cuts],
            "shares": [sum(each["shares"][a:b]) for a, b in pairwise(inside)],
        }
        for name, each in series.items()
    }


def _require_some(data: Mapping[str, Any], what: str) -> None:
    if not data or not any(len(each) for each in data.values()):
        raise InputError(f"{what} must hold something to draw, got {dict(data)!r}")

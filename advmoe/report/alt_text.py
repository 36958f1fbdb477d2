"""Pictures in words, for those who cannot see them: a function for each kind, of its data alone.

Each takes the data and the options that the picture is drawn with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from advmoe.report.figures import coarser
from advmoe.report.tables import number, percent
from advmoe.text import radius

NOTHING = "Nothing was measured."


def of_lines(
    series: Mapping[str, Sequence[Mapping[str, Any]]], *, xlabel: str, ylabel: str,
    references: Sequence[tuple[str, float]] = (),
) -> str:  # fmt: skip
    """Where each line starts and ends, and how far it goes; the heights of dashed lines."""
    sentences = []
    for name, points in series.items():
        known = [point for point in points if point.get("y") is not None]
        if not known:
            continue
        ends = [f"{number(point['y'])} at {number(point['x'])}" for point in (known[0], known[-1])]
        heights = [point["y"] for point in known]
        text = ends[0] if len(known) == 1 else f"from {ends[0]} to {ends[1]}"
        if len(known) > 2:
            text += f", between {number(min(heights))} and {number(max(heights))}"
        sentences.append(f"{name}: {text}.")
    sentences = sentences or [NOTHING]
    sentences += [f"{name}: dashed line at {number(height)}." for name, height in references]
    return " ".join([f"Lines of {ylabel} against {xlabel}.", *sentences])


def of_bars(groups: Mapping[str, Mapping[str, Mapping[str, Any]]], *, ylabel: str, xlabel: str = "") -> str:
    """The height of every bar."""
    sentences = []
    for group, bars in groups.items():
        heights = ", ".join(f"{name} {number(bar.get('y'))}" for name, bar in bars.items() if bar.get("y") is not None)
        sentences.append(f"{_named(xlabel, group)}: {heights or 'nothing measured'}.")
    return " ".join([f"Bars of {ylabel}.", *(sentences or [NOTHING])])


def of_shares(rows: Mapping[str, Mapping[str, float]], *, xlabel: str) -> str:
    """Every part of every bar, in percent."""
    sentences = [
        f"{row}: {', '.join(f'{part} {number(round(100 * share, 1))} %' for part, share in parts.items())}."
        for row, parts in rows.items()
    ]
    return " ".join(["Bars of shares.", *(sentences or [NOTHING])])


def of_sweep(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Robust accuracy at every radius."""
    sentences = ["Lines of robust accuracy against eps."]
    for name, curve in curves.items():
        points = [(percent(each["robust_accuracy"]), radius(each["eps"], curve["norm"])) for each in curve["points"]]
        sentences.append(f"{name}: {', '.join(f'{share} % at {eps}' for share, eps in points)}.")
    return " ".join(sentences)


def of_histogram(
    series: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, ylabel: str, bins: int | None = None
) -> str:
    """The mean of each distribution, its bins' middles taken for its values, and where its fullest bin lies."""
    sentences = [f"Distribution of {xlabel}."]
    for name, each in coarser(series, bins).items():
        edges, shares = each["edges"], each["shares"]
        total = sum(shares) or 1
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        mean = sum(middle * share for middle, share in zip(middles, shares, strict=True)) / total
        peak = max(range(len(shares)), key=lambda at: shares[at])
        top = f"{number(edges[peak])} to {number(edges[peak + 1])}"
        sentences.append(f"{name}: mean {number(mean)}, most between {top}.")
    return " ".join(sentences)


def of_heatmap(table: Mapping[str, Any], *, xlabel: str, ylabel: str, spread: bool = False) -> str:
    """Size, range, and where the ends of the range lie."""
    rows = [_named(ylabel, name) for name in table["rows"]]
    columns = [_named(xlabel, name) for name in table["columns"]]
    if members := table.get("members"):
        columns = [f"{column}, {member}" for column in columns for member in members]
    known = [
        (value, f"{row}, {column}")
        for row, line in zip(rows, table["values"], strict=True)
        for column, value in zip(columns, line, strict=True)
        if value is not None
    ]
    if not known:
        return "A table of colours without a known value."
    low, high = (end(known, key=lambda each: each[0]) for end in (min, max))
    sides = [f"{len(rows)} rows", f"{len(columns)} columns"]
    sides = [f"{side} ({label})" if label else side for side, label in zip(sides, (ylabel, xlabel), strict=True)]
    what = " by ".join(sides)
    return f"Table of colours, {what}: from {number(low[0])} ({low[1]}) to {number(high[0])} ({high[1]})."


def of_flow(panels: Mapping[str, Mapping[str, Any]]) -> str:
    """The widest flow out of each layer, by panel."""
    widest = [
        f"{name}: {', '.join(f'layer {at} {_widest(flows)}' for at, flows in enumerate(panel['flows']))}"
        for name, panel in panels.items()
    ]
    return f"Flows between the experts of consecutive layers. The widest out of each layer, {'; '.join(widest)}."


def _widest(flows: Sequence[Sequence[float]]) -> str:
    share, i, j = max((share, i, j) for i, row in enumerate(flows) for j, share in enumerate(row))
    return f"expert {i} to {j} ({percent(share, 0)} %)"


def _named(what: str, name: str) -> str:
    return f"{what} {name}".strip()

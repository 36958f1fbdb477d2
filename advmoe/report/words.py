"""What a figure shows, in words, for those who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.report.tables import number


def of_lines(series: Mapping[str, Sequence[Mapping[str, Any]]], xlabel: str, ylabel: str) -> str:
    """Where each line starts and ends, and how far it goes."""
    found = [f"Lines of {ylabel} against {xlabel}."]
    for name, points in series.items():
        known = [point for point in points if point.get("y") is not None]
        if not known:
            continue
        ends = [f"{number(point['y'])} at {number(point['x'])}" for point in (known[0], known[-1])]
        heights = [point["y"] for point in known]
        text = ends[0] if len(known) == 1 else f"from {ends[0]} to {ends[1]}"
        if len(known) > 2:
            text += f", between {number(min(heights))} and {number(max(heights))}"
        found.append(f"{name}: {text}.")
    return " ".join(found)


def of_bars(groups: Mapping[str, Mapping[str, Mapping[str, Any]]], ylabel: str) -> str:
    """The height of every bar."""
    found = [f"Bars of {ylabel}."]
    for group, bars in groups.items():
        heights = ", ".join(f"{name} {number(bar.get('y'))}" for name, bar in bars.items() if bar.get("y") is not None)
        found.append(f"{group}: {heights or 'nothing measured'}.")
    return " ".join(found)


def of_shares(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Every part of every bar, in percent."""
    return "Bars of shares. " + " ".join(
        f"{row}: {', '.join(f'{part} {number(round(100 * share, 1))} %' for part, share in parts.items())}."
        for row, parts in rows.items()
    )


def of_histogram(series: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> str:
    """The mean of each distribution, its bins' middles taken for its values, and where its fullest bin lies."""
    found = [f"Distribution of {xlabel}."]
    for name, each in series.items():
        edges, shares = each["edges"], each["shares"]
        total = sum(shares) or 1
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        mean = sum(middle * share for middle, share in zip(middles, shares, strict=True)) / total
        peak = max(range(len(shares)), key=lambda at: shares[at])
        top = f"{number(edges[peak])} to {number(edges[peak + 1])}"
        found.append(f"{name}: mean {number(mean)}, most between {top}.")
    return " ".join(found)


def of_heatmap(
    values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], xlabel: str, ylabel: str
) -> str:
    """Size, range, and where the ends of the range lie."""
    known = [
        (value, f"{row}, {column}")
        for row, line in zip(rows, values, strict=True)
        for column, value in zip(columns, line, strict=True)
        if value is not None
    ]
    if not known:
        return "A table of colours without a known value."
    low, high = min(known), max(known)
    what = f"{len(rows)} rows ({ylabel}) by {len(columns)} columns ({xlabel})"
    return f"Table of colours, {what}: from {number(low[0])} ({low[1]}) to {number(high[0])} ({high[1]})."

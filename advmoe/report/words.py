"""What was attacked with, and what a figure shows, in words, for those who cannot see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from advmoe.report.tables import DASH, number, percent
from advmoe.text import radius

CATEGORIES = {
    "both_survive": "1 both survive",
    "only_routing_fails": "2 only routing fails",
    "only_prediction_fails": "3 only prediction fails",
    "both_fail": "4 both fail",
}
"""Titles of a dissection's categories."""


def of_threat(threat: Mapping[str, Any]) -> str:
    """Norm and radius of what was attacked with."""
    eps, norm = threat.get("eps"), str(threat.get("norm"))
    return "eps unknown" if eps is None else f"{norm} eps {radius(eps, norm)}"


def flat(value: Any) -> str:
    """A value of a JSON file on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(name).replace('_', ' ')} {flat(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(flat, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return DASH if value is None else str(value)


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


def of_sweep(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """Robust accuracy at every radius."""
    found = ["Lines of robust accuracy against eps."]
    for name, curve in curves.items():
        points = [(percent(each["robust_accuracy"]), radius(each["eps"], curve["norm"])) for each in curve["points"]]
        found.append(f"{name}: {', '.join(f'{share} % at {eps}' for share, eps in points)}.")
    return " ".join(found)


def of_histogram(series: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> str:
    """The mean of each distribution, its bins' middles taken for its values, and where its fullest bin lies."""
    found = [f"Distribution of {xlabel}."]
    for name, each in series.items():
        edges, shares = each["edges"], each["shares"]
        total = sum(shares) or 1
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
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
    low, high = (end(known, key=lambda each: each[0]) for end in (min, max))
    what = f"{len(rows)} rows ({ylabel}) by {len(columns)} columns ({xlabel})"
    return f"Table of colours, {what}: from {number(low[0])} ({low[1]}) to {number(high[0])} ({high[1]})."

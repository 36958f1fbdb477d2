"""Figures of whole results: robust accuracy against radius, and an attack dissected. They need the extra `figures`.

Axes: `L` MoE layers, `E` experts. Results hold fractions; figures show percent.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.errors import InputError
from advmoe.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    LINES,
    MARKS,
    ORANGE,
    PAPER,
    SKY,
    VERMILION,
    WIDTH,
    drawn,
    require_fields,
)  # fmt: skip
from advmoe.report.words import CATEGORIES
from advmoe.text import percent, radius

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = dict(zip(CATEGORIES, (GREEN, SKY, ORANGE, VERMILION), strict=True))
"""Of the categories' bars."""


def sweep_figure(result: Mapping[str, Any], path: str | Path) -> None:
    """Draw robust accuracy, with its 95% interval, against the attack's radius (as fig. 2 of Zhang et al., 2023).

    Args:
        result: what `advmoe.evaluation.sweep.sweep` returned, or several by name, for one picture. Where gradient
            masking is suspected, crosses mark the curve and its reasons are printed below.
        path: file to write, .svg or .png.

    Raises `ValueError` without matplotlib, for another suffix, or for a result that is none of a sweep's, or of sweeps
    in different norms.
    """
    results = {"": result} if "masking" in result else dict(result)
    for name, each in results.items():
        require_fields(each, ("norm", "points", "probe", "masking"), f"sweep {name!r}" if name else "sweep")
    norms = sorted({each["norm"] for each in results.values()})
    if len(norms) != 1:
        raise InputError(f"result must hold one sweep or more, all in one norm, got {norms}")
    with drawn(path, WIDTH, 3.5) as figure:
        axes = figure.add_subplot()
        for (name, each), colour, mark in zip(results.items(), cycle(LINES), cycle(MARKS), strict=False):
            _sweep_curve(axes, name, each, colour, mark)
        unit = "(pixels of 255)" if norms == ["linf"] else "(pixels of [0, 1])"
        symbol = "l\N{INFINITY}" if norms == ["linf"] else "l2"
        axes.set(xlabel=f"attack radius eps, {symbol} {unit}", ylabel="robust accuracy (%)", ylim=(-3, 105))
        axes.margins(x=0.08)
        axes.locator_params(axis="x", integer=norms == ["linf"], steps=[1, 2, 4, 5, 10])
        axes.grid(axis="y")
        if len(results) == 1:
            _number_points(axes, next(iter(results.values())))
        if list(results) != [""]:
            axes.legend(frameon=False)
        _notes(figure, [note for name, each in results.items() for note in _sweep_notes(name, each)])


def _scale(norm: str) -> float:
    return 255 if norm == "linf" else 1


def _sweep_curve(axes: Axes, name: str, result: Mapping[str, Any], colour: str, mark: str) -> None:
    points, scale = result["points"], _scale(result["norm"])
    radii = [scale * point["eps"] for point in points]
    heights = [100 * point["robust_accuracy"] for point in points]
    below = [h - 100 * point["interval"][0] for h, point in zip(heights, points, strict=True)]
    above = [100 * point["interval"][1] - h for h, point in zip(heights, points, strict=True)]
    suspected = result["masking"]["suspected"]
    label = textwrap.fill(f"{name} (masking suspected)" if suspected else name, 36)
    axes.errorbar(
        radii, heights, yerr=[below, above], color=colour, marker="x" if suspected else mark, capsize=3,
        markersize=8 if suspected else 5, markeredgewidth=2 if suspected else 1,
        linestyle="--" if suspected else "-", label=label,
    )  # fmt: skip


def _number_points(axes: Axes, result: Mapping[str, Any]) -> None:
    for point in result["points"]:
        place = (_scale(result["norm"]) * point["eps"], 100 * point["robust_accuracy"])
        text = f"{place[1]:.1f}"
        axes.annotate(text, place, xytext=(6, 5), textcoords="offset points", fontsize=9, color=GREY)


def _sweep_notes(name: str, result: Mapping[str, Any]) -> list[str]:
    probe = result["probe"]
    reasons = result["masking"]["reasons"] or [
        f"{percent(probe['robust_accuracy'])} % robust at the probe, eps {radius(probe['eps'], result['norm'])}"
    ]
    return [f"{name}: {reason}" if name else reason for reason in reasons]


def _notes(figure: Figure, notes: list[str]) -> None:
    """Print `notes` below everything else, on a figure made taller by as much as they need."""
    whole = [note.replace(" %", "\N{NO-BREAK SPACE}%") for note in notes]
    lines = [line for note in whole for line in textwrap.wrap(note, 70, subsequent_indent="    ")]
    width, height = figure.get_size_inches()
    room = 0.17 * len(lines) + 0.1
    figure.set_size_inches(width, height + room)
    share = room / (height + room)
    figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share))
    figure.text(0.02, share, "\n".join(lines), fontsize=8.5, color=GREY, va="top", linespacing=1.3)


def dissection_figure(dissection: Mapping[str, Any], path: str | Path) -> None:
    """Draw an attack dissected, in three panels: the four categories (as figs. 4 and 5 of Zhang et al., 2023), the
    choices changed per MoE layer, and each layer's expert load on clean and adversarial images.

    Args:
        dissection: what `advmoe.evaluation.dissection.Dissection.to_dict` returned.
        path: file to write, .svg or .png.

    Raises `ValueError` without matplotlib, for another suffix, or for a result that is no dissection.
    """
    fields = ("num_examples", "num_clean_correct", "categories", "categories_of_clean_correct", "flip_rate", "load")
    require_fields(dissection, fields, "dissection")
    with drawn(path, 8.6, 7.6) as figure:
        figure.set_layout_engine("constrained", h_pad=0.1)
        top, middle, bottom = figure.subplots(3, 1, height_ratios=[0.9, 1.1, 1.5])
        _category_bars(top, dissection)
        layers = range(len(dissection["flip_rate"]))
        middle.bar(layers, [100 * rate for rate in dissection["flip_rate"]], width=0.7, color=BLUE)
        highest = max(1.0, 105 * max(dissection["flip_rate"]))
        middle.set(title="Choices changed by the attack", ylabel="images (%)", ylim=(0, highest))
        _load_bars(bottom, dissection["load"])
        for axes in (middle, bottom):
            axes.set(xlabel="MoE layer", xticks=layers[:: math.ceil(len(layers) / 26)], xlim=(-0.6, len(layers) - 0.4))
            axes.grid(axis="y")


def _category_bars(axes: Axes, dissection: Mapping[str, Any]) -> None:
    bars = {
        f"right clean\n(n = {dissection['num_clean_correct']})": dissection["categories_of_clean_correct"],
        f"all images\n(n = {dissection['num_examples']})": dissection["categories"],
    }
    bars = {label: shares for label, shares in bars.items() if shares is not None}
    rows = list(reversed(list(bars.values())))
    left = [0.0] * len(bars)
    for name, title in CATEGORIES.items():
        colour = _COLOURS[name]
        widths = [100 * shares[name] for shares in bars.values()]
        numbers = " / ".join(f"{100 * shares[name]:.1f} %" for shares in rows)
        drawn = axes.barh(list(bars), widths, left=left, color=colour, label=f"{title}: {numbers}", edgecolor="white")
        # A narrow part's number stands in the legend alone.
        inside = [f"{width:.1f}" if width >= 6 else "" for width in widths]
        axes.bar_label(drawn, inside, label_type="center", color=INK if colour in LIGHT else PAPER, fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    title = "What survived the attack" + (" (all / right clean)" if len(bars) == 2 else "")
    axes.set(title=title, xlabel="images (%)", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.42), frameon=False, fontsize=9, ncols=2)


def _load_bars(axes: Axes, load: Mapping[str, list[list[float]]]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    experts = len(load["clean"][0])
    colours = [colormaps["viridis"](0.15 + 0.7 * e / max(1, experts - 1)) for e in range(experts)]
    kinds = {"clean": (-0.2, ""), "adversarial": (0.2, "////")}
    for kind, (shift, hatch) in kinds.items():
        places = [layer + shift for layer in range(len(load[kind]))]
        below = [0.0] * len(places)
        for expert, colour in enumerate(colours):
            heights = [100 * layer[expert] for layer in load[kind]]
            axes.bar(places, heights, 0.38, bottom=below, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            below = [start + height for start, height in zip(below, heights, strict=True)]
    keys = [Patch(facecolor=colour, label=f"expert {expert}") for expert, colour in enumerate(colours)]
    keys += [Patch(facecolor=GREY, edgecolor="white", hatch=hatch, label=kind) for kind, (_, hatch) in kinds.items()]
    columns = math.ceil(len(keys) / 10)
    axes.legend(handles=keys, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, ncols=columns)
    axes.set(title="Expert load", ylabel="images (%)", ylim=(0, 100))

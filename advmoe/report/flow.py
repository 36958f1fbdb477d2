"""How images flow through the layers of a routed model, from expert to expert: a Sankey diagram. Needs `figures`.

Axes: `L` MoE layers, `E` experts. Shares are fractions of the images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe.errors import InputError
from advmoe.report.drawing import EXPERTS, GREY, INK, LIGHT, PAPER, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THIN = 0.03
"""Flows of a smaller share are drawn as one, if there are more than `FEW` of them between two layers."""
FEW = 3

_NODE = 0.085
"""Width of a node, in inches."""
_GAP = 0.025
"""Between the nodes of a layer, where all images are 1 high."""
_NUMBERED = 0.055
"""Height from which a node shows its expert's number."""

Flows = Sequence[Sequence[float]]
"""Shares from each expert of a layer to each of the next, E x E."""


@dataclass(frozen=True)
class Band:
    """A flow between two heights, which count from the top."""

    share: float
    start: float
    """Upper end where it leaves."""
    end: float
    """Upper end where it arrives."""
    source: int | None
    """The expert that it leaves; None for thin flows drawn as one."""
    left: float
    """Where it leaves, in layers."""
    right: float
    """Where it arrives."""


def flow_figure(
    panels: Mapping[str, Mapping[str, Any]], path: str | Path, *, thin: float = THIN, title: str | None = None
) -> None:
    """Draw for each panel how images flow from layer to layer: a column of nodes for each MoE layer, one for each
    expert, as high as its share of the images, and between them bands in the colour of the expert that they leave.

    Args:
        panels: name to {"load": L x E shares, "flows": (L - 1) x E x E shares}.
        path: file to write, .svg or .png.
        thin: flows of less are joined to one grey band, where more than `FEW` are between two layers.
        title: text.

    Raises `ValueError` without matplotlib, for another suffix, and for flows that do not fit the load.
    """
    if not panels:
        raise InputError("panels must hold something to draw, got none")
    for name, each in panels.items():
        _require_fitting(name, each["load"], each["flows"])
    longest = max(len(each["load"]) for each in panels.values())
    experts = max(len(each["load"][0]) for each in panels.values())
    width, height = min(9.0, max(5.4, 0.5 * longest + 0.8)), min(3.4, 2.3 + 0.12 * experts)
    with drawn(path, width, 0.6 + height * len(panels)) as figure:
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (name, each) in zip(grid, panels.items(), strict=True):
            _panel(axes, each["load"], each["flows"], thin, _NODE * longest / width)
            axes.set_title(name, loc="left", fontsize=10)
        grid[-1].set_xlabel("MoE layer")
        if title is not None:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def _require_fitting(name: str, load: Sequence[Sequence[float]], flows: Sequence[Flows]) -> None:
    experts = len(load[0]) if load else 0
    shapes = {(len(each), *sorted({len(row) for row in each})) for each in flows}
    if not experts or len(flows) != len(load) - 1 or not shapes <= {(experts, experts)}:
        rule = f"flows of {name!r} must be {max(0, len(load) - 1)} x {experts} x {experts}, as its load is"
        raise InputError(f"{rule}, got {len(flows)} x {sorted(shapes)}")


def _panel(axes: Axes, load: Sequence[Sequence[float]], flows: Sequence[Flows], thin: float, node: float) -> None:
    from matplotlib.patches import PathPatch, Rectangle

    for layer, between in enumerate(flows):
        for band in bands(load[layer], load[layer + 1], between, (layer + node, layer + 1), thin):
            joint = band.source is None
            colour = GREY if band.source is None else _colour(band.source)
            patch = PathPatch(_outline(band), facecolor=colour, alpha=0.26 if joint else 0.42, linewidth=0)
            axes.add_patch(patch).set_zorder(0.5 if joint else 1)
    for layer, shares in enumerate(load):
        for expert, (share, top) in enumerate(zip(shares, _tops(shares), strict=True)):
            if share > 0:
                colour = _colour(expert)
                axes.add_patch(Rectangle((layer, top), node, share, facecolor=colour, linewidth=0))
            if share >= _NUMBERED:
                ink = INK if colour in LIGHT else PAPER
                place = (layer + node / 2, top + share / 2)
                axes.text(*place, str(expert), ha="center", va="center", fontsize=7.5, color=ink)
    height = 1 + _GAP * (len(load[0]) - 1)
    axes.set(xlim=(-0.08, len(load) - 1 + node + 0.08), ylim=(height + 0.01, -0.01), yticks=[])
    axes.set_xticks([layer + node / 2 for layer in range(len(load))], [str(layer) for layer in range(len(load))])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _colour(expert: int) -> str:
    return EXPERTS[expert % len(EXPERTS)]


def _tops(shares: Sequence[float]) -> list[float]:
    """The upper end of each expert's node."""
    return [start + _GAP * expert for expert, start in enumerate(_starts(shares, 0.0))]


def _starts(shares: Sequence[float], first: float) -> list[float]:
    """Where each share begins, one after another."""
    return list(accumulate(shares, initial=first))[:-1]


def bands(
    load: Sequence[float], following: Sequence[float], flows: Flows, ends: tuple[float, float], thin: float = THIN
) -> Iterator[Band]:
    """The flows from the nodes of a layer to those of the one that follows, drawn from one of `ends` to the other.

    Every band leaves its node below those to earlier experts, and arrives below those from earlier ones. Where more
    than `FEW` are thinner than `thin`, they leave and arrive below all others, through one bundle halfway.
    """
    experts = range(len(flows))
    small = {(i, j) for i in experts for j in experts if 0 < flows[i][j] < thin}
    if len(small) <= FEW:
        small = set()
    leaving, arriving = _tops(load), _tops(following)
    for i in experts:
        for j in experts:
            if flows[i][j] > 0 and (i, j) not in small:
                yield Band(flows[i][j], leaving[i], arriving[j], i, *ends)
                leaving[i] += flows[i][j]
                arriving[j] += flows[i][j]
    out = [math.fsum(flows[i][j] for j in experts if (i, j) in small) for i in experts]
    into = [math.fsum(flows[i][j] for i in experts if (i, j) in small) for j in experts]
    yield from _bundled(out, into, leaving, arriving, ends)


def _bundled(
    out: Sequence[float], into: Sequence[float], leaving: Sequence[float], arriving: Sequence[float],
    ends: tuple[float, float],
) -> Iterator[Band]:  # fmt: skip
    """What leaves each node, and what arrives at each, by way of one bundle halfway, at their common height."""
    total, (left, right) = sum(out), ends
    if total == 0:
        return
    middle = (left + right) / 2
    nodes = zip((*leaving, *arriving), (*out, *into), strict=True)
    top = sum((place + share / 2) * share for place, share in nodes) / (2 * total) - total / 2
    for at, share, below in zip(leaving, out, _starts(out, top), strict=True):
        if share > 0:
            yield Band(share, at, below, None, left, middle)
    for at, share, below in zip(arriving, into, _starts(into, top), strict=True):
        if share > 0:
            yield Band(share, below, at, None, middle, right)


def _outline(band: Band) -> Any:
    """A band's outline, level at both ends."""
    from matplotlib.path import Path as Outline

    bend, (left, right) = (band.left + band.right) / 2, (band.left, band.right)
    below = band.start + band.share, band.end + band.share
    points = [
        (left, band.start), (bend, band.start), (bend, band.end), (right, band.end),
        (right, below[1]), (bend, below[1]), (bend, below[0]), (left, below[0]), (left, band.start),
    ]  # fmt: skip
    move, line, curve, close = Outline.MOVETO, Outline.LINETO, Outline.CURVE4, Outline.CLOSEPOLY
    return Outline(points, [move, curve, curve, curve, line, curve, curve, curve, close])

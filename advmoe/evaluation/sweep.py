"""Robust accuracy against the attack's radius (fig. 2 of Zhang et al., 2023), and how masked gradients show in it.

Axes: `N` examples. `eps` is in pixels of [0, 1]; accuracies are fractions.

A ball contains every smaller ball. So a perfect attack breaks at a radius all that it breaks at a smaller one, and
breaks everything at a radius that reaches every image. Where that fails by more than chance, the attack has failed: the
model likely masks its gradients (Athalye et al., ICML 2018; Carlini et al., 2019, sec. 4). Two rules:

- Probe: at a radius that reaches every image, robust accuracy must be at most 1% or one example, whichever is more.
- Rise: for any two radii, let `regained` examples be broken at the smaller and robust at the larger, and `lost` the
  reverse. Were the rise chance, regained ~ Binomial(regained + lost, 1/2) at most. A one-sided exact sign test
  (McNemar's) rejects that at 5% over all pairs of radii together, the probe's included (Bonferroni: 5% / pairs).

Passing both proves nothing: they see masking that hides even the way to a distant image, not every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from advmoe.errors import InputError
from advmoe.evaluation.intervals import wilson
from advmoe.progress import tracked
from advmoe.text import aligned, percent, radius, wrapped
from advmoe.threat import ThreatModel

PROBE_LIMIT = 0.01
"""Robust accuracy that the probe may leave (or one example, where that is more)."""
RISE_LEVEL = 0.05
"""Chance of suspecting a rise in a sweep that has none, all pairs of radii together."""


def sweep(
    robust_at: Callable[[float], Tensor],
    epsilons: Iterable[float],
    *,
    norm: Literal["linf", "l2"],
    probe: float | None = None,
) -> dict[str, Any]:
    """Measure robust accuracy at each radius and at the probe's, and judge whether it can be believed.

    Args:
        robust_at: radius -> whether each example is still classified right, (N,) booleans, the same examples in the
            same order each time. Called once per radius, in ascending order.
        epsilons: radii in any order, each measured once; at 0 the accuracy is the clean one.
        probe: a radius that reaches every image from every other: default 1 in linf; in l2 it must be named: the square
            root of the number of pixel values, C H W.

    Returns, ready for JSON: `norm`, `num_examples`, `points` (per radius `eps`, `robust_accuracy`, its 95% `interval`,
    the counts `broken` and `regained`: robust here, though broken at a smaller radius), `probe` (one more point) and
    `masking` (`suspected` and a list of `reasons`, a sentence each).
    Raises `ValueError` for radii or a probe that cannot be used, or answers that are not (N,) booleans.
    """
    radii, probe = _checked_radii(epsilons, norm, probe)
    outcomes: dict[float, Tensor] = {}
    for eps in tracked(sorted({*radii, probe}), "radii", unit="radius"):
        expected = next((len(known) for known in outcomes.values()), None)
        outcomes[eps] = _checked_outcome(robust_at(eps), eps, expected)
    points = _points(outcomes)
    count = len(outcomes[probe])
    reasons = [*_probe_reasons(points[probe], count, norm), *_rise_reasons(outcomes, norm)]
    return {
        "norm": norm,
        "num_examples": count,
        "points": [points[eps] for eps in radii],
        "probe": points[probe],
        "masking": {"suspected": bool(reasons), "reasons": reasons},
    }


def _checked_radii(
    epsilons: Iterable[float], norm: Literal["linf", "l2"], probe: float | None
) -> tuple[list[float], float]:
    radii = [threat.eps for threat in ThreatModel.ascending(norm, epsilons)]
    if probe is None and norm == "l2":
        raise InputError("probe must be given in l2 (the square root of the number of pixel values), got None")
    probe = 1.0 if probe is None else float(probe)
    if not (math.isfinite(probe) and probe > 0 and probe >= radii[-1]) or (norm == "linf" and probe > 1):
        raise InputError(f"probe must be > 0, at least every radius and, in linf, <= 1, got {probe!r}")
    return radii, probe


def _checked_outcome(robust: Tensor, eps: float, expected: int | None) -> Tensor:
    if robust.dtype != torch.bool or robust.dim() != 1 or len(robust) != (expected or max(1, len(robust))):
        shape = f"N = {expected}" if expected else "N >= 1"
        raise InputError(
            f"robust_at must return (N,) booleans with {shape}, got {robust.dtype} {tuple(robust.shape)} at eps {eps:g}"
        )
    return robust.cpu()


def _points(outcomes: dict[float, Tensor]) -> dict[float, dict[str, Any]]:
    """A point for each radius of `outcomes`, which ascend."""
    points = {}
    broken_before = torch.zeros_like(next(iter(outcomes.values())))
    for eps, robust in outcomes.items():
        survivors, count = int(robust.sum()), len(robust)
        points[eps] = {
            "eps": eps,
            "robust_accuracy": survivors / count,
            "interval": list(wilson(survivors, count)),
            "broken": count - survivors,
            "regained": int((robust & broken_before).sum()),
        }
        broken_before = broken_before | ~robust
    return points


def _probe_reasons(point: dict[str, Any], count: int, norm: str) -> list[str]:
    survivors = count - point["broken"]
    if survivors <= max(1, PROBE_LIMIT * count):
        return []
    return [
        f"gradient masking suspected: {percent(point['robust_accuracy'])} % of the examples resist at eps "
        f"{radius(point['eps'], norm)}, where every image can be made into any other and at most "
        f"{percent(PROBE_LIMIT)} % may "
        "(a model that gives every image the same class resists too)"
    ]


def _rise_reasons(outcomes: dict[float, Tensor], norm: str) -> list[str]:
    """A sentence on the least likely of the rises that chance does not explain, if there is one."""
    pairs = list(combinations(outcomes, 2))
    rises = []
    for small, large in pairs:
        regained = int((outcomes[large] & ~outcomes[small]).sum())
        lost = int((outcomes[small] & ~outcomes[large]).sum())
        if regained <= lost:
            continue
        chance = rise_by_chance(regained, lost)
        if chance * len(pairs) <= RISE_LEVEL:
            rises.append((chance, small, large, regained, lost))
    if not rises:
        return []
    chance, small, large, regained, lost = min(rises)
    return [
        f"gradient masking suspected: robust accuracy rises from {_accuracy(outcomes[small])} at eps "
        f"{radius(small, norm)} to {_accuracy(outcomes[large])} at eps {radius(large, norm)} "
        f"({regained} examples regained, {lost} lost; sign test p = {chance:.1g})"
    ]


def rise_by_chance(regained: int, lost: int) -> float:
    """P(X >= `regained`) for X ~ Binomial(regained + lost, 1/2): how likely chance alone makes such a rise."""
    from scipy.stats import binom  # a dependency of scikit-learn; more than a second to import

    return float(binom.sf(regained - 1, regained + lost, 0.5))


def table(result: dict[str, Any]) -> str:
    """The result of `sweep` as aligned lines for a terminal, in percent; the probe and the reasons last."""
    norm = result["norm"]
    rows = [("eps", "robust accuracy", "95% interval", "regained")]
    points = result["points"]
    if result["probe"]["eps"] > points[-1]["eps"]:
        points = [*points, result["probe"]]
    for point in points:
        low, high = map(percent, point["interval"])
        cells = f"{percent(point['robust_accuracy'])} %", f"{low} - {high}", str(point["regained"])
        rows.append((radius(point["eps"], norm), *cells))
    verdict = result["masking"]["reasons"] or ["no sign of gradient masking in this sweep"]
    lines = [line for reason in verdict for line in wrapped(reason, "  ")]
    return "\n".join([f"{result['num_examples']} images, {norm}", "", *aligned(rows, ">"), "", *lines])


def _accuracy(robust: Tensor) -> str:
    return f"{percent(int(robust.sum()) / len(robust))} %"

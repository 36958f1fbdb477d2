"""Distributions of the IoU: measured values put into numbers, and what chance alone gives, exactly.

Axes: `N` values, `L` MoE layers, `E` experts, `M` rows of a layer's bank, `B` bins. Values are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import InputError
from advmoe.evaluation.overlap import Units, size

Numbers = NDArray[np.float64]

BINS = 400
"""Bins of every histogram, equally wide over 0 ... 1: those of different runs add up bin by bin."""
QUANTILES = (5, 25, 50, 75, 95)
"""In percent."""

_ROUNDING = 1e-9


def summary(values: Numbers, weights: Numbers | None = None) -> dict[str, Any]:
    """A distribution on 0 ... 1, ready for JSON.

    Args: values: (N,). weights: of each, summing to 1; equal ones by default.

    Returns `mean`, `std` (of the whole, not of a sample), `quantiles` (`p5` ... `p95`, each the least value that so
    many percent do not exceed) and `histogram`: `edges` (B + 1) and `shares` (B), a value on an edge counting above
    it. Raises `ValueError` for no values.
    """
    if not len(values):
        raise InputError("values must hold 1 or more, got none")
    order = np.argsort(values, kind="stable")
    values = values[order]
    weights = np.full(len(values), 1 / len(values)) if weights is None else weights[order]
    mean = float(np.sum(values * weights))
    reached = np.cumsum(weights)
    at = [int(np.searchsorted(reached, q / 100 - _ROUNDING).clip(0, len(values) - 1)) for q in QUANTILES]
    # Shifted, as a value on an edge may lie a rounding error below it.
    bins = np.floor(values * BINS + _ROUNDING).astype(int).clip(0, BINS - 1)
    return {
        "mean": mean,
        "std": math.sqrt(float(np.sum((values - mean) ** 2 * weights))),
        "quantiles": {f"p{q}": float(values[k]) for q, k in zip(QUANTILES, at, strict=True)},
        "histogram": {
            "edges": [edge / BINS for edge in range(BINS + 1)],
            "shares": np.bincount(bins, weights, minlength=BINS).tolist(),
        },
    }


def random_pathways(units: Units, others: Units) -> dict[str, Any]:
    """The `summary` of the IoU where every choice is drawn uniformly, and independently of all others.

    Args: units, others: of two models, or of a model and a mask, of which there is but one choice.
    """
    layers = []
    for unit, other in zip(units, others, strict=True):
        shared = (unit.long() @ other.long().T).flatten()
        layers.append(np.bincount(shared.numpy()) / shared.numel())
    return _summed(layers, size(units) + size(others))


def random_masks(units: Units, masks: Units) -> dict[str, Any]:
    """The `summary` of the IoU of a pathway with random masks, of as many rows in each layer as `masks`.

    Every set of rows is as likely, so the number shared in a layer is hypergeometric, whatever the pathway.
    """
    layers = [
        _hypergeometric(size([unit]), size([mask]), mask.shape[1]) for unit, mask in zip(units, masks, strict=True)
    ]
    return _summed(layers, size(units) + size(masks))


def _hypergeometric(used: int, drawn: int, rows: int) -> Numbers:
    """The probability that 0, 1, ... of the `used` rows are among `drawn` ones, drawn of `rows` at random."""
    total = math.comb(rows, drawn)
    counts = range(min(used, drawn) + 1)
    return np.array([math.comb(used, both) * math.comb(rows - used, drawn - both) / total for both in counts])


def _summed(layers: Sequence[Numbers], whole: int) -> dict[str, Any]:
    """The `summary` of the IoU, from the distribution of the number of units shared in each layer.

    Args: layers: one distribution each, independent of one another. whole: the units that the two use, those shared
    counted twice.
    """
    weights = np.ones(1)
    for layer in layers:
        weights = np.convolve(weights, layer)
    shared = weights.nonzero()[0]
    return summary(shared / (whole - shared), weights[shared])

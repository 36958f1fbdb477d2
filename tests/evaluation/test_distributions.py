"""Distributions of the IoU: numbers worked by hand, and chance against all that can happen, written out."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

from advmoe.evaluation.distributions import BINS, random_masks, random_pathways, summary
from advmoe.evaluation.overlap import iou


def units(*layers):
    """Per layer, (rows of the bank, rows of each expert)."""
    return [torch.tensor([[row in rows for row in range(count)] for rows in experts]) for count, experts in layers]


UNITS = units((4, [(0, 1), (2, 3)]), (5, [(0, 1, 2), (1, 2, 3), (0, 1, 4)]))
OTHERS = units((4, [(0,), (3,)]), (5, [(0, 1), (3, 4)]))
MASK = units((4, [(0, 2, 3)]), (5, [(1, 4)]))


def filled(distribution):
    """The bins that hold something."""
    shares, edges = distribution["histogram"]["shares"], distribution["histogram"]["edges"]
    return {edges[at]: share for at, share in enumerate(shares) if share > 0}


def test_a_summary_by_hand():
    distribution = summary(np.array([0.5, 0.25, 1.0, 0.25]))
    assert distribution["mean"] == 0.5 and distribution["std"] == pytest.approx(np.sqrt(0.375 / 4))
    assert distribution["quantiles"] == {"p5": 0.25, "p25": 0.25, "p50": 0.25, "p75": 0.5, "p95": 1.0}
    assert filled(distribution) == {0.25: 0.5, 0.5: 0.25, 1 - 1 / BINS: 0.25}  # the last bin holds 1
    edges = distribution["histogram"]["edges"]
    assert len(edges) == BINS + 1 and edges[0] == 0 and edges[-1] == 1


def test_weights_count():
    distribution = summary(np.array([0.75, 0.0]), np.array([0.9, 0.1]))
    assert distribution["mean"] == pytest.approx(0.675) and distribution["std"] == pytest.approx(0.225)
    assert distribution["quantiles"] == {"p5": 0.0, "p25": 0.75, "p50": 0.75, "p75": 0.75, "p95": 0.75}
    assert filled(distribution) == {0.0: pytest.approx(0.1), 0.75: pytest.approx(0.9)}


@pytest.mark.parametrize("count", [3, 7, 10, 49])
def test_quantiles_are_reached_despite_rounding(count):
    # Sums of 1 / count are not exact: of equal parts, the share is met by the value at which it is met on paper.
    values = np.arange(count) / count
    for q, value in zip((5, 25, 50, 75, 95), summary(values)["quantiles"].values(), strict=True):
        assert value == values[-(-q * count // 100) - 1]


def test_a_value_on_an_edge_is_above_it():
    values = np.arange(BINS) / BINS  # many of which, times the number of bins, fall below their whole number
    assert summary(values)["histogram"]["shares"] == pytest.approx([1 / BINS] * BINS)


def test_no_values():
    with pytest.raises(ValueError, match="values must hold 1 or more, got none"):
        summary(np.array([]))


@pytest.mark.parametrize("others", [UNITS, OTHERS, MASK])
def test_random_pathways_are_all_pathways(others):
    mine, yours = (list(product(*(range(len(layer)) for layer in each))) for each in (UNITS, others))
    pairs = [(one, two) for one in mine for two in yours]
    values = iou(*(torch.tensor(side) for side in zip(*pairs, strict=True)), UNITS, others).numpy()
    assert_same(random_pathways(UNITS, others), summary(values))


def test_random_masks_are_all_masks():
    choices = [list(combinations(range(mask.shape[1]), int(mask.sum()))) for mask in MASK]
    masks = [units((4, [first]), (5, [second])) for first, second in product(*choices)]
    zeros = torch.zeros(1, 2, dtype=torch.long)
    for pathway in (zeros, torch.tensor([[1, 2]])):
        values = np.array([iou(pathway, zeros, UNITS, mask).item() for mask in masks])
        assert_same(random_masks(UNITS, MASK), summary(values))


def assert_same(actual, expected):
    for name in ("mean", "std"):
        assert actual[name] == pytest.approx(expected[name])
    assert actual["quantiles"] == pytest.approx(expected["quantiles"])
    assert filled(actual) == pytest.approx(filled(expected))


def test_wide_layers():
    """Halves of many rows: the mean of what is shared is half of what is kept, and shares sum to 1."""
    halves = [(range(1024), range(1024, 2048))] * 3
    wide = units(*((2048, experts) for experts in halves))
    mask = units(*((2048, [range(0, 2048, 2)]) for _ in range(3)))
    for distribution in (random_pathways(wide, mask), random_masks(wide, mask)):
        assert sum(distribution["histogram"]["shares"]) == pytest.approx(1)
        assert distribution["mean"] == pytest.approx(1 / 3, abs=1e-3)
    # Every expert shares exactly 512 rows with this mask, so that chance has no say.
    assert random_pathways(wide, mask)["std"] == pytest.approx(0)
    # Hypergeometric: 3 * 1024 * 1/2 * 1/2 * 1024 / 2047 = 384.2 of variance around 1536 of 4608 units.
    assert random_masks(wide, mask)["std"] == pytest.approx(384.2**0.5 * 6144 / 4608**2, rel=0.01)

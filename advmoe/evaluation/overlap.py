"""How much pathways have in common: the intersection over union (IoU) of the units that they use.

Axes: `N` examples, `L` MoE layers, `T` tokens, `E` experts, `M` rows of a layer's bank, `K` classes.

A unit is (layer, row). A pathway uses the rows of the experts that it chooses, a static mask those that it keeps; with
`experts="subset"` a row is an output channel of the Dense layer, so that the two compare (Zhang et al., 2023, fig. 6).
`Units` hold per layer which rows each expert uses, (E, M) booleans; a mask is a layer's only expert, (1, M).

Where tokens are routed one by one, pathways are (N, L, T) and a unit is (layer, token, row).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.moe.layer import MoELayer

Units = Sequence[Tensor]
"""Per MoE layer, in the pathway's order, which rows each expert uses, (E, M) booleans."""

Weighted = tuple[Tensor, Tensor]
"""Values and their weights, which sum to 1."""

_WIDTHS = (400, 200, 100, 50, 25)
"""Bins in 0 ... 1 that histograms may have, so that those of several runs fall on one grid."""

_MOST_BINS = 40


def units_of(model: nn.Module) -> list[Tensor]:
    """Which rows each expert of each MoE layer uses, L of (E, M) booleans. Raises `ValueError` without MoE layers."""
    layers = {module.layer: module for module in model.modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(f"model must have MoE layers, got {type(model).__name__} with none")
    found = []
    for _, layer in sorted(layers.items()):
        units = torch.zeros(layer.num_experts, layer.bank_rows, dtype=torch.bool)
        for expert, rows in enumerate(layer.rows):
            units[expert, rows] = True
        found.append(units)
    return found


def read_masks(path: Path) -> list[Tensor]:
    """The static mask that a sparse run keeps in `masks.json`, as units: L of (1, M) booleans.

    Raises `ValueError`, which names the file, for one that holds no masks.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a sparse run's masks in JSON, got {type(error).__name__}") from None
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{path} must hold the masks of 1 layer or more under layers, got {layers!r}")
    return [_read_mask(path, index, layer) for index, layer in enumerate(layers)]


def _read_mask(path: Path, index: int, layer: object) -> Tensor:
    match layer:
        case {"layer": int(number), "of": int(count), "rows": list(rows)} if number == index and count >= 1:
            if rows and len(set(map(str, rows))) == len(rows) and all(type(r) is int and 0 <= r < count for r in rows):
                mask = torch.zeros(1, count, dtype=torch.bool)
                mask[0, rows] = True
                return mask
    rule = f'layer {index} must be {{"layer": {index}, "of": C, "rows": [...]}} with rows in 0 ... C - 1, none twice'
    raise ValueError(f"{path}: {rule}, got {str(layer)[:80]}")


def require_same_banks(name: str, units: Units, others: Units) -> None:
    """Raise `ValueError`, which names `name`, where the units' rows are not those of `others`."""
    if len(units) != len(others):
        raise ValueError(f"{name} must have the run's {len(units)} MoE layers, got {len(others)}")
    for layer, (unit, other) in enumerate(zip(units, others, strict=True)):
        if unit.shape[1] != other.shape[1]:
            rule = f"{name} must have {unit.shape[1]} rows in MoE layer {layer}, as the run has"
            raise ValueError(f"{rule}, got {other.shape[1]}: the backbones or expert layouts differ")


def iou(pathway: Tensor, other: Tensor, units: Units, others: Units) -> Tensor:
    """The IoU of each example's pathway with its other one, (N,) float64.

    Args:
        pathway, other: (N, L), or both (N, L, T). units, others: of the model of each. A mask is `others`, and `other`
            all zeros.
    """
    choices, units = _by_choice(pathway, units)
    theirs, others = _by_choice(other, others)
    tables = zip(_tables(units, others), choices.T, theirs.T, strict=True)
    shared = torch.stack([table[mine, yours] for table, mine, yours in tables]).sum(0).double()
    return shared / (sum(_sizes(units)) + sum(_sizes(others)) - shared)


def pair_sums(
    pathway: Tensor, other: Tensor, units: Units, others: Units, groups: Tensor, other_groups: Tensor, count: int
) -> Tensor:
    """The sums of the IoU over all pairs of a pathway and an other one, by their groups 0 ... `count` - 1: (K, K).

    Args: as of `iou`, but that there may be more of one than of the other; groups, other_groups: each one's, (N,).
    """
    choices, units = _by_choice(pathway, units)
    theirs, others = _by_choice(other, others)
    size = sum(_sizes(units)) + sum(_sizes(others))
    mine, my_groups, my_weights = _distinct(choices, groups)
    yours, your_groups, your_weights = _distinct(theirs, other_groups)
    # What a choice shares with each of the other's experts, layer by layer: its product with a one-hot choice counts.
    columns = zip(_tables(units, others), mine.T, strict=True)
    shared_with = torch.cat([table[choice].float() for table, choice in columns], 1)
    sums = torch.zeros(count, count, dtype=torch.float64)
    step = max(1, 4_000_000 // len(mine))
    for first in range(0, len(yours), step):
        part = slice(first, first + step)
        experts = zip(others, yours[part].T, strict=True)
        chosen = torch.cat([torch.nn.functional.one_hot(e, len(unit)).float() for unit, e in experts], 1)
        shared = (shared_with @ chosen.T).double()
        found = shared / (size - shared) * my_weights[:, None] * your_weights[part]
        rows = torch.zeros(count, found.shape[1], dtype=torch.float64).index_add_(0, my_groups, found)
        sums.index_add_(1, your_groups[part], rows)
    return sums


def class_means(pathway: Tensor, labels: Tensor, units: Units, count: int) -> Tensor:
    """The mean IoU of two images' pathways by their classes, (K, K); NaN where there are no two such images.

    Args: pathway: (N, L) or (N, L, T). labels: (N,) of 0 ... K - 1. count: K. No image is paired with itself.
    """
    sums, pairs = _class_pairs(pathway, labels, units, count)
    return sums / pairs.where(pairs > 0, torch.nan)


def within_and_between(pathway: Tensor, labels: Tensor, units: Units, count: int) -> tuple[float | None, float | None]:
    """The mean IoU over all pairs of images of one class, and of different classes; None where there is no pair."""
    sums, pairs = _class_pairs(pathway, labels, units, count)
    same = torch.eye(count, dtype=torch.bool)
    return _ratio(sums[same], pairs[same]), _ratio(sums[~same], pairs[~same])


def mean_of_others(pathway: Tensor, other: Tensor, units: Units, others: Units) -> float | None:
    """The mean IoU of an example's pathway with the other one of each different example; None of one example."""
    n = len(pathway)
    together = torch.zeros(n, dtype=torch.long)
    every = pair_sums(pathway, other, units, others, together, together, 1)
    own = iou(pathway, other, units, others).sum()
    return _ratio((every - own).flatten(), torch.tensor([n * (n - 1)]))


def _class_pairs(pathway: Tensor, labels: Tensor, units: Units, count: int) -> tuple[Tensor, Tensor]:
    """Sums of the IoU, and numbers of pairs, by the classes of two different images: (K, K) each."""
    sizes = torch.bincount(labels, minlength=count).double()
    sums = pair_sums(pathway, pathway, units, units, labels, labels, count) - sizes.diag()
    return sums, sizes[:, None] * sizes - sizes.diag()


def _ratio(sums: Tensor, pairs: Tensor) -> float | None:
    return float(sums.sum() / pairs.sum()) if pairs.sum() > 0 else None


def random_pathways(units: Units, others: Units, tokens: int = 1) -> Weighted:
    """The exact distribution of the IoU where every choice is random: uniform, and independent of all others.

    Args: units, others: as of `iou`; of a mask there is but one choice. tokens: T.
    """
    layers = []
    for table in _tables(units, others):
        shared, counts = table.unique(return_counts=True)
        probabilities = np.zeros(int(shared.max()) + 1)
        probabilities[shared.numpy()] = counts.numpy() / table.numel()
        layers += [probabilities] * tokens
    return _summed(layers, tokens * (sum(_sizes(units)) + sum(_sizes(others))))


def random_masks(units: Units, masks: Units) -> Weighted:
    """The exact distribution of the IoU of a pathway with random masks that keep as many rows of each layer as `masks`,
    any set of them alike: the overlap in a layer is hypergeometric.
    """
    kept = _sizes(masks)
    layers = [
        _hypergeometric(rows, size, mask.shape[1])
        for rows, size, mask in zip(_sizes(units), kept, masks, strict=True)
    ]  # fmt: skip
    return _summed(layers, sum(_sizes(units)) + sum(kept))


def _hypergeometric(used: int, kept: int, rows: int) -> np.ndarray:
    """The probability that 0, 1, ... of the `used` rows are among the `kept` ones of `rows`."""
    total = math.comb(rows, kept)
    return np.array([math.comb(used, both) * math.comb(rows - used, kept - both) / total for both in range(kept + 1)])


def _summed(layers: Sequence[np.ndarray], size: int) -> Weighted:
    """The distribution of the IoU, where `layers` are those of each layer's shared units, which are independent."""
    shared = np.ones(1)
    for layer in layers:
        (some,) = layer.nonzero()
        if len(some) <= 4:  # of few experts: far cheaper than a convolution
            longer = np.zeros(len(shared) + int(some[-1]))
            for value in some:
                longer[value : value + len(shared)] += layer[value] * shared
            shared = longer
        else:
            shared = np.convolve(shared, layer)
    values = torch.arange(len(shared), dtype=torch.float64)
    weights = torch.from_numpy(shared)
    possible = weights > 0
    values, weights = values[possible], weights[possible]
    return values / (size - values), weights


def moments(found: Weighted) -> tuple[float, float]:
    """Mean and standard deviation."""
    values, weights = found
    mean = float((values * weights).sum())
    return mean, math.sqrt(max(0.0, float(((values - mean) ** 2 * weights).sum())))


def equally(values: Tensor) -> Weighted:
    """Values (N,) that weigh the same."""
    return values, torch.full((len(values),), 1 / len(values), dtype=torch.float64)


def histograms(measured: Mapping[str, Tensor], expected: Mapping[str, Weighted]) -> dict[str, dict[str, list[float]]]:
    """Histograms on one grid, {"edges", "shares"} by name, of numbers in 0 ... 1; shares sum to 1.

    The grid reaches over all that is measured and the middle 99.8% of what is expected, whose tails are in the bins at
    the ends; its edges are multiples of 1/400, or of up to 1/25 where the range is wide.
    """
    ends = [end for values in measured.values() for end in (float(values.min()), float(values.max()))]
    for values, weights in expected.values():
        middle = values[(weights.cumsum(0) >= 0.001) & (weights.flip(0).cumsum(0).flip(0) >= 0.001)]
        ends += [float(middle[0]), float(middle[-1])]
    for bins in _WIDTHS:
        first, last = _bin(torch.tensor([min(ends), max(ends)], dtype=torch.float64), bins).tolist()
        if last - first < _MOST_BINS:
            break
    grid = [bin_ / bins for bin_ in range(first, last + 2)]
    found = {}
    for name, (values, weights) in ({name: equally(each) for name, each in measured.items()} | dict(expected)).items():
        at = _bin(values, bins).clamp(first, last) - first
        shares = torch.zeros(last - first + 1, dtype=torch.float64).index_add_(0, at, weights)
        found[name] = {"edges": grid, "shares": shares.tolist()}
    return found


def _bin(values: Tensor, bins: int) -> Tensor:
    """The bin of each value; one on an edge is above it, also where its float lies a rounding error below."""
    return (values.double() * bins + 1e-9).floor().long().clamp(0, bins - 1)


def _by_choice(pathway: Tensor, units: Units) -> tuple[Tensor, list[Tensor]]:
    """(N, L, T) as (N, L * T), with the units of each column; (N, L) as it is. Raises `ValueError` for other shapes."""
    if pathway.dim() not in (2, 3) or pathway.shape[1] != len(units) or 0 in pathway.shape:
        rule = f"(N, L) or (N, L, T), N >= 1, with the L = {len(units)} layers of its units"
        raise ValueError(f"pathway must be {rule}, got shape {tuple(pathway.shape)}")
    tokens = pathway.shape[2] if pathway.dim() == 3 else 1
    return pathway.flatten(1).long().cpu(), [unit for unit in units for _ in range(tokens)]


def _sizes(units: Units) -> list[int]:
    """How many rows an expert of each layer uses. Raises `ValueError` where a layer's experts differ in it."""
    sizes = [unit.sum(1).unique().tolist() for unit in units]
    for layer, found in enumerate(sizes):
        if len(found) != 1:
            raise ValueError(f"experts of a layer must use equally many rows, got {found} in layer {layer}")
    return [size for (size,) in sizes]


def _tables(units: Units, others: Units) -> list[Tensor]:
    """Per layer, how many rows each expert shares with each of the other's, (E, E')."""
    return [unit.long() @ other.long().T for unit, other in zip(units, others, strict=True)]


def _distinct(choices: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pathways of each group, (D, L), their groups (D,), and how often each occurs there (D,)."""
    found, counts = torch.cat([groups[:, None], choices], 1).unique(dim=0, return_counts=True)
    return found[:, 1:], found[:, 0], counts.double()

"""How much pathways have in common: the intersection over union (IoU) of the units that they use.

Axes: `N` examples, `D` distinct pathways, `L` MoE layers, `T` tokens, `E` experts, `M` rows of a layer's bank, `K`
classes.

A unit is (layer, row). A pathway uses the rows of the experts that it chooses, a static mask the rows that it does not
prune. With `experts="subset"` a row is an output channel of the Dense layer, so that the two can be compared (Zhang et
al., 2023, fig. 6). `Units` say per layer which rows each expert uses, (E, M) booleans; a mask is a layer's only expert,
(1, M).

Where tokens are routed one by one, pathways are (N, L, T) and a unit is (layer, token, row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from advmoe.errors import InputError
from advmoe.files import read_object
from advmoe.moe.layer import moe_layers
from advmoe.text import one_line, show

_MOST_CHANNELS = 1_000_000
"""Of a layer."""

Units = Sequence[Tensor]
"""Per MoE layer, in the pathway's order, which rows each expert uses, (E, M) booleans."""

_PAIRS = 4_000_000
"""Pairs of pathways compared at once: bounds the memory."""


def units_of(model: nn.Module) -> list[Tensor]:
    """Which rows each expert of each MoE layer uses, L of (E, M) booleans. Raises `ValueError` without MoE layers."""
    layers = {each.layer: each for each in moe_layers(model)}
    if not layers:
        raise InputError(f"model must have MoE layers, got {type(model).__name__} with none")
    units = []
    for layer in layers.values():
        used = torch.zeros(layer.num_experts, layer.bank_rows, dtype=torch.bool)
        for expert, rows in enumerate(layer.rows):
            used[expert, rows] = True
        units.append(used)
    return units


def read_masks(path: Path) -> list[Tensor]:
    """The static mask in a sparse run's `masks.json`, as units: L of (1, M) booleans.

    Raises `ValueError`, which names the file, for one without masks.
    """
    try:
        layers = read_object(path).get("layers")
    except OSError as error:
        raise InputError(f"{path} must be a sparse run's masks in JSON, got {one_line(error)}") from None
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{path} must hold the masks of 1 layer or more under layers, got {show(layers)}")
    return [_read_mask(path, index, layer) for index, layer in enumerate(layers)]


def _read_mask(path: Path, index: int, layer: object) -> Tensor:
    match layer:
        case {"layer": int(number), "of": int(count), "rows": [*rows]} if number == index and rows:
            known = all(type(row) is int and 0 <= row < count <= _MOST_CHANNELS for row in rows)
            if known and len(set(rows)) == len(rows):
                mask = torch.zeros(1, count, dtype=torch.bool)
                mask[0, rows] = True
                return mask
    rule = f'{{"layer": {index}, "of": C, "rows": [...]}} with rows among 0 ... C - 1, one at least and none twice'
    raise InputError(f"{path}: layer {index} must be {rule}, got {show(layer)}")


def require_same_banks(name: str, units: Units, others: Units) -> None:
    """Raise `ValueError`, which calls the others `name`, where their layers or rows are not those of `units`."""
    if len(units) != len(others):
        raise InputError(f"{name} must have the run's {len(units)} MoE layers, got {len(others)}")
    for layer, (unit, other) in enumerate(zip(units, others, strict=True)):
        if unit.shape[1] != other.shape[1]:
            rule = f"{name} must have {unit.shape[1]} rows in MoE layer {layer}, as the run has"
            raise InputError(f"{rule}, got {other.shape[1]}: backbone, width or expert layout differ")


def iou(pathway: Tensor, other: Tensor, units: Units, others: Units) -> Tensor:
    """The IoU of each example's pathway with its other one, (N,) float64.

    Args:
        pathway, other: (N, L), or both (N, L, T); zeros for a mask. units, others: of the model, or mask, of each.
    """
    choices, units = _columns(pathway, units)
    other_choices, others = _columns(other, others)
    layers = zip(_shared_rows(units, others), choices.T, other_choices.T, strict=True)
    shared = torch.stack([table[choice, other_choice] for table, choice, other_choice in layers]).sum(0).double()
    return shared / (size(units) + size(others) - shared)


@dataclass(frozen=True)
class ClassOverlap:
    """The mean IoU of two images' pathways, no image being paired with itself."""

    means: Tensor
    """By the classes of the two, (K, K) float64; NaN where there are no two such images."""
    within: float | None
    """Over all pairs of images of one class; None without any."""
    between: float | None
    """Over all pairs of images of different classes; None without any."""


def class_overlap(pathway: Tensor, labels: Tensor, units: Units, count: int) -> ClassOverlap:
    """How alike the pathways of a class, and of different classes, are.

    Args: pathway: (N, L) or (N, L, T). labels: (N,) of 0 ... K - 1. count: K.
    """
    sizes = torch.bincount(labels, minlength=count).double()
    groups = _grouped(pathway, units, labels)
    sums = _pair_sums(groups, groups, count) - sizes.diag()
    pairs = sizes[:, None] * sizes - sizes.diag()
    same = torch.eye(count, dtype=torch.bool)
    return ClassOverlap(
        sums / pairs.where(pairs > 0, torch.nan), _ratio(sums[same], pairs[same]), _ratio(sums[~same], pairs[~same])
    )


def mean_of_others(pathway: Tensor, other: Tensor, units: Units, others: Units) -> float | None:
    """The mean IoU of an example's pathway with the other one of each different example; None of one example.

    Args: as of `iou`, whose mean exceeds this where the two agree about examples, not just about how often they choose
    each expert.
    """
    n = len(pathway)
    together = torch.zeros(n, dtype=torch.long)
    every = _pair_sums(_grouped(pathway, units, together), _grouped(other, others, together), 1)
    own = iou(pathway, other, units, others).sum()
    return _ratio(every - own, torch.tensor(n * (n - 1)))


def _ratio(sums: Tensor, pairs: Tensor) -> float | None:
    return float(sums.sum() / pairs.sum()) if pairs.sum() > 0 else None


class _Groups(NamedTuple):
    """The distinct pathways of each group of examples."""

    choices: Tensor
    """(D, L), or (D, L * T) where tokens are routed one by one."""
    units: list[Tensor]
    """Of each column of `choices`."""
    groups: Tensor
    """The group of each pathway, (D,)."""
    counts: Tensor
    """How often each pathway occurs in its group, (D,) float64."""


def _grouped(pathway: Tensor, units: Units, groups: Tensor) -> _Groups:
    """The distinct pathways, (N, L) or (N, L, T), by the group of their examples, (N,)."""
    choices, units = _columns(pathway, units)
    distinct, counts = torch.cat([groups[:, None], choices], 1).unique(dim=0, return_counts=True)
    return _Groups(distinct[:, 1:], units, distinct[:, 0], counts.double())


def _pair_sums(mine: _Groups, theirs: _Groups, count: int) -> Tensor:
    """The sums of the IoU over all pairs of pathways, by their groups 0 ... `count` - 1: (count, count)."""
    whole = size(mine.units) + size(theirs.units)
    # What a choice shares with each of the other's experts, layer by layer: its product with a one-hot choice counts.
    layers = zip(_shared_rows(mine.units, theirs.units), mine.choices.T, strict=True)
    shared_with = torch.cat([table[choice].double() for table, choice in layers], 1)
    sums = torch.zeros(count, count, dtype=torch.float64)
    for part in torch.arange(len(theirs.choices)).split(max(1, _PAIRS // len(mine.choices))):
        columns = zip(theirs.units, theirs.choices[part].T, strict=True)
        chosen = torch.cat([one_hot(choice, len(unit)).double() for unit, choice in columns], 1)
        shared = shared_with @ chosen.T
        weighted = shared / (whole - shared) * mine.counts[:, None] * theirs.counts[part]
        rows = torch.zeros(count, len(part), dtype=torch.float64).index_add_(0, mine.groups, weighted)
        sums.index_add_(1, theirs.groups[part], rows)
    return sums


def _columns(pathway: Tensor, units: Units) -> tuple[Tensor, list[Tensor]]:
    """(N, L, T) as (N, L * T), with the units of each column; (N, L) as it is. Raises `ValueError` for other shapes."""
    if pathway.dim() not in (2, 3) or pathway.shape[1] != len(units) or 0 in pathway.shape:
        rule = f"(N, L) or (N, L, T), N >= 1, with the L = {len(units)} layers of its units"
        raise InputError(f"pathway must be {rule}, got shape {tuple(pathway.shape)}")
    tokens = pathway.shape[2] if pathway.dim() == 3 else 1
    return pathway.flatten(1).long().cpu(), [unit for unit in units for _ in range(tokens)]


def size(units: Units) -> int:
    """The number of units that a pathway uses. Raises `ValueError` where that depends on the pathway."""
    sizes = [unit.sum(1).unique().tolist() for unit in units]
    for layer, rows in enumerate(sizes):
        if len(rows) != 1:
            raise InputError(f"experts of a layer must use equally many rows, got {rows} in layer {layer}")
    return sum(rows for (rows,) in sizes)


def _shared_rows(units: Units, others: Units) -> list[Tensor]:
    """Per layer, how many rows each expert shares with each of the other's, (E, E')."""
    return [unit.long() @ other.long().T for unit, other in zip(units, others, strict=True)]

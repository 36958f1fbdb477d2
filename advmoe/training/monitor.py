"""An epoch in numbers: mean losses, and how each MoE layer used its experts.

Axes: `E` experts, the most of any layer, `L` MoE layers, `N` samples (tokens, where those are routed one by one).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.moe.routing import Routing
from advmoe.training.objectives import stacked_choices, stacked_scores
from advmoe.training.processes import total


class LayerUse:
    """Expert counts (L, E) and summed routing entropy (L,) of an epoch's clean passes. Where a layer does not have an
    expert, its count is -inf.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.entropy: Tensor | None = None

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count one pass."""
        if not routing.scores:
            return
        scores, experts = stacked_scores(routing)
        every = torch.arange(scores.shape[2], device=scores.device)
        counts = (stacked_choices(routing)[:, :, None] == every).sum(1).float()
        if min(experts) < len(every):
            lacking = torch.tensor(experts, device=scores.device)[:, None] <= every
            counts = counts.masked_fill(lacking, -math.inf)
        entropy = torch.special.entr(scores.softmax(2)).sum((1, 2))
        self.counts = counts if self.counts is None else self.counts + counts
        self.entropy = entropy if self.entropy is None else self.entropy + entropy

    def loads(self) -> list[list[float]]:
        """Share of samples of each expert, per layer, on this process."""
        if self.counts is None:
            return []
        return [[round(v, 4) for v in (c / c.sum()).tolist()] for c in _present(self.counts)]

    def report(self, fabric: Fabric) -> list[dict[str, Any]]:
        """Per MoE layer: load (E shares), entropy of the softmax of the scores in nats, experts that no sample
        chose.
        """
        if self.counts is None or self.entropy is None:
            return []
        counts, entropy = total(fabric, self.counts), total(fabric, self.entropy)
        report = []
        for layer, (c, h) in enumerate(zip(_present(counts), entropy, strict=True)):
            dead = (c == 0).nonzero().flatten().tolist()
            load = [round(v, 6) for v in (c / c.sum()).tolist()]
            report.append({"layer": layer, "load": load, "entropy": (h / c.sum()).item(), "dead_experts": dead})
        return report


def _present(counts: Tensor) -> list[Tensor]:
    """Each layer's counts, of the experts that it has."""
    return [layer[layer >= 0] for layer in counts]


class EpochMeans:
    """Sample-weighted means of named numbers, by level; they stay on the device until the epoch ends."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, float] = {}

    def add(self, level: str, values: dict[str, Tensor], count: int) -> None:
        """Add the means `values` of `count` samples."""
        sums = self.sums.setdefault(level, {})
        self.counts[level] = self.counts.get(level, 0) + count
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.detach().float() * count

    def report(self, fabric: Fabric) -> dict[str, dict[str, float]]:
        """The means over all processes, whose shares are equal."""
        result = {}
        for level, sums in self.sums.items():
            stacked = total(fabric, torch.stack(list(sums.values()))) / (self.counts[level] * fabric.world_size)
            result[level] = dict(zip(sums, stacked.tolist(), strict=True))
        return result

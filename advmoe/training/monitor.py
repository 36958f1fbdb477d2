"""What an epoch leaves behind for its reader: mean losses, and how each MoE layer used its experts.

Axes: `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.moe.routing import Routing
from advmoe.training.processes import total


class LayerUse:
    """Expert counts and routing entropy of each MoE layer, gathered over the clean passes of an epoch."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.entropy: dict[int, Tensor] = {}

    def add(self, routing: Routing) -> None:
        """Count one pass."""
        for layer, scores in routing.scores.items():
            scores = scores.detach()
            counts = torch.bincount(routing.choices[layer], minlength=scores.shape[1]).float()
            entropy = torch.special.entr(scores.softmax(1)).sum()
            self.counts[layer] = self.counts.get(layer, 0) + counts
            self.entropy[layer] = self.entropy.get(layer, 0) + entropy

    def loads(self) -> list[list[float]]:
        """Share of samples of each expert, per layer, on this process."""
        return [[round(v, 4) for v in (c / c.sum()).tolist()] for _, c in sorted(self.counts.items())]

    def report(self, fabric: Fabric) -> list[dict[str, Any]]:
        """Per MoE layer: load (E shares), entropy of the softmax of the scores in nats, experts that no sample
        chose.
        """
        if not self.counts:
            return []
        layers = sorted(self.counts)
        counts = total(fabric, torch.stack([self.counts[layer] for layer in layers]))
        entropy = total(fabric, torch.stack([self.entropy[layer] for layer in layers]))
        report = []
        for layer, c, h in zip(layers, counts, entropy, strict=True):
            dead = (c == 0).nonzero().flatten().tolist()
            load = [round(v, 6) for v in (c / c.sum()).tolist()]
            report.append({"layer": layer, "load": load, "entropy": (h / c.sum()).item(), "dead_experts": dead})
        return report


class EpochMeans:
    """Sample-weighted means of named numbers, by level, kept on the device until the epoch ends."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.counts: dict[str, int] = {}

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

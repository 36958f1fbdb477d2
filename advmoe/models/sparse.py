"""Sparse-CNN: a Dense backbone of which learnt masks keep some channels, the same ones for every image.

Every channel of a group (see `channels`) has a score. The best `scale` of a group, rounded as S-Dense rounds, survive.
No layer reads a dropped channel: its columns of every reader's weights are multiplied by 0. It is still computed, so
that the gradient of its score says what reading it would do. Were its own filter masked too, its batch norm would see
a constant, and it could never come back.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from advmoe.models.channels import Axis, channel_layout
from advmoe.models.layers import narrowed


class SparseBackbone(nn.Module):
    """The Dense backbone `dense` under masks that keep `scale` of each group's channels."""

    def __init__(self, dense: nn.Module, scale: float) -> None:
        super().__init__()
        self.dense = dense
        self.layout = channel_layout(dense)
        self.keep = tuple(narrowed(size, scale) for size in self.layout.sizes)
        self.scores = nn.ParameterList(torch.empty(size) for size in self.layout.sizes)
        self.reset_scores()

    @torch.no_grad()
    def reset_scores(self) -> None:
        """Score each channel by the norm of the weights that its mask multiplies, the largest of a group being
        sqrt(6 / C): HYDRA's scaled initialisation (Sehwag et al., NeurIPS 2020) of weights' scores, for channels.

        So learning starts from the mask of the largest weights, at scores that its steps can reorder. On the meta
        device nothing is scored.
        """
        if any(score.is_meta for score in self.scores):
            return
        squares = [torch.zeros(size, dtype=torch.float64, device=s.device) for size, s in self._sized()]
        for name, axis in self._masked():
            weight = self.dense.get_submodule(name).get_parameter("weight")
            columns = weight.double().contiguous().square().transpose(0, 1).flatten(1).sum(1)
            parts = columns.view(-1, axis.repeat).sum(1).split([self.layout.sizes[g] for g in axis.groups])
            for group, part in zip(axis.groups, parts, strict=True):
                squares[group] += part
        for score, square in zip(self.scores, squares, strict=True):
            score.copy_(math.sqrt(6 / len(square)) * (square / square.max().clamp(min=1e-30)).sqrt())

    def _sized(self) -> list[tuple[int, Tensor]]:
        return list(zip(self.layout.sizes, self.scores, strict=True))

    def _masked(self) -> list[tuple[str, Axis]]:
        """The layers that read masked channels, by name, and which ones."""
        return [(name, axis) for name, axis in self.layout.inputs.items() if axis.groups]

    def surviving_channels(self) -> list[Tensor]:
        """The channels of each group that its mask keeps, in order; of equal scores the first are taken."""
        best = (
            s.detach().argsort(descending=True, stable=True)[:k] for s, k in zip(self.scores, self.keep, strict=True)
        )
        return [channels.sort().values for channels in best]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W). Gradients reach the scores straight through the masks."""
        masks = [
            torch.zeros_like(score).index_fill(0, channels, 1) + (score - score.detach())
            for score, channels in zip(self.scores, self.surviving_channels(), strict=True)
        ]
        weights = {}
        for name, axis in self._masked():
            weight = self.dense.get_submodule(name).get_parameter("weight")
            columns = torch.cat([masks[g] for g in axis.groups]).repeat_interleave(axis.repeat)
            weights[f"{name}.weight"] = weight * columns.view(1, -1, *[1] * (weight.dim() - 2))
        logits: Tensor = functional_call(self.dense, weights, (x,))
        return logits


def scores_of(model: nn.Module) -> list[nn.Parameter]:
    """The channel scores of a sparse model; of any other none."""
    return [score for module in model.modules() if isinstance(module, SparseBackbone) for score in module.scores]

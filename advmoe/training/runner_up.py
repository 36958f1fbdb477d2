"""Experts that forgive a flip: the pathway that an image would take if its closest choice went the other way is trained
too (`training.runner_up`).

Axes: `N` batch, `M` images of it, `L` MoE layers, `E` experts, `C H W` image, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.moe.routing import Routing, route

Predict = Callable[[Tensor], Tensor]


class Search(Protocol):
    """An inner maximisation of the KL from `target` (M, K) that starts at images `x` (M, C, H, W)."""

    def __call__(self, predict: Predict, x: Tensor, *, target: Tensor) -> Tensor:
        """Adversarial pixels (M, C, H, W)."""


def runner_up(routing: Routing) -> tuple[Tensor, Tensor]:
    """Each image's runner-up pathway, (N, L), and how close its choice of it was, (N,), of a finished pass.

    The layer whose best two scores are closest takes its second expert, and with it every layer that is as close:
    layers that one bit drives change together. Closeness is twice the second expert's probability beside the first's, 1
    at a tie.
    """
    scores = torch.stack([routing.scores[layer].float() for layer in sorted(routing.scores)], 1)
    values, experts = scores.topk(2, 2)
    lead = values[..., 0] - values[..., 1]
    least = lead.amin(1, keepdim=True)
    return torch.where(lead <= least, experts[..., 1], experts[..., 0]), 2 * torch.sigmoid(-least[:, 0])


def along(predict: Predict, pathways: Tensor) -> Predict:
    """`predict` with every image on the pathway that `pathways` (M, L) names for it."""

    def predicted(x: Tensor) -> Tensor:
        with route(forced=pathways):
            return predict(x)

    return predicted


@dataclass(frozen=True)
class OtherWay:
    """Images of a batch with an attack on their runner-up pathway."""

    index: Tensor
    """Their places in the batch, (M,)."""
    pathways: Tensor
    """(M, L)."""
    closeness: Tensor
    """Weights in (0, 1], (M,)."""
    x_adv: Tensor
    """Adversarial pixels, (M, C, H, W)."""

    @staticmethod
    def of(predict: Predict, x: Tensor, share: float, search: Search, target: Tensor | None = None) -> OtherWay:
        """The `share` of images `x` (N, C, H, W) whose choices are closest, one at least, attacked on the runner-up.

        Args:
            predict: a routed model in eval mode, (N, C, H, W) -> logits (N, K).
            search: leads away from `target`, logits (N, K), by default the model's own of the clean images.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), route() as routing:
            clean = predict(x)
        pathways, closeness = runner_up(routing)
        index = closeness.topk(max(1, round(share * len(x)))).indices
        few = x[index].contiguous(memory_format=torch.channels_last)
        x_adv = search(along(predict, pathways[index]), few, target=(clean if target is None else target)[index])
        return OtherWay(index, pathways[index], closeness[index].detach(), x_adv)

    def loss(self, predict: Predict, logits: Tensor, weight: float) -> Tensor:
        """weight / N * sum_i closeness_i * KL(logits_i || f'(x_i + delta_i)): what the clean image is by `logits` (N,
        K), it is to remain on its runner-up pathway f' under attack.
        """
        there = F.log_softmax(along(predict, self.pathways)(self.x_adv).float(), 1)
        clean = F.log_softmax(logits.float(), 1)[self.index]
        each = F.kl_div(there, clean, reduction="none", log_target=True).sum(1)
        return weight * (self.closeness * each).sum() / len(logits)

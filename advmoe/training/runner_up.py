"""Experts that forgive a flip: the pathway that an image would take if a choice went the other way is trained too
(`training.runner_up`).

Axes: `N` batch, `M` images of it, `L` MoE layers, `E` experts, `B` bits, `C H W` image, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.moe.routing import Routing, route
from advmoe.threat import ThreatModel

Predict = Callable[[Tensor], Tensor]


class Search(Protocol):
    """An inner maximisation of the KL from `target` (M, K) that starts at images `x` (M, C, H, W)."""

    def __call__(self, predict: Predict, x: Tensor, *, target: Tensor) -> Tensor:
        """Adversarial pixels (M, C, H, W)."""


class Flips(NamedTuple):
    """For each image of a batch a pathway that it does not take."""

    pathways: Tensor
    """(N, L)."""
    weights: Tensor
    """How much it matters, in [0, 1], (N,)."""
    near: Tensor
    """Larger where less is needed to get there, (N,)."""


def runner_up(routing: Routing) -> Flips:
    """The pathways behind the closest choices of a finished pass.

    The layer whose best two scores are closest takes its second expert, and with it every layer that is as close. The
    weight is twice the second expert's probability beside the first's: 1 at a tie.
    """
    scores = torch.stack([routing.scores[layer].float() for layer in sorted(routing.scores)], 1)
    values, experts = scores.topk(2, 2)
    lead = values[..., 0] - values[..., 1]
    least = lead.amin(1, keepdim=True)
    weights = 2 * torch.sigmoid(-least[:, 0])
    return Flips(torch.where(lead <= least, experts[..., 1], experts[..., 0]), weights, weights)


def worst_reachable(
    predict: Predict, router: HalfspaceRouter, x: Tensor, pathway: Tensor, target: Tensor, threat: ThreatModel
) -> Flips:
    """Of the pathways (N, L) that bits within `threat.eps` of flipping lead to, other than the image's own `pathway`,
    the one on which the clean image `x` (N, C, H, W) is told furthest from `target`, logits (N, K). The weight is 1
    where there is one, else 0.
    """
    radii = router.radii(x, threat.norm)
    layers = torch.tensor(router.layers, device=x.device)
    worst = torch.full((len(x),), -torch.inf, device=x.device)
    pathways = pathway
    for flipped in list(product((False, True), repeat=radii.shape[1]))[1:]:
        bits = torch.tensor(flipped, device=x.device)
        there = torch.where(bits[layers], 1 - pathway, pathway)
        far = _divergence(target, along(predict, there)(x))
        better = ((radii <= threat.eps) | ~bits).all(1) & (far > worst)
        worst, pathways = torch.where(better, far, worst), torch.where(better[:, None], there, pathways)
    return Flips(pathways, worst.isfinite().float(), -radii.amin(1))


def along(predict: Predict, pathways: Tensor) -> Predict:
    """`predict` with every image on the pathway that `pathways` (M, L) names for it."""

    def predicted(x: Tensor) -> Tensor:
        with route(forced=pathways):
            return predict(x)

    return predicted


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || logits) of each image, (M,)."""
    ours, theirs = (F.log_softmax(each.float(), 1) for each in (logits, target))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


@dataclass(frozen=True)
class OtherWay:
    """Images of a batch with an attack on a pathway that they do not take."""

    index: Tensor
    """Their places in the batch, (M,)."""
    pathways: Tensor
    """(M, L)."""
    weights: Tensor
    """(M,)."""
    x_adv: Tensor
    """Adversarial pixels, (M, C, H, W)."""

    @staticmethod
    def of(
        predict: Predict, router: nn.Module | None, x: Tensor, share: float, search: Search, threat: ThreatModel,
        target: Tensor | None = None,
    ) -> OtherWay:  # fmt: skip
        """The `share` of images `x` (N, C, H, W) that are nearest to another pathway, one at least, attacked on it: the
        worst that can be reached, where `router` chooses by half-spaces, else the runner-up.

        Args:
            predict: a routed model in eval mode, (N, C, H, W) -> logits (N, K).
            search: leads away from `target`, logits (N, K), by default the model's own of the clean images.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            with route() as routing:
                clean = predict(x)
            target = clean if target is None else target
            if isinstance(router, HalfspaceRouter):
                flips = worst_reachable(predict, router, x, routing.pathway(), target, threat)
            else:
                flips = runner_up(routing)
        index = flips.near.topk(max(1, round(share * len(x)))).indices
        few = x[index].contiguous(memory_format=torch.channels_last)
        pathways = flips.pathways[index]
        x_adv = search(along(predict, pathways), few, target=target[index])
        return OtherWay(index, pathways, flips.weights[index], x_adv)

    def loss(self, predict: Predict, logits: Tensor, weight: float) -> Tensor:
        """weight / N * sum_i w_i * KL(logits_i || f'(x_i + delta_i)): what the clean image is by `logits` (N, K), it is
        to remain on the other pathway f' under attack.
        """
        far = _divergence(logits[self.index], along(predict, self.pathways)(self.x_adv))
        return weight * (self.weights * far).sum() / len(logits)

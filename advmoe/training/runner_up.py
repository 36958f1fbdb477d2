"""Experts that forgive a flip: a pathway that an image would take if a choice went the other way is trained too
(`training.runner_up`).

Axes: `N` batch, `M` images of it, `L` MoE layers, `E` experts, `B` bits, `C H W` image, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.attacks.routed import Halfspaces
from advmoe.attacks.routed.regions import radii, reachable
from advmoe.errors import InputError
from advmoe.moe.routing import Routing, route
from advmoe.threat import ThreatModel
from advmoe.training.methods import learning

Predict = Callable[[Tensor], Tensor]
FEWEST = 2
"""Images that a pass in train mode needs: batch norms of one have no variance."""


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
    """The pathways behind the closest choices of a finished pass, in which images, not tokens, were routed.

    The layer whose best two scores are closest takes its second expert, and with it every layer that is as close. The
    weight is twice the second expert's probability beside the first's: 1 at a tie.
    """
    if any(scores.dim() > 2 or scores.shape[1] < 2 for scores in routing.scores.values()):
        rule = "0 for a model whose tokens are routed one by one, or with an MoE layer of one expert"
        raise InputError(f"training.runner_up must be {rule}, got more")
    pairs = {layer: scores.float().topk(2, 1) for layer, scores in routing.scores.items()}
    leads = {layer: (pair.values[:, 0] - pair.values[:, 1]) for layer, pair in pairs.items()}
    least = torch.stack(list(leads.values())).amin(0)
    unused = torch.zeros_like(least, dtype=torch.long)
    columns = [
        torch.where(leads[layer] <= least, pairs[layer].indices[:, 1], pairs[layer].indices[:, 0])
        if layer in pairs
        else unused
        for layer in range(max(pairs) + 1)
    ]
    weights = 2 * torch.sigmoid(-least)
    return Flips(torch.stack(columns, 1), weights, weights)


Worst = Callable[[Predict, Tensor, Tensor, Tensor], Flips]
"""`worst_reachable` of a router's half-spaces within a threat."""


def worst_reachable(
    predict: Predict, x: Tensor, pathway: Tensor, target: Tensor, *, space: Halfspaces, threat: ThreatModel
) -> Flips:
    """Of the pathways (N, L) behind bits that a perturbation within `threat` can flip, other than the image's own
    `pathway`, the one on which the clean image `x` (N, C, H, W) is told furthest from `target`, logits (N, K). The
    weight is 1 where there is one, else 0.
    """
    away = radii(space, x, threat.norm, rounding=-1)
    worst = torch.full((len(x),), -torch.inf, device=x.device)
    pathways = pathway
    for flipped, able in islice(reachable(space, x, threat), 1, None):  # without the image's own
        bits = torch.tensor(flipped, device=x.device)
        there = torch.where(bits[space.layers], 1 - pathway, pathway)
        far = _divergence(target, along(predict, there)(x))
        better = able & (far > worst)
        worst, pathways = torch.where(better, far, worst), torch.where(better[:, None], there, pathways)
    return Flips(pathways, worst.isfinite().float(), -away.amin(1))


def along(predict: Predict, pathways: Tensor) -> Predict:
    """`predict` with every image on the pathway that `pathways` (M, L) names for it, and the gradient of that pathway
    alone: none for the choice.
    """

    def predicted(x: Tensor) -> Tensor:
        with route(forced=pathways, gated=False):
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
        predict: Predict, x: Tensor, share: float, search: Search, worst: Worst | None = None,
        target: Tensor | None = None,
    ) -> OtherWay:  # fmt: skip
        """The `share` of images `x` (N, C, H, W) that are nearest to another pathway, two at least, attacked on it.

        Args:
            predict: a routed model in eval mode, (N, C, H, W) -> logits (N, K).
            search: leads away from `target`, logits (N, K), by default the model's own of the clean images.
            worst: finds the other pathways (see `worst_reachable`); by default they are the runners-up.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            with route() as routing:
                clean = predict(x).clone()  # what a replayed graph returns is overwritten by the next
            target = clean if target is None else target
            flips = runner_up(routing) if worst is None else worst(predict, x, routing.pathway(), target)
        index = flips.near.topk(min(len(x), max(FEWEST, round(share * len(x))))).indices
        few = x[index].contiguous(memory_format=torch.channels_last)
        pathways = flips.pathways[index]
        x_adv = search(along(predict, pathways), few, target=target[index])
        return OtherWay(index, pathways, flips.weights[index], x_adv)

    def loss(self, model: nn.Module, predict: Predict, logits: Tensor, weight: float) -> Tensor:
        """weight / N * sum_i w_i * KL(logits_i || f'(x_i + delta_i)): what the clean image is by `logits` (N, K), it is
        to remain on the other pathway f' under attack. Its gradient moves experts, not routers, and no statistics are
        recorded: images do not go that way.

        Args:
            model: the network behind `predict`, in train mode.
        """
        with learning(model, "experts", record=False):
            there = along(predict, self.pathways)(self.x_adv)
        return weight * (self.weights * _divergence(logits[self.index], there)).sum() / len(logits)

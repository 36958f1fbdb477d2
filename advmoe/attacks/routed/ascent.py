"""Two ascents on a routed model: of classification and router losses together, and along fixed pathways.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers, `T` tokens. Pixels and `eps` are in
[0, 1]. Where a model routes tokens one by one, scores are (N, T, E) and pathways (N, L, T).
A layer's margin is the mean over its tokens, and a choice has survived where every token's has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.pgd import LOSSES, ascend, margins
from advmoe.attacks.routed.target import Pass, RoutedTarget, hard_choice, router_margins

Anchor = Literal["current", "clean"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One way to make gradients of a routed model: what the search chooses among."""

    temperature: float | None = None
    """Of soft routing; None for the model's own hard choice with its straight-through gradient."""
    loss: str = "margin"
    """Of the classifier."""
    weight: float = 0.0
    """Of the routers' loss: the margin by which they choose the anchor's experts, mean over the layers. In units of the
    clean scores' spread against that of the clean logits: neither the scale of logits nor that of scores matters."""
    anchor: Anchor = "current"
    """Whose choice the routers are pushed off: the iterate's own, or the clean image's."""
    schedule: Schedule = "constant"
    """Steps of one size, or falling from 2 eps to 0."""

    def __str__(self) -> str:
        routing = "straight-through" if self.temperature is None else f"soft T={self.temperature:g}"
        routers = f" + {self.weight:g} x router margins ({self.anchor})" if self.weight else ""
        return f"{routing}, {self.loss}{routers}, {self.schedule} steps"


def step_sizes(schedule: Schedule, steps: int, step_size: float, eps: float) -> list[float]:
    """The size of each step: `step_size`, or a half cosine from 2 `eps` to 0."""
    if schedule == "constant":
        return [step_size] * steps
    return [eps * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def stride(step_size: float, steps: int, eps: float) -> float:
    """`step_size`, or as much as it takes for `steps` of it to cross the ball and come back: 2.5 `eps` in all."""
    return max(step_size, 2.5 * eps / steps)


def _exchange(clean: Pass, loss: str) -> Tensor:
    """What a unit of router margin is worth in units of the classifier's `loss`, (N,): by the spread of each.

    Without it logits multiplied by 10,000 would drown the routers' loss at any weight.
    """

    def spread(scores: Tensor) -> Tensor:
        return scores.float().amax(-1) - scores.float().amin(-1)

    routers = torch.stack([spread(each) for each in clean.scores], 1).flatten(1).mean(1).clamp_min(1e-12)
    return (1 if LOSSES[loss].scale_free else spread(clean.logits)) / routers


class FirstFooling:
    """For each image the first iterate that fools the model as deployed; until there is one, the last iterate seen.

    Nothing counts but `predict` without gradients: other passes round otherwise, and routers near a tie then choose
    otherwise.
    """

    def __init__(self, target: RoutedTarget, labels: Tensor, start: Tensor) -> None:
        self.predict, self.labels = target.predict, labels
        self.x_adv = start.clone()
        self.fooled = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)

    def look(self, x_adv: Tensor, promising: Tensor | None = None) -> None:
        """Take in the iterate `x_adv` (N, C, H, W), asking the model only about images that are `promising` (N,), by
        default about all.
        """
        usable = x_adv.flatten(1).isfinite().all(1) & ~self.fooled
        asked = (usable if promising is None else usable & promising).nonzero()[:, 0]
        self.x_adv = torch.where(usable[:, None, None, None], x_adv, self.x_adv)
        if len(asked):
            with torch.no_grad():
                self.fooled[asked] = self.predict(x_adv[asked]).argmax(1) != self.labels[asked]


def combined(
    target: RoutedTarget,
    x: Tensor,
    y: Tensor,
    combination: Combination,
    sizes: Sequence[float],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascend classification and router losses together from a random start, by steps of these `sizes` (`step_sizes`).

    Returns the adversarial images (N, C, H, W) and whether each fools `target.predict`, (N,): every iterate counts
    where the gradient pass is the deployed model's own, every fourth and the last where it is soft.
    """
    temperature, weight = combination.temperature, combination.weight
    classifier_loss = LOSSES[combination.loss].at(target.predict, x, y)
    with torch.no_grad():
        clean = target.model(x)
    worth = weight * _exchange(clean, combination.loss)
    promising: Tensor | None = None

    def objective(x_adv: Tensor) -> Tensor:
        nonlocal promising
        output = target.model(x_adv, temperature=temperature)
        promising = output.logits.argmax(1) != y if temperature is None else None
        total = classifier_loss(output.logits)
        if weight:
            pushed = clean.pathway if combination.anchor == "clean" else hard_choice(output.scores)
            total = total - (worth * router_margins(output.scores, pushed).flatten(1).mean(1)).sum()
        return total

    def visit(step: int, x_adv: Tensor) -> None:
        if temperature is None or step % 4 == 3:
            first.look(x_adv, promising)

    start = target.threat.random_start(x, generator)
    first = FirstFooling(target, y, start)
    first.look(ascend(objective, x, start, threat=target.threat, step_sizes=sizes, visit=visit))
    return first.x_adv, first.fooled


def along_pathway(
    target: RoutedTarget,
    x: Tensor,
    y: Tensor,
    forced: Tensor,
    sizes: Sequence[float],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack the network that the pathways `forced` (N, L) select, while its routers are pulled towards them, by steps
    of these `sizes`.

    A router counts until it chooses as forced (a hinge), so that the rest of the budget goes to the classifier. Returns
    the images (N, C, H, W) and whether each fools `target.predict` under its own routing, (N,): every iterate counts
    whose routers choose as forced, and every fourth and the last.
    """
    with torch.no_grad():
        worth = _exchange(target.model(x), "margin")
    promising: Tensor | None = None

    def objective(x_adv: Tensor) -> Tensor:
        nonlocal promising
        output = target.model(x_adv, forced=forced)
        # Where every router chooses as forced, the forced pass is the deployed model's own.
        promising = (hard_choice(output.scores) == forced).flatten(1).all(1) & (output.logits.argmax(1) != y)
        pull = router_margins(output.scores, forced).clamp_max(0).flatten(1).mean(1)
        return (margins(output.logits, y) + worth * pull).sum()

    def visit(step: int, x_adv: Tensor) -> None:
        first.look(x_adv, None if step % 4 == 3 else promising)

    start = target.threat.random_start(x, generator)
    first = FirstFooling(target, y, start)
    first.look(ascend(objective, x, start, threat=target.threat, step_sizes=sizes, visit=visit))
    return first.x_adv, first.fooled

"""Attacks on routed models: on the routers, on the pathways, and through what hard routing hides from a gradient.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers, `T` tokens. Pixels and `eps` are in
[0, 1]. Where a model routes tokens one by one, scores are (N, T, E) and pathways (N, L, T): a layer's margin is the
mean over its tokens, and a choice has survived where every token's has.

A hard choice has no gradient, so an attack that follows the model's own sees at most the straight-through estimate.
The parts here climb surrogates (soft routing, the routers' margins, fixed pathways) and need no gradient at all
(Square); what they find is scored under the model's own hard routing.
Sources: Athalye et al., ICML 2018 (attack what hides the gradient); Zhang et al., ICCV 2023, sec. 4 (the attacker fools
routers or experts); Andriushchenko et al., ECCV 2020 (Square).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from advmoe.attacks.autoattack import square_part
from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.attacks.routed.ascent import Combination, along_pathway, combined, step_sizes, stride
from advmoe.attacks.routed.regions import inside_regions
from advmoe.attacks.routed.search import Budget, RoutedPlan, Tried, plan_attack, search
from advmoe.attacks.routed.target import Halfspaces, Pass, RoutedModel, RoutedTarget, hard_choice, router_margins
from advmoe.progress import BRIEF, tracked


def routed_attack(target: RoutedTarget, plan: RoutedPlan, budget: Budget) -> Attack:
    """The attack `routed`: soft routing, router losses, fixed pathways, the strongest combination, Square.

    Of a target with `halfspaces` it is complete in the routing: every pathway that can be reached is attacked inside
    its own region too, as its settings say.
    """
    eps = target.threat.eps

    def climbing(name: str, combination: Combination, *, effort: int = 1) -> AttackPart:
        sizes = budget.sizes(effort * budget.steps, eps, combination.schedule)

        def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
            generator = torch.Generator().manual_seed(seed)
            return Proposals(
                _repeated(lambda x, y: combined(target, x, y, combination, sizes, generator), x, y, times=effort)
            )

        return AttackPart(name, run)

    parts = [climbing(f"soft T={t:g}", Combination(temperature=t)) for t in budget.temperatures]
    parts += [climbing(f"routers w={w:g}", Combination(weight=w)) for w in budget.weights]
    parts.append(AttackPart("pathways", lambda x, y, seed: _pathways(target, plan, budget, x, y, seed)))
    settings = {**asdict(budget), **plan.to_dict()}
    if target.halfspaces is not None:
        parts += [_inside(target, budget, "own region", False), _inside(target, budget, "other regions", True)]
        settings["routing"] = "complete"
    parts.append(climbing("strongest", plan.best, effort=2))
    flags: tuple[str, ...] = ("the black-box part is left out (0 queries)",)
    if budget.queries:
        parts.append(square_part(target.predict, threat=target.threat, queries=budget.queries))
        flags = ()
    return Attack("routed", tuple(parts), settings, flags)


def _repeated(attack: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, y: Tensor, *, times: int) -> Tensor:
    """The images that `attack` makes of `x`, (N, C, H, W); those that did not fool are tried again."""
    result, fooled = attack(x, y)
    for _ in range(times - 1):
        left = (~fooled).nonzero()[:, 0]
        if len(left) == 0:
            break
        result[left], fooled[left] = attack(x[left], y[left])
    return result


def _inside(target: RoutedTarget, budget: Budget, name: str, flipped: bool) -> AttackPart:
    """The attack on images' own pathways inside their regions, or on every other one within reach."""
    sizes = budget.sizes(budget.steps, target.threat.eps)

    def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
        generator = torch.Generator().manual_seed(seed)
        return Proposals(inside_regions(target, x, y, sizes, flipped=flipped, generator=generator)[0])

    return AttackPart(name, run)


def _pathways(target: RoutedTarget, plan: RoutedPlan, budget: Budget, x: Tensor, y: Tensor, seed: int) -> Proposals:
    """The attack along one candidate pathway after another, each on the images that those before did not break."""
    generator = torch.Generator().manual_seed(seed)
    sizes = budget.sizes(budget.pathway_steps, target.threat.eps)
    with torch.no_grad():
        clean = target.model(x)
    result, left = x.clone(), torch.arange(len(x), device=x.device)
    number = len(plan.pathways) + sum(scores.shape[-1] - 1 for scores in clean.scores)
    for forced in tracked(_candidates(clean, plan), "pathways", total=number, unit="pathway", delay=BRIEF):
        result[left], fooled = along_pathway(target, x[left], y[left], forced[left], sizes, generator)
        left = left[~fooled]
        if len(left) == 0:
            break
    return Proposals(result)


def _candidates(clean: Pass, plan: RoutedPlan) -> Iterator[Tensor]:
    """Pathways (N, L) to attack along: those that samples reach, then each image's own with one layer's choice
    changed.
    """
    for reached in plan.pathways:
        yield torch.tensor(reached, device=clean.pathway.device).expand_as(clean.pathway)
    for layer, scores in enumerate(clean.scores):
        for step in range(1, scores.shape[-1]):
            changed = clean.pathway.clone()
            changed[:, layer] = (changed[:, layer] + step) % scores.shape[-1]
            yield changed


__all__ = [
    "Budget", "Combination", "Halfspaces", "Pass", "RoutedModel", "RoutedPlan", "RoutedTarget", "Tried",
    "along_pathway", "combined", "hard_choice", "plan_attack", "routed_attack", "router_margins", "search",
    "step_sizes", "stride",
]  # fmt: skip

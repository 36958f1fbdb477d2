"""Before the attack: the strongest combination, by a search on some images, and the pathways that samples reach.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers, `T` tokens. Pixels and `eps` are in
[0, 1]. Where a model routes tokens one by one, scores are (N, T, E) and pathways (N, L, T).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.pgd import LOSSES, Loss, margins
from advmoe.attacks.routed.ascent import Anchor, Combination, Schedule, combined, step_sizes, stride
from advmoe.attacks.routed.target import RoutedTarget
from advmoe.progress import tracked


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work the attack does."""

    steps: int = 50
    """Gradient steps of parts (a) and (b), and twice that for the strongest combination."""
    step_size: float = 2 / 255
    """Longer where the steps could not cross the ball (see `stride`)."""
    temperatures: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Of soft routing, part (a)."""
    weights: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Of the routers' loss, part (b)."""
    pathways: int = 32
    """Of the pathways that samples reach, how many are attacked (the most frequent), part (c)."""
    pathway_steps: int = 20
    """Gradient steps along each fixed pathway."""
    queries: int = 25_000
    """Of Square, part (d): five times AutoAttack's; 0 leaves it out, and says so."""
    search_examples: int = 64
    """Correctly classified images that the search for the strongest combination may use."""
    search_steps: int = 20

    def sizes(self, steps: int, eps: float, schedule: Schedule = "constant") -> list[float]:
        """Of each of so many steps, in a ball of radius `eps`."""
        return step_sizes(schedule, steps, stride(self.step_size, steps, eps), eps)

    def gradient_steps(self, changed: int) -> int:
        """Those that an image takes which withstands all parts, where part (c) tries `pathways` that samples reach and
        so many with one choice `changed`, L (E - 1).
        """
        strongest = 4  # two attempts of twice the steps
        ascents = len(self.temperatures) + len(self.weights) + strongest
        return ascents * self.steps + (self.pathways + changed) * self.pathway_steps


@dataclass(frozen=True)
class Tried:
    """One combination in the search: how many of the images it broke, and their mean margin afterwards."""

    combination: Combination
    broken: int
    margin: float


@dataclass(frozen=True)
class RoutedPlan:
    """What has to be known before the first image is attacked, and is the same for all of them."""

    best: Combination
    """The strongest combination tried."""
    tried: tuple[Tried, ...]
    """The search, in order."""
    examples: int
    """Images that it used."""
    reached: int
    """Pathways that clean images reach."""
    pathways: tuple[tuple[int, ...], ...]
    """Those that part (c) attacks, the most frequent first."""

    def to_dict(self) -> dict[str, Any]:
        """The plan for a report: the search with its counts, the pathways by number."""
        tried = [{"combination": str(t.combination), "broken": t.broken, "margin": t.margin} for t in self.tried]
        return {
            "search": {"examples": self.examples, "best": str(self.best), "tried": tried},
            "pathways": {"reached": self.reached, "attacked": len(self.pathways)},
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, for `from_json`."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> RoutedPlan:
        """The inverse of `to_json`."""
        tried = (Tried(Combination(**t["combination"]), t["broken"], t["margin"]) for t in values["tried"])
        pathways = tuple(tuple(each) for each in values["pathways"])
        best = Combination(**values["best"])
        return RoutedPlan(best, tuple(tried), values["examples"], values["reached"], pathways)


def _searched(loss: Loss, num_classes: int) -> bool:
    return loss.from_labels and loss.searched and loss.least_classes <= num_classes


def axes(budget: Budget, num_classes: int) -> tuple[Callable[[Combination], list[Combination]], ...]:
    """The search's axes: each gives the alternatives to the combination that leads so far."""
    losses = [name for name, each in LOSSES.items() if _searched(each, num_classes)]
    anchors: tuple[Anchor, ...] = ("current", "clean")
    return (
        lambda c: [replace(c, temperature=t) for t in (None, *budget.temperatures)],
        lambda c: [replace(c, loss=name) for name in losses],
        lambda c: [replace(c, weight=w, anchor=anchor) for w in budget.weights for anchor in anchors],
        lambda c: [replace(c, schedule="cosine")],
    )


def search(
    target: RoutedTarget, x: Tensor, y: Tensor, *, budget: Budget, seed: int
) -> tuple[Combination, tuple[Tried, ...]]:
    """The combination that breaks most of the images `x` (N, C, H, W), by greedy search along one axis after another.

    Ties go to the larger mean margin, then to the one tried first. All start from the same random points.
    """
    tried: dict[Combination, Tried] = {}

    def strength(combination: Combination) -> tuple[int, float]:
        if combination not in tried:
            sizes = budget.sizes(budget.search_steps, target.threat.eps, combination.schedule)
            x_adv, fooled = combined(target, x, y, combination, sizes, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                margin = margins(target.predict(x_adv), y).mean().item()
            tried[combination] = Tried(combination, int(fooled.sum()), margin)
        return tried[combination].broken, tried[combination].margin

    with torch.no_grad():
        num_classes = target.predict(x[:1]).shape[1]
    best = Combination()
    for alternatives in axes(budget, num_classes):
        best = max(tracked([best, *alternatives(best)], "search", unit="combination"), key=strength)
    return best, tuple(tried.values())


def plan_attack(
    target: RoutedTarget, x: Tensor, y: Tensor, reached: Tensor, *, budget: Budget, seed: int
) -> RoutedPlan:
    """Search on correctly classified images `x` (N, C, H, W) of classes `y`, and choose among the pathways that clean
    images have `reached`, one for each of M images: (M, L).
    """
    pathways, counts = reached.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[: budget.pathways]
    frequent = tuple(tuple(each) for each in pathways[order].tolist())
    if len(x) == 0:
        return RoutedPlan(Combination(), (), 0, len(pathways), frequent)
    best, tried = search(target, x, y, budget=budget, seed=seed)
    return RoutedPlan(best, tried, len(x), len(pathways), frequent)

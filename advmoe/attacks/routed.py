"""Attacks on routed models: on the routers, on the pathways, and through what hard routing hides from a gradient.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers. Pixels and `eps` are in [0, 1].
Where a model routes tokens one by one, scores are (N, T, E) and pathways (N, L, T): a layer's margin is the mean over
its tokens, and a choice has survived where every token's has.

A hard choice has no gradient, so an attack that follows the model's own sees at most the straight-through estimate.
The parts here climb surrogates (soft routing, the routers' margins, fixed pathways) and need no gradient at all
(Square); what they find is scored under the model's own hard routing.
Sources: Athalye et al., ICML 2018 (attack what hides the gradient); Zhang et al., ICCV 2023, sec. 4 (the attacker fools
routers or experts); Andriushchenko et al., ECCV 2020 (Square).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from advmoe.attacks.autoattack import square
from advmoe.attacks.base import Attack, Found, Part
from advmoe.attacks.pgd import LOSSES, Predict, ascend, margins
from advmoe.progress import BRIEF, tracked
from advmoe.threat import ThreatModel

Anchor = Literal["current", "clean"]
Schedule = Literal["constant", "cosine"]


class Pass(NamedTuple):
    """One forward pass of a routed model."""

    logits: Tensor
    """(N, K)."""
    scores: tuple[Tensor, ...]
    """The routers' scores, (N, E) for each of the L layers."""
    pathway: Tensor
    """The expert that the scores choose, or that was forced, (N, L)."""


class RoutedModel(Protocol):
    """A routed model as its attacker sees it."""

    def __call__(self, x: Tensor, *, temperature: float | None = None, forced: Tensor | None = None) -> Pass:
        """Run images `x` (N, C, H, W): hard, or mixed by softmax(scores / temperature), or along `forced` (N, L)."""
        ...


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


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much work the attack does."""

    steps: int = 50
    """Gradient steps of parts (a) and (b), and twice that for the combination that the search found."""
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
    """The strongest combination found."""
    tried: tuple[Tried, ...]
    """The search, in order."""
    examples: int
    """Images it was made on."""
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


# The loop, with success kept wherever it shows


def router_margins(scores: tuple[Tensor, ...], pathway: Tensor) -> Tensor:
    """By how much each layer's score of the expert in `pathway` (N, L) exceeds its best other's (N, L); 0 if E is 1."""
    if scores[0].shape[-1] == 1:
        return torch.zeros_like(pathway, dtype=torch.float32)
    chosen = pathway.unbind(1)
    each = (-margins(s.flatten(0, -2), c.flatten()).view(c.shape) for s, c in zip(scores, chosen, strict=True))
    return torch.stack(list(each), 1)


def _exchange(clean: Pass, loss: str) -> Tensor:
    """What a unit of router margin is worth in units of the classifier's `loss`, (N,): by the spread of each.

    Without it logits multiplied by 10,000 would drown the routers' loss at any weight.
    """

    def spread(scores: Tensor) -> Tensor:
        return scores.float().amax(-1) - scores.float().amin(-1)

    routers = torch.stack([spread(each) for each in clean.scores], 1).flatten(1).mean(1).clamp_min(1e-12)
    return (1 if LOSSES[loss].scale_free else spread(clean.logits)) / routers


class _Keeper:
    """Keeps, for each image, the first iterate that fools the model as deployed; else the last one seen.

    Nothing counts but `predict` without gradients: other passes round otherwise, and routers near a tie then choose
    otherwise.
    """

    def __init__(self, predict: Predict, labels: Tensor, start: Tensor) -> None:
        self.predict, self.labels = predict, labels
        self.x_adv = start.clone()
        self.fooled = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)

    def look(self, x_adv: Tensor, promising: Tensor | None = None) -> None:
        """Take `x_adv` (N, C, H, W) in where nothing better is known, asking the model only about images that are
        `promising` (N,), by default about all.
        """
        usable = x_adv.flatten(1).isfinite().all(1) & ~self.fooled
        asked = (usable if promising is None else usable & promising).nonzero()[:, 0]
        self.x_adv = torch.where(usable[:, None, None, None], x_adv, self.x_adv)
        if len(asked):
            with torch.no_grad():
                self.fooled[asked] = self.predict(x_adv[asked]).argmax(1) != self.labels[asked]


def step_sizes(schedule: Schedule, steps: int, step_size: float, eps: float) -> list[float]:
    """The size of each step: `step_size`, or a half cosine from 2 `eps` to 0."""
    if schedule == "constant":
        return [step_size] * steps
    return [eps * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


def stride(step_size: float, steps: int, eps: float) -> float:
    """`step_size`, or as much as it takes for `steps` of it to cross the ball and come back: 2.5 `eps` in all."""
    return max(step_size, 2.5 * eps / steps)


def combined(
    model: RoutedModel,
    predict: Predict,
    x: Tensor,
    y: Tensor,
    combination: Combination,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Ascend classification and router losses together from a random start.

    Returns the adversarial images (N, C, H, W) and whether each fools `predict`, (N,): every iterate counts where the
    gradient pass is the deployed model's own, every fourth and the last where it is soft.
    """
    temperature, weight = combination.temperature, combination.weight
    classifier_loss = LOSSES[combination.loss].at(predict, x, y)
    with torch.no_grad():
        clean = model(x)
    worth = weight * _exchange(clean, combination.loss)

    def loss(output: Pass) -> Tensor:
        total = classifier_loss(output.logits)
        if weight:
            pushed = clean.pathway if combination.anchor == "clean" else hard_choice(output.scores)
            total = total - (worth * router_margins(output.scores, pushed).flatten(1).mean(1)).sum()
        return total

    def visit(step: int, x_adv: Tensor, output: Pass) -> None:
        if temperature is None:
            kept.look(x_adv, output.logits.argmax(1) != y)
        elif step % 4 == 3:
            kept.look(x_adv)

    start = threat.random_start(x, generator)
    kept = _Keeper(predict, y, start)
    sizes = step_sizes(combination.schedule, steps, step_size, threat.eps)
    last = ascend(
        lambda z: model(z, temperature=temperature), x, start, loss, threat=threat, steps=steps, step_size=sizes,
        visit=visit,
    )  # fmt: skip
    kept.look(last)
    return kept.x_adv, kept.fooled


def hard_choice(scores: tuple[Tensor, ...]) -> Tensor:
    """The experts that the scores choose, (N, L)."""
    return torch.stack([each.argmax(-1) for each in scores], 1)


def along_pathway(
    model: RoutedModel,
    predict: Predict,
    x: Tensor,
    y: Tensor,
    forced: Tensor,
    *,
    threat: ThreatModel,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack the network that the pathways `forced` (N, L) select, while its routers are pulled towards them.

    A router counts until it chooses as forced (a hinge), so that the rest of the budget goes to the classifier. Returns
    the images (N, C, H, W) and whether each fools `predict` under its own routing, (N,): every iterate counts whose
    routers choose as forced, and every fourth and the last.
    """
    with torch.no_grad():
        worth = _exchange(model(x), "margin")

    def loss(output: Pass) -> Tensor:
        pull = router_margins(output.scores, forced).clamp_max(0).flatten(1).mean(1)
        return (margins(output.logits, y) + worth * pull).sum()

    def visit(step: int, x_adv: Tensor, output: Pass) -> None:
        # Where every router chooses as forced, the forced pass is the deployed model's own.
        own = (hard_choice(output.scores) == forced).flatten(1).all(1) & (output.logits.argmax(1) != y)
        kept.look(x_adv, None if step % 4 == 3 else own)

    start = threat.random_start(x, generator)
    kept = _Keeper(predict, y, start)
    last = ascend(
        lambda z: model(z, forced=forced), x, start, loss, threat=threat, steps=steps, step_size=step_size, visit=visit
    )
    kept.look(last)
    return kept.x_adv, kept.fooled


# Before the attack: the strongest combination, and where samples go


def axes(budget: Budget, num_classes: int) -> tuple[Callable[[Combination], list[Combination]], ...]:
    """The search's axes: each gives the alternatives to the combination that leads so far."""
    losses = [name for name, each in LOSSES.items() if each.from_labels and each.least_classes <= num_classes]
    anchors: tuple[Anchor, ...] = ("current", "clean")
    return (
        lambda c: [replace(c, temperature=t) for t in (None, *budget.temperatures)],
        lambda c: [replace(c, loss=name) for name in losses],
        lambda c: [replace(c, weight=w, anchor=anchor) for w in budget.weights for anchor in anchors],
        lambda c: [replace(c, schedule="cosine")],
    )


def search(
    model: RoutedModel, predict: Predict, x: Tensor, y: Tensor, *, threat: ThreatModel, budget: Budget, seed: int
) -> tuple[Combination, tuple[Tried, ...]]:
    """The combination that breaks most of the images `x` (N, C, H, W), by greedy search along one axis after another.

    Ties go to the larger mean margin, then to the one tried first. All start from the same random points.
    """
    tried: dict[Combination, Tried] = {}

    def strength(combination: Combination) -> tuple[int, float]:
        if combination not in tried:
            generator = torch.Generator().manual_seed(seed)
            x_adv, fooled = combined(
                model, predict, x, y, combination, threat=threat, steps=budget.search_steps,
                step_size=stride(budget.step_size, budget.search_steps, threat.eps), generator=generator,
            )  # fmt: skip
            with torch.no_grad():
                margin = margins(predict(x_adv), y).mean().item()
            tried[combination] = Tried(combination, int(fooled.sum()), margin)
        return tried[combination].broken, tried[combination].margin

    with torch.no_grad():
        num_classes = predict(x[:1]).shape[1]
    best = Combination()
    for alternatives in axes(budget, num_classes):
        best = max(tracked([best, *alternatives(best)], "search", unit="combination"), key=strength)
    return best, tuple(tried.values())


def plan_attack(
    model: RoutedModel,
    predict: Predict,
    x: Tensor,
    y: Tensor,
    reached: Tensor,
    *,
    threat: ThreatModel,
    budget: Budget,
    seed: int,
) -> RoutedPlan:
    """Search on correctly classified images `x` (N, C, H, W) of classes `y`, and choose among the pathways (M, L) that
    clean images reach.
    """
    pathways, counts = reached.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[: budget.pathways]
    kept = tuple(tuple(each) for each in pathways[order].tolist())
    if len(x) == 0:
        return RoutedPlan(Combination(), (), 0, len(pathways), kept)
    best, tried = search(model, predict, x, y, threat=threat, budget=budget, seed=seed)
    return RoutedPlan(best, tried, len(x), len(pathways), kept)


# The attack


def routed_attack(
    model: RoutedModel, predict: Predict, plan: RoutedPlan, *, threat: ThreatModel, budget: Budget
) -> Attack:
    """The attack `routed`: soft routing, router losses, fixed pathways, the strongest combination, Square.

    `predict` is the classifier as deployed, `model` the same one with its routing laid open.
    """

    def climbing(name: str, combination: Combination, *, effort: int = 1) -> Part:
        def run(x: Tensor, y: Tensor, seed: int) -> Found:
            generator = torch.Generator().manual_seed(seed)
            return Found(
                _repeated(
                    lambda x, y: combined(
                        model, predict, x, y, combination, threat=threat, steps=effort * budget.steps,
                        step_size=stride(budget.step_size, effort * budget.steps, threat.eps), generator=generator,
                    ),
                    x, y, times=effort,
                )
            )  # fmt: skip

        return Part(name, run)

    parts = [climbing(f"soft T={t:g}", Combination(temperature=t)) for t in budget.temperatures]
    parts += [climbing(f"routers w={w:g}", Combination(weight=w)) for w in budget.weights]
    parts.append(Part("pathways", lambda x, y, seed: _pathways(model, predict, plan, threat, budget, x, y, seed)))
    parts.append(climbing("strongest", plan.best, effort=2))
    flags: tuple[str, ...] = ("the black-box part is left out (0 queries)",)
    if budget.queries:
        parts.append(
            Part(
                "square",
                lambda x, y, seed: square(predict, x, y, threat=threat, seed=seed, queries=budget.queries),
            )
        )
        flags = ()
    return Attack("routed", tuple(parts), {**asdict(budget), **plan.to_dict()}, flags)


def _repeated(attack: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, y: Tensor, *, times: int) -> Tensor:
    """The images that `attack` makes of `x`, (N, C, H, W); those that did not fool are tried again."""
    result, fooled = attack(x, y)
    for _ in range(times - 1):
        left = (~fooled).nonzero()[:, 0]
        if len(left) == 0:
            break
        result[left], fooled[left] = attack(x[left], y[left])
    return result


def _pathways(
    model: RoutedModel, predict: Predict, plan: RoutedPlan, threat: ThreatModel, budget: Budget,
    x: Tensor, y: Tensor, seed: int,
) -> Found:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        clean = model(x)
    result, left = x.clone(), torch.arange(len(x), device=x.device)
    number = len(plan.pathways) + sum(scores.shape[-1] - 1 for scores in clean.scores)
    for forced in tracked(_candidates(clean, plan), "pathways", total=number, unit="pathway", delay=BRIEF):
        result[left], fooled = along_pathway(
            model, predict, x[left], y[left], forced[left], threat=threat, steps=budget.pathway_steps,
            step_size=stride(budget.step_size, budget.pathway_steps, threat.eps), generator=generator,
        )  # fmt: skip
        left = left[~fooled]
        if len(left) == 0:
            break
    return Found(result)


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

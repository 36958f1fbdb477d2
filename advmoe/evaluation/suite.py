"""Attacks by name, as `--attacks` takes them.

`pgd-50`                    PGD with 50 steps; `pgd` takes the number from `attack.steps`
`pgd-50-margin`             with another loss: margin, dlr, kl or pma in place of ce
`pgd-50-soft`               with soft routing's gradients (routed models)
`autoattack`                the standard version; `autoattack-plus`, `autoattack-rand`
`autoattack:apgd-ce+square` the custom version with these attacks
`routed`                    the attacks that hard routing calls for (routed models)
`restarts`                  their counterpart for plain models: PGD on margin and cross-entropy from as many random
                            starts as make the gradient steps of `pgd-soft` and `routed`, then Square;
                            `restarts-1000` makes 1000; `restarts:48` as many as `routed` on a network with 48
                            choices to change, L (E - 1), in place of 16
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from advmoe.attacks.autoattack import autoattack_attack, official_library
from advmoe.attacks.base import Attack, AttackPart, Proposals
from advmoe.attacks.pgd import LOSSES, Predict, pgd
from advmoe.attacks.restarts import restarts_attack
from advmoe.attacks.routed import Budget, Halfspaces, RoutedPlan, RoutedTarget, routed_attack
from advmoe.config import AttackConfig, Pixels
from advmoe.errors import InputError
from advmoe.evaluation.scoring import OpenRouting
from advmoe.moe.routing import soft_routing
from advmoe.tables import Family, Table
from advmoe.text import radius, show, split_words
from advmoe.threat import ThreatModel


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every attack of an evaluation has in common."""

    threat: ThreatModel
    attack: AttackConfig
    routed: bool
    """Whether the model has MoE layers."""
    halfspaces: Halfspaces | None = field(default=None, compare=False, repr=False)
    """Of a model whose choices are the sides of hyperplanes in pixel space."""
    eot: int | None = None
    """Draws that a randomised model is averaged over (see `randomised`); None for any other."""

    @property
    def described(self) -> dict[str, Any]:
        """What the attacks take their steps from, ready for JSON."""
        attack = self.attack
        return {
            "steps": attack.steps, "step_size": float(attack.step_size), "restarts": attack.restarts,
            "pathways": attack.pathways, "queries": attack.queries, **({} if self.eot is None else {"eot": self.eot}),
        }  # fmt: skip

    @property
    def budget(self) -> Budget:
        """Of `routed`, in the run's own steps."""
        steps, size = self.attack.steps, float(self.attack.step_size)
        return Budget(
            steps=steps, step_size=size, pathway_steps=max(1, min(20, steps)), search_steps=max(1, min(20, steps)),
            pathways=self.attack.pathways, queries=self.attack.queries,
        )  # fmt: skip


@dataclass(frozen=True)
class Passes:
    """Passes that an attack makes on an image which withstands all of its parts."""

    gradient: float
    """Forward and back to the image."""
    forward: float = 0.0
    soft: bool = False
    """Whether the gradients come through soft routing."""


class NamedAttack(Protocol):
    """What a name among `--attacks` means."""

    @property
    def for_routed(self) -> bool:
        """Whether it can add something for models with MoE layers alone."""

    @property
    def least_classes(self) -> int:
        """The fewest classes that its loss can do with."""

    def named(self, setting: Setting) -> str:
        """Its full name. Raises `InputError` for a model that has no use for it, or where an extra is missing."""

    def steps(self, setting: Setting) -> int:
        """Steps that have to cross the ball."""

    def passes(self, setting: Setting) -> Passes:
        """About how much work it is."""

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        """The attack on `predict`; `plan` is what `routed` needs."""


@dataclass(frozen=True)
class _Pgd:
    number: int | None
    """Of steps; None: `attack.steps`."""
    loss: str
    soft: bool

    for_routed = False

    @property
    def least_classes(self) -> int:
        return LOSSES[self.loss].least_classes

    def steps(self, setting: Setting) -> int:
        return self.number or setting.attack.steps

    def passes(self, setting: Setting) -> Passes:
        restarts = setting.attack.restarts
        return Passes(self.steps(setting) * restarts, restarts, self.soft)

    def named(self, setting: Setting) -> str:
        loss, soft = "" if self.loss == "ce" else f"-{self.loss}", "-soft" if self.soft else ""
        name = f"pgd-{self.steps(setting)}{loss}{soft}"
        if self.soft and not setting.routed:
            raise InputError(f"attacks must not name soft routing for a model without MoE layers, got {name!r}")
        return name

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        threat, size, restarts = setting.threat, float(setting.attack.step_size), setting.attack.restarts
        surrogate, steps = soft_routing(predict) if self.soft else None, self.steps(setting)

        def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
            generator = torch.Generator().manual_seed(seed)
            return Proposals(
                pgd(predict, x, y, threat=threat, steps=steps, step_size=size, restarts=restarts, loss=self.loss,
                    surrogate=surrogate, generator=generator)
            )  # fmt: skip

        reach = steps * size
        length, edge = (radius(each, threat.norm) for each in (size, threat.eps))
        short = f"{steps} steps of {length} cannot cross the ball from its centre to its edge, {edge}"
        settings = {"steps": steps, "step_size": size, "restarts": restarts, "loss": self.loss}
        return Attack(self.named(setting), (AttackPart("pgd", run),), settings, (short,) if reach < threat.eps else ())


_PASSES = {
    "apgd-ce": (100, 0), "apgd-dlr": (100, 0), "apgd-t": (900, 0), "fab": (1000, 100), "fab-t": (1800, 900),
    "square": (0, 5000),
}  # fmt: skip
"""Of AutoAttack's parts, gradient and forward passes: 100 steps, against 9 classes where targeted; FAB takes two
gradients a step, and of all classes where it is not.
"""
_OF_VERSION = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"), "custom": (),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"), "rand": ("apgd-ce", "apgd-dlr"),
}  # fmt: skip


@dataclass(frozen=True)
class _AutoAttack:
    name: str
    version: Literal["standard", "plus", "rand", "custom"]
    parts: tuple[str, ...] | None = None

    for_routed = False

    @property
    def least_classes(self) -> int:
        return 3 if any("-dlr" in part for part in self.parts or ()) else 2

    def steps(self, setting: Setting) -> int:
        return setting.attack.steps

    def passes(self, setting: Setting) -> Passes:
        parts = self.parts or _OF_VERSION[self.version]
        return Passes(sum(_PASSES[part][0] for part in parts), sum(_PASSES[part][1] for part in parts))

    def named(self, setting: Setting) -> str:
        official_library()
        return self.name

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        return autoattack_attack(predict, threat=setting.threat, version=self.version, attacks=self.parts)


@dataclass(frozen=True)
class _Routed:
    for_routed = True
    least_classes = 2

    def steps(self, setting: Setting) -> int:
        return setting.attack.steps

    def passes(self, setting: Setting) -> Passes:
        return Passes(setting.budget.gradient_steps(CHANGED), setting.attack.queries)

    def named(self, setting: Setting) -> str:
        if setting.routed and setting.attack.queries:
            official_library()
        return "routed"

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        assert plan is not None
        target = RoutedTarget(OpenRouting(predict), predict, setting.threat, setting.halfspaces)
        return routed_attack(target, plan, setting.budget)


CHANGED = 16
"""Choices to change, L (E - 1), that `restarts` makes up for: of ResNet-18, whose 16 layers have two experts."""


@dataclass(frozen=True)
class _Restarts:
    number: int | None = None
    """Of gradient steps, rounded up to whole restarts; None: those of `pgd-soft` and `routed`."""
    changed: int = CHANGED
    """Choices to change of the network that it is to be compared with."""

    for_routed = False
    least_classes = 2

    def steps(self, setting: Setting) -> int:
        return setting.attack.steps

    def restarts(self, setting: Setting) -> int:
        attack = setting.attack
        wanted = self.number or attack.restarts * attack.steps + setting.budget.gradient_steps(self.changed)
        return -(-wanted // attack.steps)

    def passes(self, setting: Setting) -> Passes:
        return Passes(self.restarts(setting) * self.steps(setting), setting.attack.queries)

    def named(self, setting: Setting) -> str:
        if setting.attack.queries:
            official_library()
        return f"restarts-{self.restarts(setting) * setting.attack.steps}"

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        attack = setting.attack
        return restarts_attack(
            predict, threat=setting.threat, restarts=self.restarts(setting), steps=attack.steps,
            step_size=float(attack.step_size), queries=attack.queries,
        )  # fmt: skip


_OTHERS = ("clean", "worst case")
"""What results hold beside attacks, by name."""


@dataclass(frozen=True)
class FunctionAttack:
    """An attack that is a function `(predict, x, y, *, threat, seed) -> adversarial x`."""

    name: str
    function: Callable[..., Tensor]
    for_routed: bool = False
    least_classes: int = 2

    def __post_init__(self) -> None:
        if self.name in _OTHERS:
            raise InputError(f"an attack's name must not be {' or '.join(_OTHERS)}, got {self.name!r}")

    def steps(self, setting: Setting) -> int:
        """Those of the setting: how far the function goes is its own affair."""
        return setting.attack.steps

    def passes(self, setting: Setting) -> Passes:
        """Those of a PGD with the setting's steps."""
        return Passes(self.steps(setting))

    def named(self, setting: Setting) -> str:
        """Its name. Raises `InputError` for a model that has no use for it."""
        if self.for_routed and not setting.routed:
            raise InputError(f"attacks must suit a model without MoE layers, got {self.name!r}")
        return self.name

    def build(self, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
        """The attack on `predict`."""

        def run(x: Tensor, y: Tensor, seed: int) -> Proposals:
            adversarial = self.function(predict, x, y, threat=setting.threat, seed=seed)
            if not isinstance(adversarial, Tensor) or adversarial.shape != x.shape:
                got = getattr(adversarial, "shape", type(adversarial).__name__)
                raise InputError(f"the attack {self.name} must return images {tuple(x.shape)}, got {got}")
            if not bool(adversarial.isfinite().all()):
                raise InputError(f"the attack {self.name} must return finite pixels, got NaN or infinity")
            return Proposals(adversarial.detach().to(x))

        return Attack(self.name, (AttackPart(self.name, run),), {}, ())


@contextmanager
def named_for_now(attacks: str | Sequence[str | Callable[..., Tensor]] | None) -> Iterator[tuple[str, ...] | None]:
    """Inside, functions among `attacks` are known by their names; yields all names. Raises `InputError` for a name that
    is taken, or a function without one.
    """
    names, ours = list[str](), list[str]()
    if isinstance(attacks, str):
        attacks = split_words(attacks)
    if not isinstance(attacks, Iterable | None) or isinstance(attacks, bytes):
        raise InputError(f"attacks must be names and functions in a list, got {show(attacks)}")
    try:
        for each in attacks or ():
            if isinstance(each, str):
                names.append(each)
                continue
            name = getattr(each, "__name__", "")
            if re.fullmatch(r"\w+", name) is None:
                raise InputError(f"attacks must be names or functions that have one, got {show(each)}")
            ATTACKS.add(name, FunctionAttack(name, each))
            ours.append(name)
            names.append(name)
        yield None if attacks is None else tuple(names)
    finally:
        for name in ours:
            del ATTACKS[name]


def _pgd(name: str) -> NamedAttack | None:
    losses = "|".join(re.escape(loss) for loss in LOSSES if loss != "ce")
    match = re.fullmatch(rf"pgd(?:-([1-9][0-9]{{0,4}}))?(?:-({losses}))?(-soft)?", name)
    return match and _Pgd(int(match[1]) if match[1] else None, match[2] or "ce", match[3] is not None)


def _custom(name: str) -> NamedAttack | None:
    if (match := re.fullmatch(r"autoattack:([a-z+-]+)", name)) is None:
        return None
    parts = tuple(match[1].split("+"))
    if unknown := [each for each in parts if each not in _CUSTOM]:
        raise InputError(f"attacks must name parts of AutoAttack ({', '.join(_CUSTOM)}), got {show(unknown[0])}")
    return _AutoAttack(name, "custom", parts)


def _restarts(name: str) -> NamedAttack | None:
    match = re.fullmatch(r"restarts(?:-([1-9][0-9]{0,9})|:([1-9][0-9]{0,4}))?", name)
    return match and _Restarts(int(match[1]) if match[1] else None, int(match[2] or CHANGED))


_CUSTOM = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")

ATTACKS: Table[NamedAttack] = Table(
    "attacks",
    {
        "routed": _Routed(),
        "autoattack": _AutoAttack("autoattack", "standard"),
        "autoattack-plus": _AutoAttack("autoattack-plus", "plus"),
        "autoattack-rand": _AutoAttack("autoattack-rand", "rand"),
    },
    Family(
        f"pgd-STEPS[{'|'.join(f'-{loss}' for loss in LOSSES if loss != 'ce')}][-soft]",
        _pgd,
        usual=(
            "pgd",
            *(f"pgd-50{loss}{soft}" for loss in ("", "-margin", "-dlr", "-kl", "-pma") for soft in ("", "-soft")),
        ),
    ),
    Family("restarts[-STEPS|:CHOICES]", _restarts, usual=("restarts",)),
    Family("autoattack:NAME+NAME", _custom, usual=("autoattack:apgd-ce+square",)),
)


def default_attacks(setting: Setting) -> tuple[str, ...]:
    """PGD, and as many steps again: through soft routing for a routed model, on the margin for a plain one."""
    name = f"pgd-{setting.attack.steps}"
    return name, f"{name}-soft" if setting.routed else f"{name}-margin"


def stretched(name: str, setting: Setting, eps: float) -> Setting:
    """`setting` at the radius `eps`, which the steps of the attack with this full name can cross.

    The step is the configured one or, where that is more, 2.5 eps / N: of PGD the N of its name, else `attack.steps`.
    """
    size = Pixels(max(float(setting.attack.step_size), 2.5 * eps / ATTACKS.find(name).steps(setting)))
    threat = ThreatModel(setting.threat.norm, eps)
    return replace(setting, threat=threat, attack=replace(setting.attack, step_size=size))


def named(names: Sequence[str], setting: Setting) -> tuple[str, ...]:
    """The full names of the attacks asked for, each once, in order.

    Raises `ValueError` for none, an unknown one, one that the model has no use for, or a missing extra.
    """
    if not names:
        raise InputError("attacks must name at least one attack, got none")
    return tuple(dict.fromkeys(ATTACKS.find(name).named(setting) for name in names))


def require_classes(names: Iterable[str], num_classes: int) -> None:
    """Raise `ValueError` for an attack whose loss (DLR) needs more classes than there are."""
    for name in names:
        if num_classes < (least := ATTACKS.find(name).least_classes):
            rule = f"for less than {least} classes"
            raise InputError(f"attacks must not use the loss dlr {rule}, got {name!r} for {num_classes}")


def build(name: str, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
    """The attack of this full name on `predict`; `plan` is what `routed` needs."""
    return ATTACKS.find(name).build(predict, setting, plan)

"""Attacks by name, as `--attacks` takes them.

`pgd-50`                    PGD with 50 steps; `pgd` takes the number from `attack.steps`
`pgd-50-margin`             with another loss: margin, dlr or kl in place of ce
`pgd-50-soft`               with soft routing's gradients (routed models)
`autoattack`                the standard version; `autoattack-plus`, `autoattack-rand`
`autoattack:apgd-ce+square` the custom version with these attacks
`routed`                    the attacks that hard routing calls for (routed models)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from advmoe.attacks.autoattack import autoattack_attack, official_library
from advmoe.attacks.base import Attack, Found, Part
from advmoe.attacks.pgd import LossName, Predict, pgd
from advmoe.attacks.routed import Budget, RoutedPlan, routed_attack
from advmoe.config import AttackConfig, Pixels
from advmoe.errors import InputError
from advmoe.evaluation.scoring import OpenRouting
from advmoe.moe.routing import soft_routing
from advmoe.text import show
from advmoe.threat import ThreatModel

KNOWN = ("pgd-STEPS[-margin|-dlr|-kl][-soft]", "autoattack[-plus|-rand]", "autoattack:NAME+NAME", "routed")
_PGD = re.compile(r"pgd(?:-(?P<steps>[1-9][0-9]{0,4}))?(?:-(?P<loss>margin|dlr|kl))?(?P<soft>-soft)?")
_AUTOATTACK = re.compile(r"autoattack(?:-(?P<version>plus|rand)|:(?P<custom>[a-z+-]+))?")
_CUSTOM = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every attack of an evaluation has in common."""

    threat: ThreatModel
    attack: AttackConfig
    routed: bool
    """Whether the model has MoE layers."""

    @property
    def budget(self) -> Budget:
        """Of `routed`, in the run's own steps."""
        steps, size = self.attack.steps, float(self.attack.step_size)
        return Budget(
            steps=steps, step_size=size, pathway_steps=max(1, min(20, steps)), search_steps=max(1, min(20, steps)),
            pathways=self.attack.pathways, queries=self.attack.queries,
        )  # fmt: skip


def stretched(name: str, setting: Setting, eps: float) -> Setting:
    """`setting` at the radius `eps`, which the steps of the attack with this full name can cross.

    The step is the configured one or, where that is more, 2.5 eps / N: of PGD the N of its name, else `attack.steps`.
    """
    match = _PGD.fullmatch(name)
    steps = int(match["steps"]) if match else setting.attack.steps
    size = Pixels(max(float(setting.attack.step_size), 2.5 * eps / steps))
    threat = ThreatModel(setting.threat.norm, eps)
    return replace(setting, threat=threat, attack=replace(setting.attack, step_size=size))


def default_attacks(setting: Setting) -> tuple[str, ...]:
    """PGD, and PGD through soft routing for a routed model."""
    name = f"pgd-{setting.attack.steps}"
    return (name, f"{name}-soft") if setting.routed else (name,)


def named(names: Sequence[str], setting: Setting) -> tuple[str, ...]:
    """The full names of the attacks asked for, each once, in order.

    Raises `ValueError` for none, an unknown one, one that the model has no use for, or a missing extra.
    """
    if not names:
        raise InputError("attacks must name at least one attack, got none")
    found = []
    for name in names:
        check_name(name)
        if name.startswith("autoattack") or (name == "routed" and setting.routed and setting.attack.queries):
            official_library()
        if match := _PGD.fullmatch(name):
            parts = match.groupdict()
            loss = f"-{parts['loss']}" if parts["loss"] else ""
            name = f"pgd-{parts['steps'] or setting.attack.steps}{loss}{parts['soft'] or ''}"
            if parts["soft"] and not setting.routed:
                raise InputError(f"attacks must not name soft routing for a model without MoE layers, got {name!r}")
        found.append(name)
    return tuple(dict.fromkeys(found))


def check_name(name: str) -> None:
    """Raise `ValueError` unless `name` is an attack's, whatever the model."""
    match = _AUTOATTACK.fullmatch(name)
    custom = match["custom"] if match else None
    unknown = [] if custom is None else [each for each in custom.split("+") if each not in _CUSTOM]
    if unknown:
        raise InputError(f"attacks must name parts of AutoAttack ({', '.join(_CUSTOM)}), got {show(unknown[0])}")
    if not (match or _PGD.fullmatch(name) or name == "routed"):
        raise InputError(f"attacks must be among {', '.join(KNOWN)}, got {show(name)}")


def require_classes(names: Iterable[str], num_classes: int) -> None:
    """Raise `ValueError` for an attack whose loss (DLR) needs more classes than there are."""
    for name in names:
        if "-dlr" in name and num_classes < 3:
            raise InputError(
                f"attacks must not use the loss dlr for less than 3 classes, got {name!r} for {num_classes}"
            )


def build(name: str, predict: Predict, setting: Setting, plan: RoutedPlan | None) -> Attack:
    """The attack of this full name on `predict`; `plan` is what `routed` needs."""
    if match := _PGD.fullmatch(name):
        loss = cast(LossName, match["loss"] or "ce")
        return _pgd_attack(name, predict, setting, int(match["steps"]), loss, soft=bool(match["soft"]))
    if match := _AUTOATTACK.fullmatch(name):
        version: Any = "custom" if match["custom"] else match["version"] or "standard"
        attacks = tuple(match["custom"].split("+")) if match["custom"] else None
        return autoattack_attack(predict, threat=setting.threat, version=version, attacks=attacks)
    assert plan is not None
    return routed_attack(OpenRouting(predict), predict, plan, threat=setting.threat, budget=setting.budget)


def _pgd_attack(name: str, predict: Predict, setting: Setting, steps: int, loss: LossName, *, soft: bool) -> Attack:
    threat, size, restarts = setting.threat, float(setting.attack.step_size), setting.attack.restarts
    surrogate = soft_routing(predict) if soft else None

    def run(x: Tensor, y: Tensor, seed: int) -> Found:
        generator = torch.Generator().manual_seed(seed)
        return Found(
            pgd(predict, x, y, threat=threat, steps=steps, step_size=size, restarts=restarts, loss=loss,
                surrogate=surrogate, generator=generator)
        )  # fmt: skip

    reach = steps * size
    short = f"{steps} steps of {size:.4g} cannot cross the ball from its centre to its edge, {threat.eps:.4g}"
    settings = {"steps": steps, "step_size": size, "restarts": restarts, "loss": loss}
    return Attack(name, (Part("pgd", run),), settings, (short,) if reach < threat.eps else ())

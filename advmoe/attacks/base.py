"""What an attack is to whoever scores it: named parts, each of which proposes adversarial examples.

Axes: `N` batch, `C` channels, `H W` size. Pixels are in [0, 1].

A proposal is no result: the evaluation projects every one back into the threat model and scores it again by the model
as deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Proposals:
    """What one part proposes for a batch."""

    x_adv: Tensor
    """(N, C, H, W), one proposal for each image."""
    flags: tuple[str, ...] = ()
    """Warnings that must travel with the number: why the attack may be weaker than it looks."""


@dataclass(frozen=True)
class AttackPart:
    """One step of an attack."""

    name: str
    run: Callable[[Tensor, Tensor, int], Proposals]
    """Images (N, C, H, W), true classes (N,) and a seed -> `Proposals`. Same arguments, same proposals."""


@dataclass(frozen=True)
class Attack:
    """An attack by name. Its parts run in turn, each on the images that no earlier part has broken."""

    name: str
    parts: tuple[AttackPart, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was told, for the record."""
    flags: tuple[str, ...] = ()
    """Warnings known before it runs."""

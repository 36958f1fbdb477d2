"""Who is updated when: a method is the sequence of levels that one iteration runs.

psi are the backbone's parameters (experts, norms, stem, classifier), phi the routers'. Each level draws its own batch, makes its own
attack on the current model, and changes its part alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from advmoe.config import Method
from advmoe.models import split_parameters
from advmoe.moe.routers import routers_of

Part = Literal["all", "experts", "routers"]


@dataclass(frozen=True)
class Level:
    """One update: which part moves, and whether against an attack."""

    part: Part
    adversarial: bool = True


METHODS: dict[Method, tuple[Level, ...]] = {
    "standard": (Level("all", adversarial=False),),
    "at": (Level("all"),),
    "at-routers": (Level("routers"),),
    "at-experts": (Level("experts"),),
    # Algorithm 1: the lower level (routers) first, then the upper (backbone).
    "advmoe": (Level("routers"), Level("experts")),
}


def train_only(model: nn.Module, part: Part) -> None:
    """Let `part` learn and fix the rest bit for bit: no gradients, and eval mode, so that no batch-norm statistic moves."""
    psi, phi = split_parameters(model)
    for parameters, learns in ((psi, part != "routers"), (phi, part != "experts")):
        for parameter in parameters:
            parameter.requires_grad_(learns)
    model.train(part != "routers")
    for router in routers_of(model):
        router.train(part != "experts")

"""Who is updated when: a method is the sequence of levels that one iteration runs.

psi are the backbone's parameters (experts, norms, stem, classifier), phi the routers'; a sparse model has channel
scores besides. Each level draws its own batch, makes its own attack on the current model, and changes its part alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from advmoe.config import Method
from advmoe.models import split_parameters
from advmoe.models.sparse import scores_of
from advmoe.moe.routers import routers_of

Part = Literal["all", "experts", "routers", "scores"]


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
    # Its second phase; before and after it is `at` (see `phases`).
    "sparse": (Level("scores"),),
    # Algorithm 1: the lower level (routers) first, then the upper (backbone).
    "advmoe": (Level("routers"), Level("experts")),
}


def parts_of(model: nn.Module) -> dict[Part, list[nn.Parameter]]:
    """The parameters of each part but `all`; together all, none twice."""
    psi, phi = split_parameters(model)
    scores = scores_of(model)
    known = {id(score) for score in scores}
    return {"experts": [p for p in psi if id(p) not in known], "routers": phi, "scores": scores}


@contextmanager
def learning(model: nn.Module, part: Part) -> Iterator[None]:
    """Train mode in which `part` learns and the rest stays fixed bit for bit, buffers included. Restores everything.

    Fixed batch norms go on normalising by the batch, without recording it: under their running statistics, which lag
    behind fast early weights, the routers' step saw a broken backbone (digits, 2 epochs: cross-entropy 5.0 against
    1.6). Under scores that learn, weights are fixed but statistics are not: those of the dense network do not fit what
    its masks let through, and attacks and measurements go by them.
    """
    parts = parts_of(model)
    router_modules = {id(module) for router in routers_of(model) for module in router.modules()}
    modules = list(model.modules())
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    modes = [module.training for module in modules]
    wanted = [(p, p.requires_grad) for parameters in parts.values() for p in parameters]
    recording = [norm.track_running_stats for norm in norms]
    still = {id(p) for other, parameters in parts.items() if part not in ("all", other) for p in parameters}
    for parameter, needs in wanted:  # what the user's own network has frozen stays so
        parameter.requires_grad_(needs and id(parameter) not in still)
    model.train()
    for norm in norms:
        fixed = "experts" if id(norm) in router_modules else "routers"
        norm.track_running_stats = part != fixed
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, needs in wanted:
            parameter.requires_grad_(needs)
        for norm, records in zip(norms, recording, strict=True):
            norm.track_running_stats = records

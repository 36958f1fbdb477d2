"""Training: what is minimised, who is updated when, and the loop that survives an interruption.

The names below are the pieces of a loop of one's own; docs/tutorials/own-loop.md puts them together. They are imported
on first use, so that the command line's help does not load PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advmoe.attacks import trades_attack
    from advmoe.models import split_parameters
    from advmoe.models.modes import frozen
    from advmoe.seeding import generator_for
    from advmoe.tables.methods import Level, levels
    from advmoe.training.methods import epoch_plan, learning
    from advmoe.training.model import build_model
    from advmoe.training.objectives import cross_entropy, trades
    from advmoe.training.run import load_data
    from advmoe.training.schedule import cosine

_HOMES = {
    "Level": "advmoe.tables.methods",
    "build_model": "advmoe.training.model",
    "cosine": "advmoe.training.schedule",
    "cross_entropy": "advmoe.training.objectives",
    "epoch_plan": "advmoe.training.methods",
    "frozen": "advmoe.models.modes",
    "generator_for": "advmoe.seeding",
    "learning": "advmoe.training.methods",
    "levels": "advmoe.tables.methods",
    "load_data": "advmoe.training.run",
    "split_parameters": "advmoe.models",
    "trades": "advmoe.training.objectives",
    "trades_attack": "advmoe.attacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'advmoe.training' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


__all__ = [
    "Level",
    "build_model",
    "cosine",
    "cross_entropy",
    "epoch_plan",
    "frozen",
    "generator_for",
    "learning",
    "levels",
    "load_data",
    "split_parameters",
    "trades",
    "trades_attack",
]

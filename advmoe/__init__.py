"""advmoe: train, attack, dissect and ship adversarially robust mixture-of-experts vision models.

The names below are imported on first use, so that `import advmoe` (and the command line's help) does not load PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advmoe.attacks import pgd
    from advmoe.config import Config
    from advmoe.data import load_dataset
    from advmoe.evaluation.accuracy import evaluate
    from advmoe.evaluation.dissection import dissect
    from advmoe.evaluation.pathways import pathway_statistics
    from advmoe.export import export_model, export_run
    from advmoe.extend import (
        register_attack,
        register_backbone,
        register_dataset,
        register_loss,
        register_method,
        register_router,
    )
    from advmoe.hub import from_pretrained, push_to_hub, save_pretrained
    from advmoe.models import create_model
    from advmoe.models.convert import to_moe
    from advmoe.models.runs import load_run
    from advmoe.moe import pathway, route, soft_routing
    from advmoe.pruning import compact
    from advmoe.recipes import configuration as recipe
    from advmoe.threat import ThreatModel
    from advmoe.training.run import train
    from advmoe.zoo import load

_HOMES = {
    "Config": "advmoe.config",
    "ThreatModel": "advmoe.threat",
    "compact": "advmoe.pruning",
    "create_model": "advmoe.models",
    "dissect": "advmoe.evaluation.dissection",
    "evaluate": "advmoe.evaluation.accuracy",
    "export_model": "advmoe.export",
    "export_run": "advmoe.export",
    "from_pretrained": "advmoe.hub",
    "load": "advmoe.zoo",
    "load_dataset": "advmoe.data",
    "load_run": "advmoe.models.runs",
    "pathway": "advmoe.moe",
    "pathway_statistics": "advmoe.evaluation.pathways",
    "pgd": "advmoe.attacks",
    "push_to_hub": "advmoe.hub",
    "recipe": "advmoe.recipes",
    "register_attack": "advmoe.extend",
    "register_backbone": "advmoe.extend",
    "register_dataset": "advmoe.extend",
    "register_loss": "advmoe.extend",
    "register_method": "advmoe.extend",
    "register_router": "advmoe.extend",
    "route": "advmoe.moe",
    "save_pretrained": "advmoe.hub",
    "soft_routing": "advmoe.moe",
    "to_moe": "advmoe.models.convert",
    "train": "advmoe.training.run",
}

_MODULES = ("attacks", "data", "evaluation", "export", "extend", "models", "moe", "native", "training")
"""Imported on first use, too."""

_NAMES = {"recipe": "configuration"}
"""What is called otherwise at home."""

try:
    __version__ = version("advmoe")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"advmoe.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'advmoe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), _NAMES.get(name, name))


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]


__all__ = [
    "Config",
    "ThreatModel",
    "__version__",
    "compact",
    "create_model",
    "dissect",
    "evaluate",
    "export_model",
    "export_run",
    "from_pretrained",
    "load",
    "load_dataset",
    "load_run",
    "pathway",
    "pathway_statistics",
    "pgd",
    "push_to_hub",
    "recipe",
    "register_attack",
    "register_backbone",
    "register_dataset",
    "register_loss",
    "register_method",
    "register_router",
    "route",
    "save_pretrained",
    "soft_routing",
    "to_moe",
    "train",
]

"""A run's optimisers: one for each part, what it decays, at which rate it goes, and how long a gradient may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from advmoe.config import TrainingConfig
from advmoe.moe.routers import routers_of
from advmoe.tables import Part
from advmoe.training.methods import parts_of


def make_optimizers(model: nn.Module, training: TrainingConfig) -> dict[Part, Optimizer]:
    """An optimiser for each part of `model` that has parameters, at its peak learning rate."""
    plain = _undecayed(model) if training.decay == "weights" else set[int]()
    return {
        part: _optimizer(part, parameters, training, plain)
        for part, parameters in parts_of(model).items()
        if parameters
    }  # fmt: skip


def _optimizer(part: Part, parameters: list[nn.Parameter], training: TrainingConfig, plain: set[int]) -> Optimizer:
    decaying = [each for each in parameters if id(each) not in plain]
    rest = [each for each in parameters if id(each) in plain]
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    lr, momentum, decay = (_own(part, training, name) for name in ("lr", "momentum", "weight_decay"))
    if training.optimizer == "adamw":
        return AdamW(groups, lr=lr, betas=(momentum, 0.999), weight_decay=decay)
    return SGD(groups, lr=lr, momentum=momentum, weight_decay=decay)


def _own(part: Part, training: TrainingConfig, name: str) -> float:
    """The field `name` as it holds for `part`: the routers may have their own."""
    routers: float | None = getattr(training, f"router_{name}") if part == "routers" else None
    own: float = getattr(training, name) if routers is None else routers
    return own


def _undecayed(model: nn.Module) -> set[int]:
    """Of which parameters, by identity, nothing decays under `decay=weights`: biases and parameters of norms (one
    axis), and all of each router's last linear layer.
    """
    plain = {id(each) for each in model.parameters() if each.dim() <= 1}
    for router in routers_of(model):
        layers = [module for module in router.modules() if isinstance(module, nn.Linear)]
        plain |= {id(each) for layer in layers[-1:] for each in layer.parameters()}
    return plain


def set_rates(optimizers: Mapping[Part, Optimizer], training: TrainingConfig, factor: float) -> None:
    """Have each part learn at `factor` times its peak learning rate."""
    for part, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = _own(part, training, "lr") * factor


def clip(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Scale the gradients of `parameters`, those that have one, to an l2 norm of `longest` over all, where theirs is
    longer; 0 leaves them.

    Source: Pascanu et al., ICML 2013.
    """
    if longest > 0:
        torch.nn.utils.clip_grad_norm_(parameters, longest)

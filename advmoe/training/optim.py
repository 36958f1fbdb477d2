"""A run's optimisers: one for each part, what it decays, at which rate it goes, and how long a gradient may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from advmoe.config import TrainingConfig
from advmoe.moe.halfspace import HalfspaceRouter
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


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_TOKENS = ("class_token", "positions", "cls_token", "pos_embed", "dist_token")
"""Of our transformers and of timm's; DeiT's own training decays neither."""


def _undecayed(model: nn.Module) -> set[int]:
    """Of which parameters, by identity, nothing decays under `decay=weights`: those of one axis (biases, channels'
    scores), of norms, what is added to a transformer's tokens, all of each router's last linear layer, and a router of
    half-spaces: shrunk weights would move its hyperplanes.
    """
    plain = {id(each) for each in model.parameters() if each.dim() <= 1}
    plain |= {id(each) for name, each in model.named_parameters() if name.rpartition(".")[2] in _TOKENS}
    for module in model.modules():
        if isinstance(module, (*_NORMS, HalfspaceRouter)):
            plain |= {id(each) for each in module.parameters()}
    for router in routers_of(model):
        layers = [module for module in router.modules() if isinstance(module, nn.Linear)]
        plain |= {id(each) for layer in layers[-1:] for each in layer.parameters()}
    return plain


def set_rates(optimizers: Mapping[Part, Optimizer], training: TrainingConfig, factor: float) -> None:
    """Have each part learn at `factor` times its peak learning rate."""
    for part, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            rate = _own(part, training, "lr") * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def compile_step(optimizer: Optimizer, **options: Any) -> Callable[[], Any]:
    """`optimizer.step` as a graph by `torch.compile`, whose `options` these are. Its rate becomes a tensor beside its
    parameters: a number would be part of the graph, which each iteration made anew.
    """
    _rates_to_tensors(optimizer)
    return torch.compile(optimizer.step, **options)


def _rates_to_tensors(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)


def states_of(optimizers: Mapping[Part, Optimizer]) -> list[dict[str, Any]]:
    """The optimisers' states for a checkpoint, rates as numbers."""
    states = [optimizer.state_dict() for optimizer in optimizers.values()]
    for state in states:
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
    return states


def restore_states(optimizers: Mapping[Part, Optimizer], states: Iterable[dict[str, Any]]) -> None:
    """Take over what `states_of` returned; a rate that is a tensor stays one."""
    for optimizer, state in zip(optimizers.values(), states, strict=True):
        compiled = isinstance(optimizer.param_groups[0]["lr"], Tensor)
        optimizer.load_state_dict(state)
        if compiled:
            _rates_to_tensors(optimizer)


def clip(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Scale the gradients of `parameters`, those that have one, to an l2 norm of `longest` over all, where theirs is
    longer; 0 leaves them.

    Source: Pascanu et al., ICML 2013.
    """
    if longest > 0:
        torch.nn.utils.clip_grad_norm_(parameters, longest)

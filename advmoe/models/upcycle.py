"""A routed model that starts from a plain one of a pathway's shape: every expert is a copy of it, and they part as they
learn from different images (sparse upcycling, Komatsuzaki et al., ICLR 2023).

Axes: `M` rows of a bank, `R` rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models.classifier import Classifier
from advmoe.moe import MoELayer


@torch.no_grad()
def upcycle(model: Classifier, start: Classifier) -> None:
    """Have the routed `model` start as `start`, a plain one of the shape of its pathways (S-Dense, or what a sparse
    model's masks leave): the same logits whatever the routing. Routers stay as they are.

    Raises `RuntimeError` for another shape, `ValueError` where experts overlap, so that they cannot all be copies.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if any(layer.overlapping for layer in layers.values()):
        rule = "left out, or name a mixture, where experts overlap (model.scale * model.num_experts > 1)"
        raise InputError(f"training.init_from must be {rule}, got one of kind {start.spec['kind']!r}")
    known = dict(start.named_modules())
    for name, layer in layers.items():
        rows, shared = _rows(known.get(name))
        if len(rows) != len(layer.banks()) or len(shared) != len(layer.common()):
            raise RuntimeError(f"{name} must be a layer like that of the mixture, got {known.get(name)}")
        for bank, values in zip(layer.banks(), rows, strict=True):
            _require_shape(name, (layer.expert_rows, *bank.shape[1:]), values.shape)
            bank[layer.rows[0]] = values
        for parameter, values in zip(layer.common(), shared, strict=True):
            _require_shape(name, parameter.shape, values.shape)
            parameter.copy_(values)
        layer.copy_first_expert()
    inside = tuple(f"{name}." for name in layers)
    theirs = start.state_dict()
    ours = {name: value for name, value in model.state_dict().items() if not name.startswith((*inside, "router."))}
    more = [name for name in theirs if name not in ours and not name.startswith(inside)]
    if more:
        raise RuntimeError(f"{more[0]} must be part of the mixture too")
    for name, value in ours.items():
        _require_shape(name, value.shape, theirs[name].shape if name in theirs else None)
        value.copy_(theirs[name])


def _rows(plain: nn.Module | None) -> tuple[list[Tensor], list[Tensor]]:
    """A plain layer's values of an expert's banks, and of what experts share: those of an MLP's second bias."""
    if isinstance(plain, nn.Sequential):
        first, last = (module for module in plain if isinstance(module, nn.Linear))
        assert first.bias is not None
        return [first.weight, first.bias, last.weight.t()], [last.bias]
    return [] if plain is None else list(plain.parameters()), []


def _require_shape(name: str, expected: tuple[int, ...], got: tuple[int, ...] | None) -> None:
    if got is None or tuple(expected) != tuple(got):
        raise RuntimeError(f"{name} must be {tuple(expected)}, got {got and tuple(got)}")

"""Whether modules have hooks: what a hook sees must be computed as the modules say, not fused with other things."""

from __future__ import annotations

import torch
from torch import nn


def listened(module: nn.Module) -> bool:
    """Whether the module itself has to run: it has hooks, all modules have, or its `forward` was replaced."""
    return _own(module) or _everywhere()


def hooked(model: nn.Module) -> bool:
    """Whether any part of `model` is `listened` to."""
    return _everywhere() or any(map(_own, _parts(model)))


def heard(model: nn.Module) -> bool:
    """Whether somebody may hold an activation within `model`: it is `hooked`, or has a part that is neither ours nor
    PyTorch's.
    """
    return _everywhere() or any(
        _own(part) or (type(part) not in _known and _foreign(type(part))) for part in _parts(model)
    )


def _parts(model: nn.Module) -> list[nn.Module]:
    """The modules in `model`; one that is there twice comes twice, which costs less than to remember them."""
    parts = [model]
    for part in parts:  # which grows meanwhile
        parts.extend([child for child in part._modules.values() if child is not None])
    return parts


def _own(module: nn.Module) -> bool:
    """Whether the module has hooks, or another `forward` than its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


_known: set[type] = set()
"""Classes of ours and of PyTorch's that were seen."""


def _foreign(kind: type) -> bool:
    """Whether a class is somebody else's."""
    if kind.__module__.partition(".")[0] not in ("advmoe", "torch"):
        return True
    _known.add(kind)
    return False


def _everywhere() -> bool:
    """Whether all modules have hooks."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )

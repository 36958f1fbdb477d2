"""Whether modules have hooks: what a hook sees must be computed as the modules say, not fused with other things."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn


def listened(module: nn.Module) -> bool:
    """Whether the module itself has to run: it has hooks, all modules have, or its `forward` was replaced."""
    return _own(module) or _everywhere()


def heard(model: nn.Module) -> bool:
    """Whether somebody may hold an activation within `model`: by hooks, or in a part that is neither ours nor
    PyTorch's.
    """
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if _own(module) or _foreign(type(module).__module__):
            return True
        waiting.extend(child for child in module._modules.values() if child is not None)
    return _everywhere()


def _own(module: nn.Module) -> bool:
    """Whether the module has hooks, or another `forward` than its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@cache
def _foreign(home: str) -> bool:
    """Whether a class of the module `home` is somebody else's."""
    return home.partition(".")[0] not in ("advmoe", "torch")


def _everywhere() -> bool:
    """Whether all modules have hooks."""
    hooks = torch.nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )

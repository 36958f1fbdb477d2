"""Whether modules have hooks: what a hook sees must be computed as the modules say, not fused with other things."""

from __future__ import annotations

import torch
from torch import nn


def listened(module: nn.Module) -> bool:
    """Whether the module itself has hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def heard(model: nn.Module) -> bool:
    """Whether any part of `model` has hooks, so that somebody may hold one of its activations."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if listened(module):
            return True
        waiting.extend(child for child in module._modules.values() if child is not None)
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)

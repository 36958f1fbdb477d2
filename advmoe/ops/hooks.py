"""Whether somebody listens to a module: what is heard must be computed as it is written."""

from __future__ import annotations

import torch
from torch import nn


def listened(module: nn.Module) -> bool:
    """Whether somebody listens to the module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def heard(model: nn.Module) -> bool:
    """Whether somebody listens to a part of `model`, and so may hold of its activations."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if listened(module):
            return True
        waiting.extend(child for child in module._modules.values() if child is not None)
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)

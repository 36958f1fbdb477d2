"""Backward passes that have no derivative. PyTorch's own mark of them leaves second derivatives wrong without a word
where they flow through what a pass has kept: `torch.autograd.grad` never reaches the node that would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from advmoe.errors import InputError


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, which raises `InputError` where its gradients are to have gradients."""

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            rule = "a backward pass with create_graph must be made of a pass within advmoe.native.without_kernels()"
            raise InputError(f"{rule}, got one of a pass outside: it has first derivatives alone")
        return backward(ctx, *gradients)

    return checked

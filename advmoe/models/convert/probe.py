"""What a network computes: its logits on an example, where it lies, and what that says about its images.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models.modes import evaluating
from advmoe.moe.layer import MoELayer
from advmoe.text import one_line

SAME = 1e-3
"""Largest difference of logits before and after, relative to the largest: grouped samples take other kernels, which
round apart. A layer that does not run as it seems to makes a far larger one."""


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module's parameters lie, and in what precision: the first one's."""
    first = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


def image_spec(module: nn.Module) -> dict[str, Any]:
    """What the network alone says about its images: their channels, if it begins with a convolution."""
    first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
    return {"num_classes": None, "input_size": None, "in_channels": None if first is None else first.in_channels}


def spec_of(example: Tensor, logits: Tensor) -> dict[str, Any]:
    """What a network says of its images and classes that takes `example` (N, C, H, W) to `logits` (N, K)."""
    channels, height, width = example.shape[1:]
    return {
        "num_classes": logits.shape[1],
        "input_size": height if height == width else None,
        "in_channels": channels,
    }


def logits_of(model: nn.Module, example: Tensor) -> Tensor:
    """The logits (N, K) of `example`, in eval mode and without gradients. Raises `ValueError` where there are none."""
    rule = "example must be floating-point images (N, C, H, W) with N >= 2"
    if not isinstance(example, Tensor) or example.dim() != 4 or len(example) < 2 or not example.is_floating_point():
        raise InputError(f"{rule}, got {_shown(example)}")
    device, dtype = place_of(model)
    shape = tuple(example.shape)
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model), torch.no_grad():
            logits = model(example.to(device, dtype))
    except AttributeError as error:
        asked = f" (asked of {error.obj.title})" if isinstance(error.obj, MoELayer) else ""
        raise InputError(f"module must take images {shape} without an error, got {one_line(error)}{asked}") from error
    except Exception as error:
        raise InputError(f"module must take images {shape} without an error, got {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(example):
        raise InputError(f"module must make logits (N, K) of images {shape}, got {_shown(logits)}")
    return logits


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def require_same(model: nn.Module, example: Tensor, before: Tensor) -> None:
    """Raise `ValueError` unless `model` takes `example` to the logits that it had `before`, up to rounding."""
    after = logits_of(model, example)
    bound = SAME * max(1.0, before.abs().nan_to_num().max().item())
    if not torch.allclose(after, before, rtol=0, atol=bound, equal_nan=True):
        apart = (after - before).abs().max().item()
        rule = "module must compute the same when its layers are replaced (deterministic, layers called as they are)"
        raise InputError(f"{rule}, got logits {apart:.3g} apart")

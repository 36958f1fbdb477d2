"""How a model computes the experts of a batch: by dispatch, or masked (`training.compute`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from advmoe.moe.layer import MoELayer

MOST_MASKED = 4
"""Experts up to which a GPU computes all for every image. On paper: at CIFAR's size a step's arithmetic takes an H200
about 1 ms, its launches tens, and each layer's dispatch a wait beside (docs/how-to/gpus.md).
"""


def compute_on(device: torch.device, wanted: str, num_experts: int) -> Literal["dispatch", "masked"]:
    """The way that `wanted` (`auto`, `dispatch` or `masked`) comes to on `device`, for layers of `num_experts`."""
    if wanted == "auto":
        return "masked" if device.type == "cuda" and num_experts <= MOST_MASKED else "dispatch"
    return "masked" if wanted == "masked" else "dispatch"


def set_compute(model: nn.Module, wanted: str, device: torch.device) -> None:
    """Have every MoE layer of `model` compute by `wanted` on `device`, in hard passes, from now on."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.masks = compute_on(device, wanted, layer.num_experts) == "masked"

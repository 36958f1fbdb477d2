"""How a model computes the experts of a batch: by dispatch, masked, or by kernels (`training.compute`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import nn

from advmoe import ops
from advmoe.errors import InputError
from advmoe.moe.layer import moe_layers

MOST_MASKED = 4
"""Experts up to which a GPU computes all for every image. On paper: at CIFAR's size a step's arithmetic takes an H200
about 1 ms, its launches tens, and each layer's dispatch a wait beside (docs/how-to/gpus.md).
"""


Way = Literal["dispatch", "masked", "kernel"]


def compute_on(device: torch.device, wanted: str, num_experts: int) -> Way:
    """The way that `wanted` (`auto` or a way) comes to on `device`, for layers of `num_experts`.

    Raises `ValueError` where `kernel` is wanted and cannot be had.
    """
    if wanted == "auto":
        return "masked" if device.type == "cuda" and num_experts <= MOST_MASKED else "dispatch"
    if wanted == "kernel" and (missing := ops.kernels_missing(device)) is not None:
        raise InputError(f"training.compute kernel needs {missing}")
    return cast(Way, wanted)


def set_compute(model: nn.Module, wanted: str, device: torch.device) -> None:
    """Have every MoE layer of `model` compute by `wanted` on `device`, in hard passes, from now on."""
    for layer in moe_layers(model):
        way = compute_on(device, wanted, layer.num_experts)
        layer.masks, layer.kernels = way == "masked", way == "kernel"


@contextmanager
def computing(model: object, wanted: str, device: torch.device) -> Iterator[None]:
    """Inside, `model`, where it is a network, computes by `wanted` on `device` (`set_compute`); then as before."""
    layers = moe_layers(model) if isinstance(model, nn.Module) else []
    before = [(layer, layer.masks, layer.kernels) for layer in layers]
    if isinstance(model, nn.Module):
        set_compute(model, wanted, device)
    try:
        yield
    finally:
        for layer, masks, kernels in before:
            layer.masks, layer.kernels = masks, kernels

"""What several processes of one run must agree on: gradients after every step, batch-norm statistics before every
measurement.

The gradients of a level are averaged in one all-reduce after its backward pass. A wrapper that hooks into backward
would have to know which experts got samples on which process, and one half of the parameters is fixed at any time; an
average afterwards needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn


def _averaged(fabric: Fabric, tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:  # a network without buffers
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    mean = fabric.all_reduce(flat, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return [part.view(t.shape) for part, t in zip(mean.split([t.numel() for t in tensors]), tensors, strict=True)]


def average_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes; an expert without samples on a process counts as zero there."""
    if fabric.world_size == 1:
        return
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    for parameter, mean in zip(learning, _averaged(fabric, gradients), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(mean)  # in the parameter's memory format


def average_buffers(fabric: Fabric, buffers: Iterable[Tensor]) -> None:
    """Replace batch-norm statistics, which each process gathered from its own share, by their mean."""
    if fabric.world_size == 1:
        return
    gathered = [buffer for buffer in buffers if buffer.is_floating_point()]
    for buffer, mean in zip(gathered, _averaged(fabric, gathered), strict=True):
        buffer.copy_(mean)


def total(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Sum over processes."""
    if fabric.world_size == 1:
        return tensor
    reduced = fabric.all_reduce(tensor.clone(), reduce_op="sum")  # which is done in place
    assert isinstance(reduced, Tensor)
    return reduced

"""Batch norms' statistics for what a network has become, estimated anew: `training.frozen_norms=refresh`.

Axes: `N` images, `B` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advmoe.data import Images
from advmoe.models.modes import evaluating
from advmoe.precision import full_fp32
from advmoe.progress import shown
from advmoe.seeding import generator_for
from advmoe.tables import Part
from advmoe.training.methods import is_batch_norm, untouched

_IMAGES = 2048
"""Training images that an estimate is made of: their mean is a few percent of a deviation off."""


def fixed_norms(model: nn.Module, part: Part) -> list[_BatchNorm]:
    """The batch norms with statistics whose parameters stay fixed while `part` learns."""
    return [module for module in untouched(model, part) if is_batch_norm(module) and module.running_mean is not None]


def sampled(images: Images, batch_size: int, seed: int) -> list[Tensor]:
    """Indices (B,) of the batches that an estimate is made of: full ones, of the same images whenever it is made."""
    number = min(len(images), max(_IMAGES, batch_size))
    chosen = torch.randperm(len(images), generator=generator_for(seed, "statistics"))[:number]
    size = min(batch_size, number)
    return list(chosen[: number - number % size].split(size))


def refresh(model: nn.Module, norms: Sequence[_BatchNorm], images: Images, batch_size: int, seed: int) -> None:
    """Have `norms` hold the statistics of what they see on clean `images`, all else in eval mode and left as it is.

    Args:
        model: (B, C, H, W) -> anything, on the device of the images' labels; it is routed as in evaluation.
        norms: of the model. Each batch is normalised by itself on its way to the next of them.
        images: N of them, uint8; at least two are drawn by `seed`, in batches of `batch_size`.

    The running mean becomes the mean over batches of their means, the running variance that of their unbiased
    variances. Source: Ioffe & Szegedy, ICML 2015, Algorithm 2.
    """
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    batches = images.batches(sampled(images, batch_size, seed))
    with evaluating(model), torch.no_grad(), full_fp32(), shown(False), closing(batches) as drawn:
        for norm in norms:
            norm.training = True
            norm.reset_running_stats()
        try:
            _average(model, norms, (batch for batch, _ in drawn))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for counter, count in zip(counters, counts, strict=True):
                counter.copy_(count)


def _average(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Tensor]) -> None:
    """Have `norms`, in train mode, hold the means over `batches`, (B, C, H, W) uint8, of their statistics."""
    for number, batch in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number
        model(batch.float().div_(255).contiguous(memory_format=torch.channels_last))

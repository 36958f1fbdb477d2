"""Learning rate over a run, and which images make which batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advmoe.seeding import generator_for


def cosine(step: int, total: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `total` iterations: 1 at the start, 0 at the end.

    Source: Loshchilov & Hutter, ICLR 2017, without restarts.
    """
    return 0.5 * (1 + math.cos(math.pi * step / total))


def batches(num_images: int, batch_size: int, *, seed: int, epoch: int, levels: int = 1) -> list[tuple[Tensor, ...]]:
    """Image indices of every iteration of an epoch: for each, one batch per level.

    Each level sees every image at most once an epoch (the incomplete last batch is left out) in a fresh random order;
    the levels' orders are rotations of one another, so that the batches of an iteration share no image wherever the
    set holds enough.
    """
    size = min(batch_size, num_images)
    iterations = num_images // size
    order = torch.randperm(num_images, generator=generator_for(seed, "order", epoch))
    rotated = [order.roll(-(level * num_images // levels)) for level in range(levels)]
    return [tuple(r[i * size : (i + 1) * size] for r in rotated) for i in range(iterations)]

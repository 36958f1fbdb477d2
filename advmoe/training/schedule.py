"""Learning rate over a run, and which images make which batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advmoe.config import TrainingConfig
from advmoe.errors import InputError
from advmoe.seeding import generator_for


def cosine(step: int, total: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `total` iterations: 1 at the start, 0 at the end.

    Source: Loshchilov & Hutter, ICLR 2017, without restarts.
    """
    if not 0 <= step <= total or total < 1:
        raise InputError(f"step must be from 0 to total={total}, which is 1 at least, got {step!r}")
    return 0.5 * (1 + math.cos(math.pi * step / total))


def one_cycle(step: int, total: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `total` iterations: linearly from 0 to 1 at two fifths of
    them, and back to 0; of each iteration that in its middle, so that none is at 0.

    Source: Smith & Topin, 2017, as in Wong et al., ICLR 2020.
    """
    now = (step + 0.5) / total
    return now / 0.4 if now < 0.4 else (1 - now) / 0.6


def tenths(step: int, total: int) -> float:
    """Factor on the peak learning rate at `step` (from 0) of `total` iterations: a tenth from half of them on, and a
    tenth of that from three quarters on.

    Source: Rice et al., ICML 2020.
    """
    return 0.1 ** ((2 * step >= total) + (4 * step >= 3 * total))


_COURSES = {"cosine": cosine, "one-cycle": one_cycle, "step": tenths}


def rate(training: TrainingConfig, step: int, per_epoch: int) -> float:
    """Factor on the peak learning rate at iteration `step` (from 0) of a run of `per_epoch` iterations an epoch: that
    of `training.schedule`, after `training.warmup_epochs` in which it rises linearly to 1 (Goyal et al., 2017).
    """
    warm = training.warmup_epochs * per_epoch
    if step < warm:
        return (step + 1) / warm
    return _COURSES[training.schedule](step - warm, training.epochs * per_epoch - warm)


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

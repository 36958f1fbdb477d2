"""Adversarial weight perturbation: gradients taken where the weights are a little worse than they are.

Source: Wu et al., NeurIPS 2020 (eq. 8 to 10, one step; TRADES-AWP).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_TINY = 1e-20


@contextmanager
def perturbed(parameters: Iterable[nn.Parameter], gamma: float) -> Iterator[None]:
    """Every weight tensor w with a gradient g moved by gamma * |w| * g / |g| inside, and back bit for bit afterwards.

    Biases and the scales of norms (one axis) stay, as in the authors' code. An MoE layer's bank is one tensor.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None and parameter.dim() > 1]
    before = [parameter.detach().clone() for parameter in moved]
    with torch.no_grad():
        for parameter in moved:
            assert parameter.grad is not None
            parameter.add_(parameter.grad * (gamma * parameter.norm() / parameter.grad.norm().clamp_min(_TINY)))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, as_it_was in zip(moved, before, strict=True):
                parameter.copy_(as_it_was)

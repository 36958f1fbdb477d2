"""A choice's probability, the gradient that it gets, and the mixture of all choices.

Axes: `N` batch, `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advmoe.ops import raw
from advmoe.ops.once import once
from advmoe.ops.rows import row_products


def chosen_probability(scores: Tensor, choice: Tensor) -> Tensor:
    """The softmax probability, by `scores` (N, E), of each sample's `choice` (N,): (N,)."""
    if scores.dtype == torch.float32 and raw.suits(scores):
        probability: Tensor = _Chosen.apply(scores, choice.long().contiguous())  # type: ignore[no-untyped-call]
        return probability
    return scores.softmax(1).gather(1, choice[:, None])[:, 0]


def straight_through(y: Tensor, gate: Tensor) -> Tensor:
    """y * (1 + gate - stop_grad(gate)): `y` (N, ...) unchanged; backward gives `gate` (N,) the gradient <dL/dy, y>."""
    if torch.compiler.is_compiling() or raw.as_written():
        return y * (1 + (gate - gate.detach())).to(y.dtype).view(-1, *[1] * (y.dim() - 1))
    gated: Tensor = _Gate.apply(y, gate)  # type: ignore[no-untyped-call]
    return gated


def mix(every: Tensor, weights: Tensor) -> Tensor:
    """The sum over experts of `weights` (N, E) times what each made, `every` (N, E, ...): (N, ...)."""
    if every.dim() == 5 and weights.dtype == torch.float32:
        together = every.flatten(1, 2)
        if raw.mixes(together, every.shape[1]):
            y: Tensor = _Mix.apply(together, weights.contiguous())  # type: ignore[no-untyped-call]
            return y
    return (every * weights.to(every.dtype).view(*weights.shape, *[1] * (every.dim() - 2))).sum(1, dtype=every.dtype)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(scores, choice)
        return raw.chosen_probability(scores, choice)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, choice = ctx.saved_tensors
        return raw.chosen_probability_backward(scores, choice, grad.contiguous()), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.gate_dtype = gate.dtype
        return y.view_as(y)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        return grad, row_products(grad, y).to(ctx.gate_dtype)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(every, weights)
        return raw.mixed(every, weights)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        every, weights = ctx.saved_tensors
        every, grad = (each.contiguous(memory_format=torch.channels_last) for each in (every, grad))
        return raw.unmixed(grad, every, weights)

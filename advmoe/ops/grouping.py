"""Each sample to its expert, and the results back in order: one row copy each way.

Axes: `N` batch, `n_e` samples of expert e. `members` (n_e,) say where in the batch the samples of each part belong; one
part that has them all needs none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from advmoe.ops import raw
from advmoe.ops.gate import straight_through
from advmoe.ops.once import once
from advmoe.ops.rows import merge_rows, row_products, split_rows


def split(x: Tensor, members: tuple[Tensor, ...], gate: Tensor | None = None) -> tuple[Tensor, ...]:
    """The samples of each part, `x[index]`, (n_e, ...) each, of `x` (N, ...), `straight_through` the `gate` (N,) if
    there is one.
    """
    if not members or raw.as_written():
        gated = x if gate is None else straight_through(x, gate)
        return tuple(gated.index_select(0, each) for each in members) if members else (gated,)
    if gate is None:
        parts: tuple[Tensor, ...] = _Split.apply(x, *members)  # type: ignore[no-untyped-call]
    else:
        parts = _GatedSplit.apply(x, gate, *members)  # type: ignore[no-untyped-call]
    return parts


def merge(parts: tuple[Tensor, ...], members: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `split`: (N, ...) in the batch's own order."""
    if not members:
        return parts[0]
    if raw.as_written():
        return torch.cat(parts).index_select(0, torch.cat(members).argsort())
    merged: Tensor = _Merge.apply(members, *parts)  # type: ignore[no-untyped-call]
    return merged


class Grouped(NamedTuple):
    """A layer's output (N, ...), whose samples may lie apart, by expert, until what follows puts them together."""

    parts: tuple[Tensor, ...]
    members: tuple[Tensor, ...] = ()

    def merged(self) -> Tensor:
        """The output in the batch's own order."""
        return merge(self.parts, self.members)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *members: Tensor) -> tuple[Tensor, ...]:
        ctx.members = members
        return split_rows(x, members)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return merge_rows(grads, ctx.members), *[None] * len(ctx.members)


class _GatedSplit(torch.autograd.Function):
    """`straight_through` and `split`, whose backward passes over the gradient are one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, *members: Tensor) -> tuple[Tensor, ...]:
        ctx.members, ctx.gate_dtype = members, gate.dtype
        ctx.save_for_backward(x)
        return split_rows(x, members)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if raw.suits(x, *grads):
            grad, products = raw.unsplit(raw.Parts(grads, ctx.members), x)
        else:
            grad = merge_rows(grads, ctx.members)
            products = row_products(grad, x)
        return grad, products.to(ctx.gate_dtype), *[None] * len(ctx.members)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, members: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        ctx.members = members
        return merge_rows(parts, members)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *split_rows(grad, ctx.members)

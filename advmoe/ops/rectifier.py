"""ReLU and its neighbours in a network with MoE layers, in as few passes over activations as can be.

Before it come a batch norm, the merging of experts' outputs and a residual block's sum. After it come the next MoE
layer, whose router begins with a mean over pixels, and the next block's shortcut. With kernels a CPU does all of this
in one pass, and all the gradients in another. A batch norm in train mode takes one more each way. After a convolution
by fixed filters there is no pass at all: each sample is finished while it is in the cache.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.ops import raw
from advmoe.ops.convolution import Convolved
from advmoe.ops.grouping import Grouped
from advmoe.ops.hooks import listened
from advmoe.ops.once import once
from advmoe.ops.routed import Routed
from advmoe.ops.rows import split_rows


class Rectified(NamedTuple):
    """A layer's output after its rectifier."""

    x: Tensor
    """(N, C, H, W)."""
    pooled: Tensor | None = None
    """The mean of `x` over its pixels, (N, C) in fp32, where it was asked for and cheap."""
    again: Tensor | None = None
    """The values of `x` as another tensor, for a second use: the backward pass adds up both gradients as it goes."""


def rectify(y: Tensor, shortcut: Tensor | None = None, *, pool: bool = False) -> Rectified:
    """max(y + shortcut, 0) for `y` (N, C, H, W), which it overwrites; with `pool` its mean too, where that is cheap."""
    if type(y) is Tensor and _suits((y,), shortcut):
        if not torch.is_grad_enabled():
            x, pooled = raw.rectify(raw.Parts((y,)), shortcut, pool=pool, out=y)
            if not y.is_inference():
                torch.autograd.graph.increment_version(y)
            return Rectified(x, pooled)
        if not (y.is_leaf and y.requires_grad):
            return Rectified(*_Rectify.apply(shortcut, pool, (), y))  # type: ignore[no-untyped-call]
    if shortcut is not None:
        y += shortcut
    return Rectified(F.relu(y, inplace=True))


def norm_act(
    y: Grouped | Convolved | Routed,
    norm: nn.BatchNorm2d | None,
    act: nn.Module,
    shortcut: Tensor | None = None,
    *,
    pool: bool = False,
) -> Rectified:
    """act(norm(y) + shortcut), or without a `norm`, for a layer's output `y` (N, C, H, W); `act` is a module that takes
    both and does what `rectify` does.
    """
    silent = not listened(act)
    if not isinstance(y, Grouped):
        if silent and norm is None and (output := _convolution_rectify(y, shortcut, pool=pool)) is not None:
            return output
        y = Grouped((y.merged(),))
    parts, members = y
    fused = silent and type(parts[0]) is Tensor
    if norm is None:
        if fused and members and _suits(parts, shortcut):
            return Rectified(*_Rectify.apply(shortcut, pool, members, *parts))  # type: ignore[no-untyped-call]
    elif fused and norm.training and _suits(parts, shortcut) and _normalises(norm, parts):
        arguments = (shortcut, pool, norm.weight, norm.bias, norm.eps, members)
        *outputs, mean, variance = _NormRectify.apply(*arguments, *parts)  # type: ignore[no-untyped-call]
        if norm.track_running_stats:
            _record(norm, mean, variance, sum(part.numel() for part in parts) // parts[0].shape[1])
        return Rectified(*outputs)
    x = y.merged()
    return Rectified(act(x if norm is None else norm(x), shortcut))


def _convolution_rectify(y: Convolved | Routed, shortcut: Tensor | None, *, pool: bool) -> Rectified | None:
    """max(y + shortcut, 0), each sample rectified as it is convolved; None where the kernels cannot do that."""
    if isinstance(y, Routed):
        return Rectified(*y.rectified(shortcut, pool=pool)) if y.adds(shortcut) else None
    others = () if shortcut is None else (shortcut,)
    shape = y.filters.made_of(y.x.shape)
    if type(y.x) is not Tensor or shape[1] % raw.LANES or not raw.suits(y.x, *others):
        return None
    if any(each.shape != shape for each in others):
        return None
    if not torch.is_grad_enabled():
        return Rectified(*y.filters.rectified(y.x, y.choice, shortcut, pool=pool))
    return Rectified(*_ConvolutionRectify.apply(*y, shortcut, pool))  # type: ignore[no-untyped-call]


def _suits(parts: tuple[Tensor, ...], shortcut: Tensor | None) -> bool:
    """Whether the kernels take these."""
    others = () if shortcut is None else (shortcut,)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return raw.rectifies(*parts, *others) and all(each.shape == shape for each in others)


def _normalises(norm: nn.BatchNorm2d, parts: tuple[Tensor, ...]) -> bool:
    """Whether the kernels do what `norm` does to these."""
    if norm.weight is None or norm.bias is None or norm.weight.dtype != torch.float32:
        return False
    if not raw.suits(norm.weight, norm.bias) or listened(norm):
        return False
    if norm.num_features != parts[0].shape[1]:  # of which PyTorch's complains
        return False
    return sum(part.numel() for part in parts) > parts[0].shape[1]  # PyTorch's refuses a single value


def _record(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Have `norm` remember the statistics (C,) of a batch of `count` values a channel, as PyTorch's does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)


class _Rectify(torch.autograd.Function):
    """max(y + shortcut, 0) of a batch in parts; its mean over pixels, if `pool`; and the result as another tensor, for
    a second use. Where y is one part it is overwritten, and there is no such tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor | None, pool: bool, members: tuple[Tensor, ...], *rows: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, out = raw.Parts(rows, members), None if members else rows[0]
        x, pooled = raw.rectify(y, shortcut, pool=pool, out=out)
        if out is not None:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.summed, ctx.members = shortcut is not None, members
        return x, pooled, x.detach() if out is None else None

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        upstream, members = _upstream(x, *gradients), ctx.members
        if ctx.summed or not members:
            (whole,) = raw.unrectify(x, upstream, raw.Parts((torch.empty_like(x),)))
            rows = split_rows(whole, members) if members else (whole,)
            return whole if ctx.summed else None, None, None, *rows
        into = tuple(
            torch.empty(len(m), *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=_LAST) for m in members
        )
        return None, None, None, *raw.unrectify(x, upstream, raw.Parts(into, members))


class _NormRectify(torch.autograd.Function):
    """max(norm(y) + shortcut, 0) of a batch in parts by its own statistics, and the rest as of `_Rectify`; then the
    statistics: mean and variance (C,), in fp64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        shortcut: Tensor | None,
        pool: bool,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        members: tuple[Tensor, ...],
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        normed = raw.norm_rectify(raw.Parts(rows, members), weight, bias, eps, shortcut, pool=pool)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normed.mean, normed.variance)
        ctx.save_for_backward(weight, normed.x, normed.mean, normed.variance, *rows)
        ctx.summed, ctx.eps, ctx.members = shortcut is not None, eps, members
        return normed.x, normed.pooled, normed.x.detach(), normed.mean, normed.variance

    @staticmethod
    @once
    def backward(
        ctx: Any, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, x, mean, variance, *rows = ctx.saved_tensors
        y, normed = raw.Parts(tuple(rows), ctx.members), raw.Normed(x, None, mean, variance)
        upstream = _upstream(x, grad, pooled, branch)
        dy, *others = raw.unnorm_rectify(y, normed, weight, ctx.eps, upstream, shortcut=ctx.summed)
        weight_grad, bias_grad, shortcut_grad = others
        return shortcut_grad, None, weight_grad, bias_grad, None, None, *dy


class _ConvolutionRectify(torch.autograd.Function):
    """max(conv(x) + shortcut, 0) by fixed filters, of which each sample uses its expert's, `straight_through` the gate
    ahead of it, and the rest as of `_Rectify`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        choice: Tensor,
        filters: raw.Packed,
        shortcut: Tensor | None,
        pool: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        y, pooled = filters.rectified(x, choice, shortcut, pool=pool)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, choice, y, filters.filters)  # the last so that a change of these does not go unnoticed
        ctx.filters, ctx.gate_dtype = filters, None if gate is None else gate.dtype
        ctx.summed = shortcut is not None
        return y, pooled, y.detach()

    @staticmethod
    @once
    def backward(
        ctx: Any, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, choice, y, _ = ctx.saved_tensors
        x, y = (
            x.contiguous(memory_format=_LAST),
            y.contiguous(memory_format=_LAST),
        )  # hooks on saved tensors may change it
        upstream = _upstream(y, grad, pooled, branch)
        gated = ctx.gate_dtype is not None
        dx, products, dshortcut = ctx.filters.unrectified(y, upstream, x, choice, products=gated, shortcut=ctx.summed)
        return dx, products.to(ctx.gate_dtype) if products is not None else None, None, None, dshortcut, None


_LAST = torch.channels_last


def _upstream(x: Tensor, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None) -> raw.Gradients:
    """The gradients of `x`, of its mean and of its second use, as the kernels take them."""
    each = [g.to(x.dtype).contiguous(memory_format=_LAST) for g in (grad, branch) if g is not None]
    first = each[0] if each else torch.zeros_like(x)
    second = each[1] if len(each) == 2 else None
    return raw.Gradients(first, second, None if pooled is None else pooled.float().contiguous())

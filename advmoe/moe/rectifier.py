"""ReLU, and what stands around it in a network with MoE layers, in as few passes over activations as can be.

Ahead of it stand a batch norm, the putting together of experts' outputs and a residual block's sum; behind it the next
MoE layer, whose router begins with a mean over pixels, and the next block's shortcut.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe.moe.dispatch import Plan, merge, split_rows
from advmoe.moe.routing import active_routing
from advmoe.ops import raw

_KNOWN = "_advmoe_rectified"
"""The attribute of a rectified tensor that holds what was made with it."""


class _Rectified(torch.autograd.Function):
    """max(y + shortcut, 0) of a batch in parts, its mean over pixels, which is None unless `pool`, and the same once
    more for a second use; in place of y, and with no second, where y is one part.
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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        given, members = _given(x, *gradients), ctx.members
        if ctx.summed or not members:
            (whole,) = raw.unrectify(x, given, raw.Parts((torch.empty_like(x),)))
            rows = split_rows(whole, members) if members else (whole,)
            return whole if ctx.summed else None, None, None, *rows
        into = tuple(
            torch.empty(len(m), *x.shape[1:], dtype=x.dtype, device=x.device, memory_format=_LAST) for m in members
        )
        return None, None, None, *raw.unrectify(x, given, raw.Parts(into, members))


class _NormRectified(torch.autograd.Function):
    """max(norm(y) + shortcut, 0) of a batch in parts by its own statistics, and the rest as of `_Rectified`; then the
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
        made = raw.norm_rectify(raw.Parts(rows, members), weight, bias, eps, shortcut, pool=pool)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made.mean, made.variance)
        ctx.save_for_backward(weight, made.x, made.mean, made.variance, *rows)
        ctx.summed, ctx.eps, ctx.members = shortcut is not None, eps, members
        return made.x, made.pooled, made.x.detach(), made.mean, made.variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, x, mean, variance, *rows = ctx.saved_tensors
        y, made = raw.Parts(tuple(rows), ctx.members), raw.Normed(x, None, mean, variance)
        given = _given(x, grad, pooled, branch)
        dy, weight_grad, bias_grad, kept = raw.unnorm_rectify(y, made, weight, ctx.eps, given, shortcut=ctx.summed)
        return kept, None, weight_grad, bias_grad, None, None, *dy


class _ConvolutionRectified(torch.autograd.Function):
    """max(conv(x) + shortcut, 0) by fixed filters, of which each sample uses its expert's, `straight_through` the gate
    ahead of it, and the rest as of `_Rectified`.
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
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, choice, y, _ = ctx.saved_tensors
        x, y = x.contiguous(memory_format=_LAST), y.contiguous(memory_format=_LAST)  # whoever kept them
        given = _given(y, grad, pooled, branch)
        gated = ctx.gate_dtype is not None
        dx, products, kept = ctx.filters.unrectified(y, given, x, choice, products=gated, shortcut=ctx.summed)
        return dx, products.to(ctx.gate_dtype) if products is not None else None, None, None, kept, None


_LAST = torch.channels_last


def _given(x: Tensor, grad: Tensor | None, pooled: Tensor | None, branch: Tensor | None) -> raw.Gradients:
    """The gradients of `x`, of its mean and of its second use, as the kernels take them."""
    each = [g.to(x.dtype).contiguous(memory_format=_LAST) for g in (grad, branch) if g is not None]
    first = each[0] if each else torch.zeros_like(x)
    second = each[1] if len(each) == 2 else None
    return raw.Gradients(first, second, None if pooled is None else pooled.float().contiguous())


class Rectifier(nn.ReLU):
    """ReLU, in place, of what nothing else needs as it was.

    On a CPU with kernels one pass puts experts' outputs together, adds the shortcut, rectifies and, with `pools`, takes
    the mean over pixels that the router of an MoE layer behind it begins with (`pooled_before`); one pass brings all
    their gradients back, and those of a second use (`branch_of`). A batch norm in train mode takes one more each way,
    a convolution whose filters are fixed none: the rest is done to each sample as it comes and goes.
    """

    def __init__(self, *, pools: bool = False) -> None:
        super().__init__(inplace=True)
        self.pools = pools

    def forward(self, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """max(y + shortcut, 0) for `y` (N, C, H, W), which it overwrites."""
        if type(y) is Tensor and self._fused((y,), shortcut):
            if not torch.is_grad_enabled():
                x, pooled = raw.rectify(raw.Parts((y,)), shortcut, pool=self.pools, out=y)
                if not y.is_inference():
                    torch.autograd.graph.increment_version(y)
                return self.kept(x, pooled, None)
            if not (y.is_leaf and y.requires_grad):
                return self.kept(*_Rectified.apply(shortcut, self.pools, (), y))  # type: ignore[no-untyped-call]
        if shortcut is not None:
            y += shortcut
        return super().forward(y)

    def finish(
        self, parts: tuple[Tensor, ...], plan: Plan | None, norm: nn.BatchNorm2d | None, shortcut: Tensor | None
    ) -> Tensor:
        """max(norm(y) + shortcut, 0), or without a `norm`, where y (N, C, H, W) is the `merge` of `parts` by `plan`, or
        the only one of them.
        """
        members = plan.members if plan is not None and len(parts) > 1 else ()
        wanted = bool(members) if norm is None else norm.training
        if wanted and type(parts[0]) is Tensor and not listened(self) and self._fused(parts, shortcut):
            if norm is not None and _batch_normed(norm, parts):
                arguments = (shortcut, self.pools, norm.weight, norm.bias, norm.eps, members)
                *made, mean, variance = _NormRectified.apply(*arguments, *parts)  # type: ignore[no-untyped-call]
                if norm.track_running_stats:
                    _record(norm, mean, variance, sum(part.numel() for part in parts) // parts[0].shape[1])
                return self.kept(*made)
            if norm is None and members:
                made = _Rectified.apply(shortcut, self.pools, members, *parts)  # type: ignore[no-untyped-call]
                return self.kept(*made)
        y = parts[0] if plan is None else merge(parts, plan)
        rectified: Tensor = self(y if norm is None else norm(y), shortcut)
        return rectified

    def convolved(
        self, x: Tensor, gate: Tensor | None, choice: Tensor, filters: raw.Packed, shortcut: Tensor | None
    ) -> Tensor | None:
        """max(conv(x) + shortcut, 0) where conv is as of `dispatch.convolution`, or None where there is more to it."""
        others = () if shortcut is None else (shortcut,)
        shape = filters.made_of(x.shape)
        if type(x) is not Tensor or listened(self) or shape[1] % raw.LANES or not raw.suits(x, *others):
            return None
        if any(each.shape != shape for each in others):
            return None
        choice = choice.long().contiguous()
        if not torch.is_grad_enabled():
            return self.kept(*filters.rectified(x, choice, shortcut, pool=self.pools), None)
        arguments = (x, gate, choice, filters, shortcut, self.pools)
        return self.kept(*_ConvolutionRectified.apply(*arguments))  # type: ignore[no-untyped-call]

    def _fused(self, parts: tuple[Tensor, ...], shortcut: Tensor | None) -> bool:
        """Whether the kernels take these."""
        others = () if shortcut is None else (shortcut,)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return raw.rectifies(*parts, *others) and all(each.shape == shape for each in others)

    @staticmethod
    def kept(x: Tensor, pooled: Tensor | None, branch: Tensor | None) -> Tensor:
        """`x`, of which the rest is then known for as long as the model's pass goes on, if nobody listens to that: who
        asks for a gradient of `x` itself must get all of it, not what is left beside the other two's.
        """
        if active_routing().shares and not x.is_inference():
            setattr(x, _KNOWN, (x._version, pooled, branch))
        return x


def heard(model: nn.Module) -> bool:
    """Whether somebody listens to a part of `model`, and so may hold of its activations."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if listened(module):
            return True
        waiting.extend(child for child in module._modules.values() if child is not None)
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)


def listened(module: nn.Module) -> bool:
    """Whether somebody listens to the module's own calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def pooled_before(x: Tensor) -> Tensor | None:
    """The mean of `x` (N, C, H, W) over its pixels, (N, C), where a `Rectifier` of this pass made both and `x` is as it
    left it.
    """
    return _known(x)[0]


def branch_of(x: Tensor) -> Tensor:
    """`x`, for a second use, whose gradient a `Rectifier` of this pass that made `x` adds where it needs both."""
    branch = _known(x)[1]
    return x if branch is None else branch


def _known(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mean of `x` and `x` for a second use, each None where it is not known, or has no gradient to bring back."""
    if type(x) is not Tensor or not hasattr(x, _KNOWN):  # what a graph is traced with has every attribute
        return None, None
    if not active_routing().shares or x.is_inference() or x.retains_grad or x._backward_hooks:
        return None, None
    version, *made = getattr(x, _KNOWN)
    if version != x._version:
        return None, None
    wanted = torch.is_grad_enabled() and x.requires_grad
    pooled, branch = (None if each is None or (wanted and not each.requires_grad) else each for each in made)
    return pooled, branch


def _batch_normed(norm: nn.BatchNorm2d, parts: tuple[Tensor, ...]) -> bool:
    """Whether the kernels do what `norm` does to these."""
    if not getattr(type(norm), "kernels", False) or not norm.training or norm.weight is None or norm.bias is None:
        return False
    if norm.weight.dtype != torch.float32 or not raw.suits(norm.weight, norm.bias):
        return False
    if norm.num_features != parts[0].shape[1]:  # of which PyTorch's complains
        return False
    if listened(norm):
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

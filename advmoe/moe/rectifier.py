"""ReLU ahead of an MoE layer: what the layer's router pools, and a residual block's sum, in the same pass.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe import native
from advmoe.moe.dispatch import Plan, merge, split_rows

_POOLED = "_advmoe_pooled"


class _Rectified(torch.autograd.Function):
    """max(y + shortcut, 0) and its mean over pixels, which is None unless `pool`: in place of y, where that is one
    part, or put together from the parts that hold its samples at the places `members`.
    """

    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor | None, pool: bool, members: tuple[Tensor, ...], *parts: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if members:
            count, (_, c, h, w) = sum(map(len, parts)), parts[0].shape
            x = torch.empty(count, c, h, w, dtype=parts[0].dtype, memory_format=torch.channels_last)
        else:
            (x,) = parts
            ctx.mark_dirty(x)
        pooled = native.rectify(parts, members, x, shortcut, pool=pool)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.summed, ctx.members = shortcut is not None, members
        return x, pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, mean_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad, mean_grad = _gradients(x, grad, mean_grad)
        whole = native.unrectify(x, grad, mean_grad) if ctx.summed or not ctx.members else None
        if not ctx.members:
            parts = whole
        elif whole is None:
            parts = native.unrectify(x, grad, mean_grad, ctx.members)
        else:
            parts = split_rows(whole[0], ctx.members)
        assert parts is not None
        return whole[0] if whole is not None and ctx.summed else None, None, None, *parts


class Rectifier(nn.ReLU):
    """ReLU, in place, of what nothing else needs as it was.

    On a CPU with kernels one pass adds the shortcut, rectifies and, with `pools`, takes the mean over pixels that the
    router of an MoE layer behind it begins with (`pooled_before`), and one pass brings all their gradients back.
    """

    def __init__(self, *, pools: bool = False) -> None:
        super().__init__(inplace=True)
        self.pools = pools

    def forward(self, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """max(y + shortcut, 0) for `y` (N, C, H, W), which it overwrites."""
        if (y.is_leaf and y.requires_grad) or not self._fused(y, shortcut):
            if shortcut is not None:
                y += shortcut
            return super().forward(y)
        return self._apply_fused(shortcut, (), y)

    def merged(self, parts: tuple[Tensor, ...], plan: Plan, shortcut: Tensor | None) -> Tensor:
        """max(y + shortcut, 0), where y is the `merge` of the experts' outputs."""
        watched = self._forward_hooks or self._forward_pre_hooks
        if len(parts) == 1 or watched or not self._fused(parts[0], shortcut) or not native.suits(*parts):
            rectified: Tensor = self(merge(parts, plan), shortcut)
            return rectified
        return self._apply_fused(shortcut, plan.members, *parts)

    def normed(self, norm: nn.BatchNorm2d, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """max(norm(y) + shortcut, 0) for `y` (N, C, H, W)."""
        if not self._normed(norm, y, shortcut):
            rectified: Tensor = self(norm(y), shortcut)
            return rectified
        arguments = (y, norm.weight, norm.bias, shortcut, norm.eps, self.pools)
        x, pooled, mean, variance = _NormRectified.apply(*arguments)  # type: ignore[no-untyped-call]
        if norm.track_running_stats:
            _record(norm, mean, variance, y.numel() // y.shape[1])
        return _pooling(x, pooled)

    def _normed(self, norm: nn.BatchNorm2d, y: Tensor, shortcut: Tensor | None) -> bool:
        """Whether kernels do what `normed` is."""
        if type(y) is not Tensor or not norm.training or not norm.affine or norm.weight.dtype != torch.float32:
            return False
        if y.dim() != 4 or y.numel() <= y.shape[1]:  # PyTorch's refuses a single value
            return False
        hooks = (norm._forward_hooks, norm._forward_pre_hooks, self._forward_hooks, self._forward_pre_hooks)
        return not any(hooks) and self._fused(y, shortcut)

    def _fused(self, y: Tensor, shortcut: Tensor | None) -> bool:
        others = () if shortcut is None else (shortcut,)
        return native.rectifies(y, *others) and all(each.shape[1:] == y.shape[1:] for each in others)

    def _apply_fused(self, shortcut: Tensor | None, members: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        x: Tensor
        x, pooled = _Rectified.apply(shortcut, self.pools, members, *parts)  # type: ignore[no-untyped-call]
        return _pooling(x, pooled)


def _record(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Have `norm` remember the statistics (C,) of a batch of `count` values a channel, as PyTorch's does."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)


def _pooling(x: Tensor, pooled: Tensor | None) -> Tensor:
    """`x`, of which `pooled_before` then knows the mean."""
    if pooled is not None:
        setattr(x, _POOLED, (pooled, x._version))
    return x


def pooled_before(x: Tensor) -> Tensor | None:
    """The mean of `x` (N, C, H, W) over its pixels, (N, C), where a `Rectifier` made both and `x` is as it left it."""
    pooled, version = getattr(x, _POOLED, (None, None))
    return pooled if version == x._version else None


class _NormRectified(torch.autograd.Function):
    """max(norm(y) + shortcut, 0) by the batch's own statistics, its mean over pixels, which is None unless `pool`, and
    the statistics: mean and variance (C,), in fp64.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, eps: float, pool: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        made = native.norm_rectify(y, weight, bias, eps, shortcut, pool=pool)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(made.mean, made.variance)
        ctx.save_for_backward(y, weight, made.x, made.mean, made.variance)
        ctx.summed, ctx.eps = shortcut is not None, eps
        return made.x, made.pooled, made.mean, made.variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, mean_grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, x, mean, variance = ctx.saved_tensors
        made = native.Normed(x, None, mean, variance)
        each = native.unnorm_rectify(y, made, weight, ctx.eps, *_gradients(x, grad, mean_grad), shortcut=ctx.summed)
        return *each, None, None


def _gradients(x: Tensor, grad: Tensor | None, mean_grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of `x` and of its mean as the kernels take them."""
    grad = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    return grad, None if mean_grad is None else mean_grad.float().contiguous()

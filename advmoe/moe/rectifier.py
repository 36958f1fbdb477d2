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
        grad = torch.zeros_like(x) if grad is None else grad.to(x.dtype)
        grad = grad.contiguous(memory_format=torch.channels_last)
        mean_grad = None if mean_grad is None else mean_grad.float().contiguous()
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

    def _fused(self, y: Tensor, shortcut: Tensor | None) -> bool:
        others = () if shortcut is None else (shortcut,)
        return native.rectifies(y, *others) and all(each.shape[1:] == y.shape[1:] for each in others)

    def _apply_fused(self, shortcut: Tensor | None, members: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        x: Tensor
        x, pooled = _Rectified.apply(shortcut, self.pools, members, *parts)  # type: ignore[no-untyped-call]
        if pooled is not None:
            setattr(x, _POOLED, (pooled, x._version))
        return x


def pooled_before(x: Tensor) -> Tensor | None:
    """The mean of `x` (N, C, H, W) over its pixels, (N, C), where a `Rectifier` made both and `x` is as it left it."""
    pooled, version = getattr(x, _POOLED, (None, None))
    return pooled if version == x._version else None

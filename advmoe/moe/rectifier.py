"""ReLU ahead of an MoE layer: what the layer's router pools, and a residual block's sum, in the same pass.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe import native

_POOLED = "_advmoe_pooled"


class _Rectified(torch.autograd.Function):
    """max(y + shortcut, 0), in place of y, and its mean over pixels, which is None unless `pool`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, shortcut: Tensor | None, pool: bool) -> tuple[Tensor, Tensor | None]:
        pooled = native.rectify(y, shortcut, pool=pool)
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.summed = shortcut is not None
        return y, pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, mean_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(x)
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        back = native.unrectify(x, grad, None if mean_grad is None else mean_grad.contiguous())
        return back, back if ctx.summed else None, None


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
        others = () if shortcut is None else (shortcut,)
        if (y.is_leaf and y.requires_grad) or not native.rectifies(y, *others):
            if shortcut is not None:
                y += shortcut
            return super().forward(y)
        x: Tensor
        x, pooled = _Rectified.apply(y, shortcut, self.pools)  # type: ignore[no-untyped-call]
        if pooled is not None:
            setattr(x, _POOLED, (pooled, x._version))
        return x


def pooled_before(x: Tensor) -> Tensor | None:
    """The mean of `x` (N, C, H, W) over its pixels, (N, C), where a `Rectifier` made both and `x` is as it left it."""
    pooled, version = getattr(x, _POOLED, (None, None))
    return pooled if version == x._version else None

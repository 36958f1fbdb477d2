"""Batch norm that is cheap where its statistics are fixed.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _rows(x: Tensor) -> Tensor:
    """A channels-last (N, C, H, W) as its image rows, (N * H, W * C), sharing memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h, w * c)


class _Affine(torch.autograd.Function):
    """x * scale + shift per channel, for channels-last `x` and constant `scale` and `shift` (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        out = torch.empty_like(x)
        scale = scale.repeat(x.shape[3])
        torch.addcmul(shift.repeat(x.shape[3]), _rows(x), scale, out=_rows(out))
        ctx.save_for_backward(scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(grad)
        torch.mul(_rows(grad), scale, out=_rows(out))
        return out, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, with a faster pass under an attack: eval mode, gradients for the input alone.

    There it is a fixed scale and shift per channel. On channels-last CPU tensors PyTorch's backward loops over the few
    channels of one pixel; over whole image rows (the scale repeated W times) the same arithmetic fills the vector
    units. Forward alone gains nothing, so inference keeps PyTorch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        learnt = self.training or self.weight.requires_grad or self.bias.requires_grad
        attacked = torch.is_grad_enabled() and x.requires_grad and not learnt
        suited = x.device.type == "cpu" and x.dtype == torch.float32
        if not (attacked and suited and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        normalised: Tensor = _Affine.apply(x, scale, self.bias - self.running_mean * scale)  # type: ignore[no-untyped-call]
        return normalised

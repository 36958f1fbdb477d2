"""A batch norm whose statistics and parameters are fixed: a scale and a shift per channel.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from advmoe.ops import raw
from advmoe.ops.once import once


def fixed_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What `norm` in eval mode makes of `x` (N, C, H, W), with a gradient for `x` alone.

    On channels-last CPU tensors PyTorch's backward loops over the few channels of one pixel; over whole image rows (the
    scale repeated W times) the same arithmetic fills the vector units. Forward alone gains nothing.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or x.dtype != torch.float32 or not last:
        return nn.BatchNorm2d.forward(norm, x)
    if torch.compiler.is_compiling() or raw.as_written():
        return nn.BatchNorm2d.forward(norm, x)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    normalised: Tensor = _Affine.apply(x, scale, norm.bias - norm.running_mean * scale)  # type: ignore[no-untyped-call]
    return normalised


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
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(grad)
        torch.mul(_rows(grad), scale, out=_rows(out))
        return out, None, None


def _rows(x: Tensor) -> Tensor:
    """A channels-last (N, C, H, W) as its image rows, (N * H, W * C), sharing memory."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n * h, w * c)

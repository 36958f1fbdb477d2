"""Convolutions by filters that do not learn in this pass, of which each sample uses its expert's; and strided 1x1 ones.

Axes: `N` batch, `C` channels, `H W` size, `M` rows of a bank, `E` experts, `k` kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from advmoe.ops import raw
from advmoe.ops.once import once
from advmoe.ops.raw import Packed

_WORTH_PACKING = 16
"""Samples from which on it pays to have a kernel read weights that are packed for this pass alone."""


def pack(
    filters: Tensor,
    biases: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    experts: int = 1,
    rows: Tensor | None = None,
    once: Tensor | None = None,
) -> Packed | None:
    """Fixed `filters` (M, C_in, k, k) and `biases` (M,) of `experts` for kernels; None where PyTorch is faster.

    `rows` (E, C_out) says which filters are an expert's, unless the experts lie one after another. `once`: the only
    images (N, C_in, H, W) that the result is for, if so; None too where packing takes longer than it saves there.
    """
    if once is not None and not _worthwhile(once):
        return None
    if not Packed.suits(filters, experts):
        return None
    each = [
        None if bank is None else bank.unflatten(0, (experts, -1)) if rows is None else bank[rows]
        for bank in (filters, biases)
    ]
    assert each[0] is not None
    return Packed.of(each[0], each[1], stride, padding)


def worth_packing(filters: Tensor, x: Tensor, experts: int) -> bool:
    """Whether packing `filters` (`pack`) for one pass over `x`, without gradients, takes less time than it saves."""
    return not torch.is_grad_enabled() and _worthwhile(x) and Packed.suits(filters, experts)


def _worthwhile(x: Tensor) -> bool:
    return len(x) >= _WORTH_PACKING and raw.suits(x)


class Convolved(NamedTuple):
    """A convolution yet to be computed: each sample of `x` (N, C_in, H, W) by the filters of its expert, `choice` (N,),
    to (N, C_out, H', W'). If there is a `gate` (N,), `x` goes through `straight_through` first. No sample is moved.
    """

    x: Tensor
    gate: Tensor | None
    choice: Tensor
    filters: Packed

    def merged(self) -> Tensor:
        """The output."""
        if not torch.is_grad_enabled():
            return self.filters.convolve(self.x, self.choice)
        y: Tensor = _Convolution.apply(*self)  # type: ignore[no-untyped-call]
        return y


def convolved(x: Tensor, gate: Tensor | None, choice: Tensor, filters: Packed | None) -> Convolved | None:
    """`Convolved`; None where there are no `filters`, the kernels do not take `x`, or it is a single sample."""
    if filters is None or len(x) < 2 or filters.dtype != x.dtype or not raw.suits(x):
        return None
    return Convolved(x, gate, choice.long().contiguous(), filters)


def fixed_convolution(x: Tensor, filters: Packed | None) -> Tensor | None:
    """`x` (N, C_in, H, W) by the only expert's `filters`; None as of `convolved`."""
    if filters is None or filters.dtype != x.dtype or not raw.suits(x):
        return None
    return Convolved(x, None, torch.zeros(len(x), dtype=torch.long, device=x.device), filters).merged()


def kept_pixels(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The pixels of `x` (N, C, H, W) that a 1x1 convolution of this stride looks at.

    Left to PyTorch (2.11 and 2.13 on CPU), the backward pass of a strided 1x1 convolution with 3 to 8 input channels,
    channels-last, writes beyond its memory (seen at sides of 6 and of 48 to 64). On these pixels stride 1 computes the
    same.
    """
    if type(x) is Tensor and x.requires_grad and torch.is_grad_enabled() and raw.eager():
        strided: Tensor = _Strided.apply(x, stride)  # type: ignore[no-untyped-call]
        return strided
    return _strided(x, stride)


def _strided(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x[..., :: stride[0], :: stride[1]]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, choice: Tensor, filters: Packed) -> Tensor:
        ctx.filters, ctx.gate_dtype = filters, None if gate is None else gate.dtype
        ctx.save_for_backward(x, choice, filters.filters)  # the last so that a change of these does not go unnoticed
        return filters.convolve(x, choice)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, choice, _ = ctx.saved_tensors
        gated = ctx.gate_dtype is not None
        x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
        dx, products = ctx.filters.backward(grad, x, choice, products=gated)
        return dx, products.to(ctx.gate_dtype) if products is not None else None, None, None


class _Strided(torch.autograd.Function):
    """Every stride-th pixel. Its gradient is spread over both axes in one go; autograd takes one axis at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.stride, ctx.shape = stride, x.shape
        ctx.last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        return _strided(x, stride).clone(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        spread = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
        _strided(spread, ctx.stride).copy_(grad)  # which has a derivative of its own
        return spread, None

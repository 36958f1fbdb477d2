"""Convolutions and linear layers of which each sample uses its own expert's filters, by kernels for GPUs: no sample is
moved, and the host does not wait for the choice (`triton_conv`).

Axes: `N` batch, `C` channels, `H W` size, `T` tokens, `E` experts, `k` kernel.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from advmoe.ops import raw
from advmoe.ops.once import once
from advmoe.ops.rows import row_products

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAST = torch.channels_last


@cache
def kernels_missing(device: torch.device) -> str | None:
    """What the kernels for GPUs lack on `device`, in a few words; None where they run. In Triton's interpreter
    (`TRITON_INTERPRET=1`, for tests) they run on every device.
    """
    if find_spec("triton") is None:
        return "the extra triton (pip install 'advmoe[triton]'), got none installed"
    if _triton().interpreted():
        return None
    if device.type != "cuda" or (torch.version.cuda is None and torch.version.hip is None):
        return f"a CUDA device, got {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is not None and capability < (8, 0):
        return f"a GPU of compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
    return None


class Routed(NamedTuple):
    """A convolution yet to be computed: each sample of `x` (N, C_in, H, W) by the filters of its expert, `choice` (N,),
    to (N, C_out, H', W'). If there is a `gate` (N,), `x` goes through `straight_through` first.
    """

    x: Tensor
    gate: Tensor | None
    choice: Tensor
    filters: Tensor
    """(E, C_out, C_in, k, k)."""
    biases: Tensor | None
    """(E, C_out)."""
    stride: tuple[int, int]
    padding: tuple[int, int]

    def merged(self) -> Tensor:
        """The output."""
        y: Tensor = _Routed.apply(*self, None, False, False)[0]  # type: ignore[no-untyped-call]
        return y

    def rectified(self, shortcut: Tensor | None, *, pool: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """max(y + shortcut, 0) of the output y; with `pool` its mean over pixels, (N, C_out) in fp32; and its values as
        another tensor, for a second use.
        """
        outputs: tuple[Tensor, Tensor | None, Tensor] = _Routed.apply(  # type: ignore[no-untyped-call]
            *self, shortcut, True, pool
        )
        return outputs

    def adds(self, shortcut: Tensor | None) -> bool:
        """Whether `shortcut`, if there is one, can be added as it is."""
        return shortcut is None or (shortcut.shape, shortcut.device) == (self.shape, self.x.device)

    @property
    def shape(self) -> torch.Size:
        """(N, C_out, H', W')."""
        geometry = _triton().Geometry(self.stride, self.padding)
        size: tuple[int, int] = geometry.size(self.x.shape[2:], self.filters.shape[3:])
        return torch.Size((len(self.x), self.filters.shape[1], *size))


def routed(
    x: Tensor,
    gate: Tensor | None,
    choice: Tensor,
    banks: tuple[Tensor, ...],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Routed | None:
    """`Routed`, by `banks` of filters (E, C_out, C_in, k, k) and perhaps biases (E, C_out); None where the kernels do
    not take these.
    """
    tensors = (x, *banks)
    if not raw.eager() or any(type(each) not in (Tensor, nn.Parameter) for each in tensors) or not x.numel():
        return None
    if x.dtype not in _DTYPES or any((each.dtype, each.device) != (x.dtype, x.device) for each in tensors):
        return None
    if kernels_missing(x.device) is not None:
        return None
    if x.dtype == torch.bfloat16 and _triton().interpreted():  # which multiplies its bits as whole numbers
        return None
    y = Routed(x, gate, choice, banks[0], banks[1] if len(banks) == 2 else None, stride, padding)
    return y if min(y.shape[2:]) > 0 else None  # of which PyTorch complains


def routed_linear(x: Tensor, choice: Tensor, rows: Tensor, biases: Tensor | None = None) -> Tensor | None:
    """Each sample of `x` (N, T, C_in) or (N, C_in) by its expert's `rows` (E, C_out, C_in), and `biases` (E, C_out):
    (N, ..., C_out). None as of `routed`.
    """
    # Tokens are the pixels of an image one pixel wide.
    image = x.unsqueeze(1) if x.dim() == 2 else x
    banks = (rows[..., None, None],) if biases is None else (rows[..., None, None], biases)
    y = routed(image.transpose(1, 2).unsqueeze(3), None, choice, banks)
    return None if y is None else y.merged().squeeze(3).transpose(1, 2).reshape(*x.shape[:-1], rows.shape[1])


class _Routed(torch.autograd.Function):
    """`Routed.merged`, or with `rectify` what `Routed.rectified` says."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        choice: Tensor,
        filters: Tensor,
        biases: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        shortcut: Tensor | None,
        rectify: bool,
        pool: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kernels = _triton()
        x = x.contiguous(memory_format=_LAST)
        summed = None if shortcut is None else shortcut.contiguous(memory_format=_LAST)
        samples, geometry = kernels.sort(choice, len(filters)), kernels.Geometry(stride, padding)
        finish = kernels.Finish(None if biases is None else biases.contiguous(), summed, rectify, pool)
        y, pooled = kernels.convolve(x, filters, samples, geometry, finish)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, filters, *samples, y if rectify else None)
        ctx.geometry = geometry
        ctx.dtypes = [None if each is None else each.dtype for each in (gate, shortcut)]
        return y, pooled, y.detach() if rectify else None

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, filters, order, starts, y = ctx.saved_tensors
        kernels, needs = _triton(), ctx.needs_input_grad
        samples, (gate_dtype, shortcut_dtype) = kernels.Samples(order, starts), ctx.dtypes
        grad = gradients[0] if y is None else _unrectified(y, *gradients)
        if grad is None:
            return (None,) * 10
        grad = grad.to(x.dtype).contiguous(memory_format=_LAST)
        dx = dgate = dw = db = None
        if needs[0] or needs[1]:
            dx = kernels.unconvolve(grad, filters, samples, ctx.geometry, tuple(x.shape[2:]))
        if needs[1]:
            assert dx is not None
            dgate = row_products(dx, x).to(gate_dtype)
        if needs[3] or needs[4]:
            dw, db = kernels.filter_gradients(x, grad, samples, ctx.geometry, list(filters.shape[3:]))
            dw, db = dw.to(x.dtype) if needs[3] else None, db.to(x.dtype) if needs[4] else None
        return dx, dgate, None, dw, db, None, None, grad.to(shortcut_dtype) if needs[7] else None, None, None


def _unrectified(y: Tensor, grad: Tensor | None, pooled: Tensor | None, again: Tensor | None) -> Tensor | None:
    """The gradient ahead of the rectifier whose result was `y`, by those of its three uses."""
    if pooled is not None:
        pooled = (pooled / y.shape[2:].numel()).to(y.dtype)[:, :, None, None]
    given = [each for each in (grad, again, pooled) if each is not None]
    if not given:
        return None
    # Where y is NaN the gradient passes, as PyTorch's does.
    return torch.where(y <= 0, 0, sum(given[1:], start=given[0]))


@cache
def _triton() -> ModuleType:
    """The kernels; Triton is imported when they are first asked for."""
    from advmoe.ops import triton_conv

    return triton_conv

"""Convolutions by fixed filters, of which each sample uses its expert's, and what follows them in a network.

Axes: `N` batch, `C` channels, `H W` size, `M` rows of a bank, `E` experts, `k` kernel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.ops.raw.activations import Gradients
from advmoe.ops.raw.build import built
from advmoe.ops.raw.routers import Scorer
from advmoe.ops.raw.tensors import LANES, NAMES, address, available, images, room, threads_for

_LARGEST = 1 << 20
"""Bytes of an expert's fp32 filters that a core's cache still holds between samples; larger ones are better grouped."""
_DEPTH = 32
"""Channels of bf16 that tiles take at once. Others must first be laid side by side, which PyTorch is better at."""

_SIZES = ("h", "w", "c_in", "oh", "ow", "c_out", "kh", "kw", "sh", "sw", "ph", "pw", "experts")


class _Shape(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), *((name, ctypes.c_int32) for name in _SIZES)]


class _Finish(ctypes.Structure):
    _fields_ = [("rectified", ctypes.c_int64), ("shortcut", ctypes.c_void_p), ("pooled", ctypes.c_void_p)]


class _Unfinish(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("y", "branch", "pooled", "dshortcut")]


def _filled(x: Tensor, lanes: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % lanes)).contiguous()


@cache
def _tiles() -> bool:
    """Whether this CPU has tiles (AMX), which convolve bf16 numbers, and the system lets this process use them."""
    return bool(built().functions["tiles"]())


@dataclass
class Packed:
    """The filters of all experts as the kernels read them, for fixed weights."""

    filters: Tensor
    """(E, C_out, C_in, k, k), fp32 or bf16."""
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    _ahead: Tensor = field(init=False)
    _back: Tensor | None = field(init=False, default=None)
    _shift: Tensor | None = field(init=False)

    @staticmethod
    def suits(filters: Tensor, experts: int) -> bool:
        """Whether PyTorch's are not better for such `filters` (M, C_in, k, k) of as many `experts`."""
        if filters.device.type != "cpu":
            return False
        if filters.dtype == torch.bfloat16:
            c_out, c_in = len(filters) // experts, filters.shape[1]
            return c_in % _DEPTH == 0 and c_out % _DEPTH == 0 and available() and _tiles()
        small = filters.numel() * filters.element_size() <= experts * _LARGEST
        return filters.dtype == torch.float32 and small and available()

    @staticmethod
    def of(filters: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Packed:
        """The convolutions by `filters` (E, C_out, C_in, k, k) and `bias` (E, C_out), fp32 or bf16 on the CPU."""
        return Packed(filters.detach(), None if bias is None else bias.detach(), stride, padding)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that it takes."""
        return self.filters.dtype

    def __post_init__(self) -> None:
        if self.dtype == torch.bfloat16 and not (available() and _tiles()):
            raise InputError("filters must be fp32 on this CPU, which has no tiles, got bf16")
        self._ahead = self._packed(backward=False)
        lanes = LANES if self.dtype == torch.float32 else _DEPTH
        self._shift = None if self.bias is None else _filled(self.bias.float(), lanes)

    def _packed(self, *, backward: bool) -> Tensor:
        """The filters as the kernels of one direction read them."""
        if self.dtype == torch.float32:
            return _filled(self.filters.permute((0, 3, 4, 1, 2) if backward else (0, 3, 4, 2, 1)), LANES)
        filters = self.filters.permute(0, 1, 3, 4, 2).contiguous()
        _, _, c_in, kh, kw = self.filters.shape
        shape, _, _ = self._shape(torch.Size((1, c_in, kh, kw)))
        pack, threads = built().functions["pack_bf16"], torch.get_num_threads()
        arguments = ctypes.addressof(shape), backward, filters.data_ptr()
        out = room(pack(*arguments, None, threads), dtype=torch.bfloat16)
        pack(*arguments, out.data_ptr(), threads)
        return out

    def _shape(self, x_shape: torch.Size) -> tuple[_Shape, int, int]:
        experts, c_out, c_in, kh, kw = self.filters.shape
        (sh, sw), (ph, pw) = self.stride, self.padding
        if len(x_shape) != 4 or x_shape[1] != c_in or x_shape[2] + 2 * ph < kh or x_shape[3] + 2 * pw < kw:
            rule = f"(N, {c_in}, H, W), with its padding no smaller than the kernel of {kh} by {kw}"
            raise InputError(f"x must be {rule}, got shape {tuple(x_shape)}")
        n, _, h, w = x_shape
        oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        return _Shape(n, h, w, c_in, oh, ow, c_out, kh, kw, sh, sw, ph, pw, experts), oh, ow

    def made_of(self, x_shape: torch.Size) -> tuple[int, ...]:
        """The shape of `convolve`'s result for an x of `x_shape`."""
        shape, oh, ow = self._shape(x_shape)
        return shape.n, shape.c_out, oh, ow

    def convolve(self, x: Tensor, choice: Tensor) -> Tensor:
        """(N, C_in, H, W), which `suits`, -> (N, C_out, H', W'), each sample by the expert in `choice` (N,)."""
        return self._convolved(x, choice, _Finish())

    def rectified(
        self, x: Tensor, choice: Tensor, shortcut: Tensor | None, *, pool: bool
    ) -> tuple[Tensor, Tensor | None]:
        """max(conv(x) + shortcut, 0) of `convolve`, and with `pool` its mean over pixels, (N, C_out) in fp32. C_out is
        of whole vectors, and a shortcut of the output's shape.
        """
        pooled = room(len(x), self.filters.shape[1]) if pool else None
        return self._convolved(x, choice, _Finish(1, address(shortcut), address(pooled))), pooled

    def _convolved(self, x: Tensor, choice: Tensor, finish: _Finish) -> Tensor:
        shape, oh, ow = self._shape(x.shape)
        y = images(x.shape[0], self.filters.shape[1], oh, ow, dtype=self.dtype)
        wrong = built().functions[f"convolve_{NAMES[self.dtype]}"](
            ctypes.addressof(shape), x.data_ptr(), choice.data_ptr(), self._ahead.data_ptr(), address(self._shift),
            ctypes.addressof(finish), y.data_ptr(), threads_for(len(x)),
        )  # fmt: skip
        if wrong:  # never by a router
            raise InputError(f"forced must hold experts from 0 to {len(self.filters) - 1}, got {choice.tolist()}")
        return y

    def backward(self, grad: Tensor, x: Tensor, choice: Tensor, *, products: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient for `x` (N, C_in, H, W) of `convolve`, by `grad` (N, C_out, H', W'), and, with `products`, its
        inner product with `x`, (N,).
        """
        return self._unconvolved(grad, x, choice, _Unfinish(), products)

    def unrectified(
        self, y: Tensor, gradients: Gradients, x: Tensor, choice: Tensor, *, products: bool, shortcut: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same of `rectified`, by the `gradients` of its result `y`, and the gradient for the `shortcut`, if there
        was one.
        """
        shortcut_grad = torch.empty_like(y) if shortcut else None
        unfinish = _Unfinish(*map(address, (y, gradients.branch, gradients.pooled, shortcut_grad)))
        return *self._unconvolved(gradients.x, x, choice, unfinish, products), shortcut_grad

    def _unconvolved(
        self, grad: Tensor, x: Tensor, choice: Tensor, unfinish: _Unfinish, products: bool
    ) -> tuple[Tensor, Tensor | None]:
        back = self._back  # a reference of our own: another thread may replace it while the kernel reads it
        if back is None:
            back = self._back = self._packed(backward=True)
        shape, _, _ = self._shape(x.shape)
        dx, dots = torch.empty_like(x), room(len(x)) if products else None
        built().functions[f"convolve_backward_{NAMES[self.dtype]}"](
            ctypes.addressof(shape), grad.data_ptr(), ctypes.addressof(unfinish), choice.data_ptr(),
            back.data_ptr(), x.data_ptr(), dx.data_ptr(), address(dots), threads_for(len(x)),
        )  # fmt: skip
        return dx, dots


@dataclass(frozen=True)
class LayerOutput:
    """What `whole_layer` computes."""

    y: Tensor
    """(N, C_out, H', W')."""
    pooled: Tensor | None
    """The mean of `y` over its pixels, (N, C_out)."""
    scores: Tensor
    """(N, E)."""
    choice: Tensor
    """(N,)."""


def whole_layer(
    scorer: Scorer, pooled: Tensor, filters: Packed, x: Tensor, shortcut: Tensor | None, *, pool: bool
) -> LayerOutput:
    """max(conv(x) + shortcut, 0) for `x` (N, C_in, H, W), which `suits`, and its mean over pixels `pooled` (N, C_in),
    each sample by the expert that `scorer` rates highest. C_out is of whole vectors, and a shortcut of the output's
    shape.
    """
    shape, oh, ow = filters._shape(x.shape)
    n, c_out = x.shape[0], filters.filters.shape[1]
    y = images(n, c_out, oh, ow, dtype=filters.dtype)
    if shortcut is not None and shortcut.shape != y.shape:
        raise InputError(f"shortcut must be {tuple(y.shape)}, got shape {tuple(shortcut.shape)}")
    after = room(n, c_out) if pool else None
    scores, choice = room(n, scorer.last.out_features), room(n, dtype=torch.long)
    router, finish = scorer._router(), _Finish(1, address(shortcut), address(after))
    built().functions[f"layer_{NAMES[filters.dtype]}"](
        ctypes.addressof(router), pooled.data_ptr(), ctypes.addressof(shape), x.data_ptr(), filters._ahead.data_ptr(),
        address(filters._shift), ctypes.addressof(finish), y.data_ptr(), scores.data_ptr(), choice.data_ptr(),
        threads_for(n),
    )  # fmt: skip
    return LayerOutput(y, after, scores, choice)

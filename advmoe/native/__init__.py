"""Kernels of our own for routed networks on CPUs, on channels-last tensors. Autograd knows of none of them.

Each has a condition (`suits`, `rectifies`, `Packed.of`) under which it may be called; elsewhere PyTorch's operations do
the same.

Axes: `N` batch, `C` channels, `H W` size, `E` experts, `k` kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.native.build import built

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_LANES = 8
"""Output channels are stored in multiples of this."""
_LARGEST = 1 << 20
"""Bytes of one expert's filters that still lie in a core's cache between samples; larger ones are better grouped."""

_off: ContextVar[bool] = ContextVar("advmoe_native_off", default=False)


def available() -> bool:
    """Whether this machine has the kernels; the first call may compile them, which takes a few seconds."""
    return not _off.get() and built().functions is not None


def missing() -> str | None:
    """Why this machine has no kernels, in a few words; None where it has them."""
    return None if built().functions is not None else built().reason


def used() -> str:
    """Whose kernels CPUs use here, as results say it: `advmoe`, or `PyTorch` and why not ours."""
    return "advmoe" if available() else f"PyTorch ({missing() or 'ours are switched off'})"


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, everything is computed by PyTorch alone."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def suits(*tensors: Tensor) -> bool:
    """Whether `tensors` can be given to a kernel: on the CPU, of one dtype that the kernels know, and each sample one
    row of memory, which nobody traces, counts or batches.
    """
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in _NAMES or not available() or not _eager():
        return False
    return all(each.dtype == first.dtype and _by_pixels(each) for each in tensors)


def _eager() -> bool:
    """Whether operations are done as they are called: no graph is traced, no mode sees them, no transform is on."""
    if torch.compiler.is_compiling():
        return False
    return not torch._C._len_torch_dispatch_stack() and torch._C._functorch.maybe_current_level() is None


def _by_pixels(x: Tensor) -> bool:
    if type(x) not in (Tensor, nn.Parameter):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()


def _threads(samples: int) -> int:
    return max(1, min(torch.get_num_threads(), samples))


def pooled(x: Tensor) -> Tensor:
    """The mean over pixels, (N, C) in fp32, of a channels-last `x` (N, C, H, W) that `suits`."""
    n, c, h, w = x.shape
    out = torch.empty(n, c)
    pool = built().functions[f"pool_{_NAMES[x.dtype]}"]
    pool(x.data_ptr(), n, h * w, c, out.data_ptr(), _threads(n))
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's inner product of `a` and `b` (N, ...), which `suits`: (N,) in fp32."""
    out = torch.empty(len(a))
    row = a.numel() // max(1, len(a))
    multiply = built().functions[f"products_{_NAMES[a.dtype]}"]
    multiply(a.data_ptr(), b.data_ptr(), len(a), row, out.data_ptr(), _threads(len(a)))
    return out


def rectifies(y: Tensor, *others: Tensor) -> bool:
    """Whether `rectify` takes `y` (N, C, H, W), a batch or some of its samples, and `others`."""
    return y.dim() == 4 and y.shape[1] % _LANES == 0 and suits(y, *others)


def rectify(
    parts: Sequence[Tensor], members: Sequence[Tensor], out: Tensor, shortcut: Tensor | None, *, pool: bool
) -> Tensor | None:
    """Set `out` (N, C, H, W) to max(y + shortcut, 0), where the samples of y are those of `parts` (n_e, C, H, W) at the
    places `members` (n_e,), or of the only part, which may be `out` itself; with `pool`, returns the mean of that over
    its pixels, (N, C) in fp32.
    """
    n, c, h, w = out.shape
    mean = torch.empty(n, c) if pool else None
    rows = _Parts(parts, members)
    run = built().functions[f"rectify_{_NAMES[out.dtype]}"]
    run(*rows.arguments(), _address(shortcut), h * w, c, out.data_ptr(), _address(mean), _threads(n))
    return mean


def unrectify(x: Tensor, grad: Tensor, mean_grad: Tensor | None, members: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """The gradient for y of `rectify`, in its parts if there are `members` (n_e,), by that of the result `x` (N, C, H,
    W) and, where it is given, of the mean (N, C).
    """
    n, c, h, w = x.shape
    sizes = [len(index) for index in members] or [n]
    out = tuple(torch.empty(size, c, h, w, dtype=x.dtype, memory_format=torch.channels_last) for size in sizes)
    rows = _Parts(out, members)
    run = built().functions[f"unrectify_{_NAMES[x.dtype]}"]
    run(*rows.arguments(), x.data_ptr(), grad.data_ptr(), _address(mean_grad), h * w, c, _threads(n))
    return out


class _Batch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("n", "pixels", "channels")]

    @staticmethod
    def of(x: Tensor) -> _Batch:
        n, c, h, w = x.shape
        return _Batch(n, h * w, c)


@dataclass(frozen=True)
class Normed:
    """What `norm_rectify` made, and what its gradient needs."""

    x: Tensor
    """(N, C, H, W)."""
    pooled: Tensor | None
    """The mean of `x` over its pixels, (N, C) in fp32."""
    mean: Tensor
    """Of each channel over the batch, (C,) in fp64."""
    variance: Tensor
    """Of the population, (C,) in fp64."""


def norm_rectify(y: Tensor, weight: Tensor, bias: Tensor, eps: float, shortcut: Tensor | None, *, pool: bool) -> Normed:
    """max(norm(y) + shortcut, 0) for `y` (N, C, H, W) that `rectifies`, by the batch's own statistics, with fp32
    `weight` and `bias` (C,).
    """
    batch, channels = _Batch.of(y), y.shape[1]
    x, pooled = torch.empty_like(y), torch.empty(y.shape[:2]) if pool else None
    mean, variance = torch.empty(2, channels, dtype=torch.float64).unbind()
    built().functions[f"norm_{_NAMES[y.dtype]}"](
        ctypes.addressof(batch), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, _address(shortcut),
        x.data_ptr(), _address(pooled), mean.data_ptr(), variance.data_ptr(), _threads(len(y)),
    )  # fmt: skip
    return Normed(x, pooled, mean, variance)


def unnorm_rectify(
    y: Tensor,
    made: Normed,
    weight: Tensor,
    eps: float,
    grad: Tensor,
    pooled_grad: Tensor | None,
    *,
    shortcut: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `norm_rectify` for `y`, weight and bias and, if there was one, for the `shortcut`; by that of
    what it `made` (N, C, H, W) and, where it is given, of its mean over pixels (N, C).
    """
    batch = _Batch.of(y)
    kept, dy = torch.empty_like(y) if shortcut else None, torch.empty_like(y)
    weight_grad, bias_grad = torch.empty(2, y.shape[1]).unbind()
    built().functions[f"unnorm_{_NAMES[y.dtype]}"](
        ctypes.addressof(batch), y.data_ptr(), made.x.data_ptr(), grad.data_ptr(), _address(pooled_grad),
        weight.data_ptr(), eps, made.mean.data_ptr(), made.variance.data_ptr(), _address(kept), dy.data_ptr(),
        weight_grad.data_ptr(), bias_grad.data_ptr(), _threads(len(y)),
    )  # fmt: skip
    return dy, weight_grad, bias_grad, kept


def unsplit(parts: Sequence[Tensor], members: Sequence[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `parts` (n_e, ...) at the places `members` (n_e,) of a batch, as a tensor like `x` (N, ...), and each
    row's inner product with that of `x`, (N,) in fp32. All of these `suits`; every row of the batch is in one part.
    """
    out, products = torch.empty_like(x), torch.empty(len(x))
    rows = _Parts(parts, members)
    run = built().functions[f"unsplit_{_NAMES[x.dtype]}"]
    run(*rows.arguments(), x.data_ptr(), x.numel() // len(x), out.data_ptr(), products.data_ptr(), _threads(len(x)))
    return out, products


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _Parts:
    """Samples that lie apart, as kernels take them; it owns what they point at."""

    def __init__(self, parts: Sequence[Tensor], members: Sequence[Tensor]) -> None:
        count = len(parts)
        self._rows = (ctypes.c_void_p * count)(*(part.data_ptr() for part in parts))
        self._members = (ctypes.c_void_p * count)(*(each.data_ptr() for each in members)) if members else None
        self._counts = (ctypes.c_int64 * count)(*map(len, parts))

    def arguments(self) -> tuple[int, int, int | None, int]:
        """How many parts, and where their rows, their members and their numbers of rows lie."""
        members = None if self._members is None else ctypes.addressof(self._members)
        return len(self._rows), ctypes.addressof(self._rows), members, ctypes.addressof(self._counts)


_SIZES = ("h", "w", "c_in", "oh", "ow", "c_out", "kh", "kw", "sh", "sw", "ph", "pw", "experts")


class _Shape(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), *((name, ctypes.c_int32) for name in _SIZES)]


def _lanes_filled(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % _LANES)).contiguous()


@dataclass
class Packed:
    """The filters of all experts as the kernels read them, for fixed fp32 weights."""

    filters: Tensor
    """(E, C_out, C_in, k, k)."""
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    _ahead: Tensor = field(init=False)
    _back: Tensor | None = field(init=False, default=None)
    _shift: Tensor | None = field(init=False)

    @staticmethod
    def suits(filters: Tensor, experts: int) -> bool:
        """Whether PyTorch's are not better for such `filters` (M, C_in, k, k) of as many `experts`."""
        fixed = filters.device.type == "cpu" and filters.dtype == torch.float32
        return fixed and filters.numel() * filters.element_size() <= experts * _LARGEST and available()

    @staticmethod
    def of(filters: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Packed:
        """The convolutions by `filters` (E, C_out, C_in, k, k) and `bias` (E, C_out), fp32 on the CPU."""
        return Packed(filters.detach(), None if bias is None else bias.detach(), stride, padding)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that it takes."""
        return self.filters.dtype

    def __post_init__(self) -> None:
        self._ahead = _lanes_filled(self.filters.permute(0, 3, 4, 2, 1))
        self._shift = None if self.bias is None else _lanes_filled(self.bias)

    def _shape(self, x_shape: torch.Size) -> tuple[_Shape, int, int]:
        n, c_in, h, w = x_shape
        experts, c_out, _, kh, kw = self.filters.shape
        (sh, sw), (ph, pw) = self.stride, self.padding
        oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        return _Shape(n, h, w, c_in, oh, ow, c_out, kh, kw, sh, sw, ph, pw, experts), oh, ow

    def convolve(self, x: Tensor, choice: Tensor) -> Tensor:
        """(N, C_in, H, W), which `suits`, -> (N, C_out, H', W'), each sample by the expert in `choice` (N,)."""
        shape, oh, ow = self._shape(x.shape)
        y = torch.empty(len(x), self.filters.shape[1], oh, ow, dtype=x.dtype, memory_format=torch.channels_last)
        wrong = built().functions["convolve"](
            ctypes.addressof(shape), x.data_ptr(), choice.data_ptr(), self._ahead.data_ptr(), _address(self._shift),
            y.data_ptr(), _threads(len(x)),
        )  # fmt: skip
        if wrong:
            raise ValueError(f"forced must hold experts from 0 to {len(self.filters) - 1}, got {choice.tolist()}")
        return y

    def backward(self, grad: Tensor, x: Tensor, choice: Tensor, *, products: bool) -> tuple[Tensor, Tensor | None]:
        """The gradient for `x` (N, C_in, H, W) of `convolve`, by `grad` (N, C_out, H', W'), and, with `products`, its
        inner product with `x`, (N,).
        """
        if self._back is None:
            self._back = _lanes_filled(self.filters.permute(0, 3, 4, 1, 2))
        shape, _, _ = self._shape(x.shape)
        dx, dots = torch.empty_like(x), torch.empty(len(x)) if products else None
        built().functions["convolve_backward"](
            ctypes.addressof(shape), grad.data_ptr(), choice.data_ptr(), self._back.data_ptr(), x.data_ptr(),
            dx.data_ptr(), _address(dots), _threads(len(x)),
        )  # fmt: skip
        return dx, dots

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


def _run(name: str, like: Tensor, *tensors: Tensor | None) -> None:
    """A kernel over the whole batch `like` (N, C, H, W)."""
    batch = _Batch.of(like)
    run = built().functions[f"{name}_{_NAMES[like.dtype]}"]
    run(ctypes.addressof(batch), *map(_address, tensors), _threads(len(like)))


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance (of the population) of each channel of `y` (N, C, H, W), (C,) in fp64."""
    n, c, h, w = y.shape
    # Of differences from some value of the channel: a large mean would drown the squares.
    origin = y[0, :, 0, 0].float()
    sums, squares = torch.empty(2, n, c).unbind()
    _run("moments", y, y, origin, sums, squares)
    count = n * h * w
    mean = sums.sum(0, dtype=torch.float64) / count
    variance = (squares.sum(0, dtype=torch.float64) / count - mean * mean).clamp_min(0)
    return mean + origin, variance


def norm_rectify(
    y: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor | None, *, pool: bool
) -> tuple[Tensor, Tensor | None]:
    """max(y * scale + shift + shortcut, 0) for `y` (N, C, H, W), with fp32 `scale` and `shift` (C,), and with `pool`
    its mean over pixels (N, C).
    """
    x, mean = torch.empty_like(y), torch.empty(y.shape[:2]) if pool else None
    _run("norm", y, y, scale, shift, shortcut, x, mean)
    return x, mean


def unnorm_rectify(
    y: Tensor,
    x: Tensor,
    grad: Tensor,
    mean_grad: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients for `y`, `weight` and bias of `norm_rectify` by a batch's own `mean` and `invstd` (C,), in fp64,
    and, with `keep`, for its shortcut; by that of its result `x` and, where it is given, of the mean over pixels.
    """
    n, c, h, w = y.shape
    kept = torch.empty_like(y) if keep else None
    sums, products = torch.empty(2, n, c).unbind()
    centre, count = mean.float(), n * h * w
    _run("unnorm_moments", y, y, x, grad, mean_grad, centre, kept, sums, products)
    shift_grad = sums.sum(0, dtype=torch.float64)
    scale_grad = products.sum(0, dtype=torch.float64) * invstd
    scale = weight.double() * invstd
    slope, offset = -scale * invstd * scale_grad / count, -scale * shift_grad / count
    dy = torch.empty_like(y)
    _run("unnorm", y, y, x, grad, mean_grad, kept, centre, scale.float(), slope.float(), offset.float(), dy)
    return dy, scale_grad, shift_grad, kept


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
    def of(filters: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Packed | None:
        """The convolutions by `filters` (E, C_out, C_in, k, k) and `bias` (E, C_out), or None where PyTorch's are
        better.
        """
        small = filters[0].numel() * filters.element_size() <= _LARGEST
        if filters.device.type != "cpu" or filters.dtype != torch.float32 or not small or not available():
            return None
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

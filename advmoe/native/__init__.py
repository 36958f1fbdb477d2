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
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from advmoe.native.build import built

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LANES = 8
"""Output channels are stored in multiples of this."""
_LARGEST = 1 << 20
"""Bytes of an expert's fp32 filters that a core's cache still holds between samples; larger ones are better grouped."""
_DEPTH = 32
"""Channels of bf16 that tiles take at once. Others must first be laid side by side, which PyTorch is better at."""

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
    """Inside, everything is computed by PyTorch alone: what second derivatives need, which kernels do not have."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def suits(*tensors: Tensor) -> bool:
    """Whether `tensors` can be given to a kernel: on the CPU, of one dtype that the kernels know, and each sample one
    row of memory, which nobody traces, counts or batches.
    """
    if not eager():
        return False
    dtype = tensors[0].dtype
    if dtype not in _NAMES:
        return False
    for each in tensors:
        if type(each) not in _PLAIN or not each.is_cpu or each.dtype != dtype or not _by_pixels(each):
            return False
    return available()


_PLAIN = (Tensor, nn.Parameter)


def eager() -> bool:
    """Whether operations are done as they are called: no graph is traced, no mode sees them, no transform is on."""
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    return torch._C._functorch.maybe_current_level() is None


def _by_pixels(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()


def _threads(samples: int) -> int:
    return max(1, min(torch.get_num_threads(), samples))


def _room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for a kernel to fill, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _images(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def pooled(x: Tensor) -> Tensor:
    """The mean over pixels, (N, C) in fp32, of a channels-last `x` (N, C, H, W) that `suits`."""
    n, c, h, w = x.shape
    out = _room(n, c)
    pool = built().functions[f"pool_{_NAMES[x.dtype]}"]
    pool(x.data_ptr(), n, h * w, c, out.data_ptr(), _threads(n))
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's inner product of `a` and `b` (N, ...), which `suits`: (N,) in fp32."""
    out = _room(len(a))
    row = a.numel() // max(1, len(a))
    multiply = built().functions[f"products_{_NAMES[a.dtype]}"]
    multiply(a.data_ptr(), b.data_ptr(), len(a), row, out.data_ptr(), _threads(len(a)))
    return out


def rectifies(y: Tensor, *others: Tensor) -> bool:
    """Whether `rectify` takes `y` (N, C, H, W), a batch or some of its samples, and `others`."""
    return y.dim() == 4 and y.shape[1] % LANES == 0 and suits(y, *others)


@dataclass(frozen=True)
class Parts:
    """A batch (N, ...) whose samples lie apart, by expert, or together: as one part that needs no members."""

    rows: tuple[Tensor, ...]
    """(n_e, ...) each."""
    members: tuple[Tensor, ...] = ()
    """(n_e,) each: which samples of the batch they are."""

    def like(self) -> Parts:
        """Parts of the same shapes, yet to be filled."""
        return Parts(tuple(map(torch.empty_like, self.rows)), self.members)

    def whole(self) -> Tensor:
        """A batch of the samples' shape, yet to be filled."""
        first, samples = self.rows[0], sum(map(len, self.rows))
        layout = torch.channels_last if first.dim() == 4 else torch.contiguous_format
        return torch.empty(samples, *first.shape[1:], dtype=first.dtype, device="cpu", memory_format=layout)


class _Places(ctypes.Structure):
    _fields_ = [("parts", ctypes.c_int), ("members", ctypes.c_void_p), ("counts", ctypes.c_void_p)]


class _Size(ctypes.Structure):
    _fields_ = [("pixels", ctypes.c_int64), ("channels", ctypes.c_int64)]


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(each.data_ptr() for each in tensors))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(name: str, parts: Parts, *arguments: Any) -> None:
    """A kernel over a batch in parts, which says where they belong and then takes `arguments`."""
    first = parts.rows[0]
    members = _addresses(parts.members) if parts.members else None
    counts = (ctypes.c_int64 * len(parts.rows))(*map(len, parts.rows))
    places = _Places(len(parts.rows), members and ctypes.addressof(members), ctypes.addressof(counts))
    given = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    threads = _threads(sum(map(len, parts.rows)))
    built().functions[f"{name}_{_NAMES[first.dtype]}"](ctypes.addressof(places), *given, threads)


def _size(x: Tensor) -> Any:
    return ctypes.byref(_Size(x.shape[2] * x.shape[3], x.shape[1]))


def rectify(
    y: Parts, shortcut: Tensor | None, *, pool: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """max(y + shortcut, 0) for `y` (N, C, H, W) that `rectifies`, put into `out`, if that is given, which may be y's
    only part; and with `pool` its mean over pixels, (N, C) in fp32.
    """
    x = y.whole() if out is None else out
    pooled = _room(*x.shape[:2]) if pool else None
    _run("rectify", y, _size(x), _addresses(y.rows), shortcut, x, pooled)
    return x, pooled


@dataclass(frozen=True)
class Gradients:
    """Of something rectified."""

    x: Tensor
    """(N, C, H, W), of the result."""
    branch: Tensor | None = None
    """The same, where the result was used twice."""
    pooled: Tensor | None = None
    """(N, C), of the result's mean over pixels."""


def unrectify(x: Tensor, gradients: Gradients, into: Parts) -> tuple[Tensor, ...]:
    """The gradient for y of `rectify`, in its parts, put `into` tensors of their shapes, by those of its result `x`
    (N, C, H, W). It is that for the shortcut too.
    """
    _run("unrectify", into, _size(x), x, gradients.x, gradients.branch, gradients.pooled, _addresses(into.rows))
    return into.rows


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


def norm_rectify(y: Parts, weight: Tensor, bias: Tensor, eps: float, shortcut: Tensor | None, *, pool: bool) -> Normed:
    """max(norm(y) + shortcut, 0) for `y` (N, C, H, W) that `rectifies`, by the batch's own statistics, with fp32
    `weight` and `bias` (C,).
    """
    x = y.whole()
    pooled = _room(*x.shape[:2]) if pool else None
    mean, variance = _room(2, x.shape[1], dtype=torch.float64).unbind()
    _run("norm", y, _size(x), _addresses(y.rows), weight, bias, eps, shortcut, x, pooled, mean, variance)
    return Normed(x, pooled, mean, variance)


def unnorm_rectify(
    y: Parts, made: Normed, weight: Tensor, eps: float, gradients: Gradients, *, shortcut: bool
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor | None]:
    """The gradients of `norm_rectify` for `y`, in its parts, for weight and bias and, if there was one, for the
    `shortcut`; by those of what it `made`.
    """
    x, into = made.x, y.like()
    kept = torch.empty_like(x) if shortcut else None
    weight_grad, bias_grad = _room(2, x.shape[1]).unbind()
    _run(
        "unnorm", y, _size(x), _addresses(y.rows), x, gradients.x, gradients.branch, gradients.pooled, weight, eps,
        made.mean, made.variance, kept, _addresses(into.rows), weight_grad, bias_grad,
    )  # fmt: skip
    return into.rows, weight_grad, bias_grad, kept


def unsplit(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch whose samples `parts` hold, as a tensor like `x` (N, ...), and each sample's inner product with that of
    `x`, (N,) in fp32. All of these `suits`.
    """
    out, products = torch.empty_like(x), _room(len(x))
    _run("unsplit", parts, _addresses(parts.rows), x, x.numel() // len(x), out, products)
    return out, products


def chosen_probability(scores: Tensor, choice: Tensor) -> Tensor:
    """What softmax over fp32 `scores` (N, E), which `suits`, gives each sample's `choice` (N,) of 0 to E - 1: (N,)."""
    n, experts = scores.shape
    probability = _room(n)
    built().functions["gate"](scores.data_ptr(), choice.data_ptr(), n, experts, probability.data_ptr())
    return probability


def chosen_probability_backward(scores: Tensor, choice: Tensor, grad: Tensor) -> Tensor:
    """The gradient for `scores` (N, E) of `chosen_probability`, by that of its result (N,)."""
    n, experts = scores.shape
    out = torch.empty_like(scores)
    built().functions["ungate"](scores.data_ptr(), choice.data_ptr(), grad.data_ptr(), n, experts, out.data_ptr())
    return out


_ROUTER = ("mean", "variance", "norm_weight", "norm_bias", "weight", "bias", "last_weight", "last_bias")


class _Router(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "hidden", "experts")),
        *((name, ctypes.c_void_p) for name in _ROUTER),
        ("eps", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Scorer:
    """A batch norm in eval mode, a linear layer, ReLU and a linear layer, none of which learns: pooled features (N, C)
    -> scores (N, E). All parameters are fp32, on the CPU and contiguous.
    """

    norm: nn.BatchNorm1d
    hidden: nn.Linear
    last: nn.Linear

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it computes with."""
        norm, hidden, last = self.norm, self.hidden, self.last
        learnt = norm.weight, norm.bias, hidden.weight, hidden.bias, last.weight, last.bias
        return norm.running_mean, norm.running_var, *learnt

    def _made(self) -> _Router:
        norm, hidden, last, each = self.norm, self.hidden, self.last, self.tensors()
        sizes = hidden.in_features, hidden.out_features, last.out_features
        return _Router(*sizes, *map(_address, each), norm.eps)

    def scores(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The scores (N, E), and what the gradient needs, of `pooled` (N, C), which `suits`."""
        n = len(pooled)
        hidden = _room(n, self.hidden.out_features)
        scores = _room(n, self.last.out_features)
        run, router = built().functions["score"], self._made()
        run(ctypes.addressof(router), pooled.data_ptr(), n, hidden.data_ptr(), scores.data_ptr(), _threads(n))
        return scores, hidden

    def backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """The gradient for the pooled features (N, C), by that of the scores (N, E)."""
        n = len(grad)
        pooled = _room(n, self.hidden.in_features)
        run, router = built().functions["unscore"], self._made()
        run(ctypes.addressof(router), hidden.data_ptr(), grad.data_ptr(), n, pooled.data_ptr(), _threads(n))
        return pooled


_SIZES = ("h", "w", "c_in", "oh", "ow", "c_out", "kh", "kw", "sh", "sw", "ph", "pw", "experts")


class _Shape(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int64), *((name, ctypes.c_int32) for name in _SIZES)]


class _Finish(ctypes.Structure):
    _fields_ = [("rectified", ctypes.c_int64), ("shortcut", ctypes.c_void_p), ("pooled", ctypes.c_void_p)]


class _Unfinish(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("y", "branch", "pooled", "kept")]


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
        self._ahead = self._made(backward=False)
        lanes = LANES if self.dtype == torch.float32 else _DEPTH
        self._shift = None if self.bias is None else _filled(self.bias.float(), lanes)

    def _made(self, *, backward: bool) -> Tensor:
        """The filters for a direction."""
        if self.dtype == torch.float32:
            return _filled(self.filters.permute((0, 3, 4, 1, 2) if backward else (0, 3, 4, 2, 1)), LANES)
        filters = self.filters.permute(0, 1, 3, 4, 2).contiguous()
        _, _, c_in, kh, kw = self.filters.shape
        shape, _, _ = self._shape(torch.Size((1, c_in, kh, kw)))
        pack = built().functions["pack_bf16"]
        out = _room(pack(ctypes.addressof(shape), backward, filters.data_ptr(), None), dtype=torch.bfloat16)
        pack(ctypes.addressof(shape), backward, filters.data_ptr(), out.data_ptr())
        return out

    def _shape(self, x_shape: torch.Size) -> tuple[_Shape, int, int]:
        experts, c_out, c_in, kh, kw = self.filters.shape
        (sh, sw), (ph, pw) = self.stride, self.padding
        if len(x_shape) != 4 or x_shape[1] != c_in or x_shape[2] + 2 * ph < kh or x_shape[3] + 2 * pw < kw:
            rule = f"(N, {c_in}, H, W), with its padding no smaller than the kernel of {kh} by {kw}"
            raise ValueError(f"x must be {rule}, got shape {tuple(x_shape)}")
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
        pooled = _room(len(x), self.filters.shape[1]) if pool else None
        return self._convolved(x, choice, _Finish(1, _address(shortcut), _address(pooled))), pooled

    def _convolved(self, x: Tensor, choice: Tensor, finish: _Finish) -> Tensor:
        shape, oh, ow = self._shape(x.shape)
        y = _images(x.shape[0], self.filters.shape[1], oh, ow, dtype=self.dtype)
        wrong = built().functions[f"convolve_{_NAMES[self.dtype]}"](
            ctypes.addressof(shape), x.data_ptr(), choice.data_ptr(), self._ahead.data_ptr(), _address(self._shift),
            ctypes.addressof(finish), y.data_ptr(), _threads(len(x)),
        )  # fmt: skip
        if wrong:  # never by a router
            raise ValueError(f"forced must hold experts from 0 to {len(self.filters) - 1}, got {choice.tolist()}")
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
        kept = torch.empty_like(y) if shortcut else None
        given = _Unfinish(*map(_address, (y, gradients.branch, gradients.pooled, kept)))
        return *self._unconvolved(gradients.x, x, choice, given, products), kept

    def _unconvolved(
        self, grad: Tensor, x: Tensor, choice: Tensor, given: _Unfinish, products: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._back is None:
            self._back = self._made(backward=True)
        shape, _, _ = self._shape(x.shape)
        dx, dots = torch.empty_like(x), _room(len(x)) if products else None
        built().functions[f"convolve_backward_{_NAMES[self.dtype]}"](
            ctypes.addressof(shape), grad.data_ptr(), ctypes.addressof(given), choice.data_ptr(),
            self._back.data_ptr(), x.data_ptr(), dx.data_ptr(), _address(dots), _threads(len(x)),
        )  # fmt: skip
        return dx, dots


@dataclass(frozen=True)
class Layer:
    """What `whole_layer` made."""

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
) -> Layer:
    """max(conv(x) + shortcut, 0) for `x` (N, C_in, H, W), which `suits`, and its mean over pixels `pooled` (N, C_in),
    each sample by the expert that `scorer` rates highest. C_out is of whole vectors, and a shortcut of the output's
    shape.
    """
    shape, oh, ow = filters._shape(x.shape)
    n, c_out = x.shape[0], filters.filters.shape[1]
    y = _images(n, c_out, oh, ow, dtype=filters.dtype)
    if shortcut is not None and shortcut.shape != y.shape:
        raise ValueError(f"shortcut must be {tuple(y.shape)}, got shape {tuple(shortcut.shape)}")
    after = _room(n, c_out) if pool else None
    scores, choice = _room(n, scorer.last.out_features), _room(n, dtype=torch.long)
    router, finish = scorer._made(), _Finish(1, _address(shortcut), _address(after))
    built().functions[f"layer_{_NAMES[filters.dtype]}"](
        ctypes.addressof(router), pooled.data_ptr(), ctypes.addressof(shape), x.data_ptr(), filters._ahead.data_ptr(),
        _address(filters._shift), ctypes.addressof(finish), y.data_ptr(), scores.data_ptr(), choice.data_ptr(),
        _threads(n),
    )  # fmt: skip
    return Layer(y, after, scores, choice)

"""Passes over activations: pools, rectifiers, batch norms, and the samples of experts that lie apart.

Axes: `N` batch, `n_e` samples of expert e, `C` channels, `H W` size, `E` experts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advmoe.ops.raw.build import built
from advmoe.ops.raw.tensors import LANES, NAMES, addresses, images, room, suits, threads_for


def pooled(x: Tensor) -> Tensor:
    """The mean over pixels, (N, C) in fp32, of a channels-last `x` (N, C, H, W) that `suits`."""
    n, c, h, w = x.shape
    out = room(n, c)
    pool = built().functions[f"pool_{NAMES[x.dtype]}"]
    pool(x.data_ptr(), n, h * w, c, out.data_ptr(), threads_for(n))
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's inner product of `a` and `b` (N, ...), which `suits`: (N,) in fp32."""
    out = room(len(a))
    row = a.numel() // max(1, len(a))
    multiply = built().functions[f"products_{NAMES[a.dtype]}"]
    multiply(a.data_ptr(), b.data_ptr(), len(a), row, out.data_ptr(), threads_for(len(a)))
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


def _run(name: str, parts: Parts, *arguments: Any) -> None:
    """A kernel over a batch in parts, which says where they belong and then takes `arguments`."""
    first = parts.rows[0]
    members = addresses(parts.members) if parts.members else None
    counts = (ctypes.c_int64 * len(parts.rows))(*map(len, parts.rows))
    places = _Places(len(parts.rows), members and ctypes.addressof(members), ctypes.addressof(counts))
    pointers = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    threads = threads_for(sum(map(len, parts.rows)))
    built().functions[f"{name}_{NAMES[first.dtype]}"](ctypes.addressof(places), *pointers, threads)


def _size(x: Tensor) -> Any:
    return ctypes.byref(_Size(x.shape[2] * x.shape[3], x.shape[1]))


def rectify(
    y: Parts, shortcut: Tensor | None, *, pool: bool, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """max(y + shortcut, 0) for `y` (N, C, H, W) that `rectifies`, put into `out`, if that is given, which may be y's
    only part; and with `pool` its mean over pixels, (N, C) in fp32.
    """
    x = y.whole() if out is None else out
    pooled = room(*x.shape[:2]) if pool else None
    _run("rectify", y, _size(x), addresses(y.rows), shortcut, x, pooled)
    return x, pooled


@dataclass(frozen=True)
class Gradients:
    """The gradients of a rectifier's output."""

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
    _run("unrectify", into, _size(x), x, gradients.x, gradients.branch, gradients.pooled, addresses(into.rows))
    return into.rows


@dataclass(frozen=True)
class Normed:
    """The output of `norm_rectify`, and what its gradient needs."""

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
    pooled = room(*x.shape[:2]) if pool else None
    mean, variance = room(2, x.shape[1], dtype=torch.float64).unbind()
    _run("norm", y, _size(x), addresses(y.rows), weight, bias, eps, shortcut, x, pooled, mean, variance)
    return Normed(x, pooled, mean, variance)


def unnorm_rectify(
    y: Parts, normed: Normed, weight: Tensor, eps: float, gradients: Gradients, *, shortcut: bool
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor | None]:
    """The gradients of `norm_rectify` for `y`, in its parts, for weight and bias and, if there was one, for the
    `shortcut`. `normed` is what it returned, `gradients` those of that.
    """
    x, into = normed.x, y.like()
    shortcut_grad = torch.empty_like(x) if shortcut else None
    weight_grad, bias_grad = room(2, x.shape[1]).unbind()
    _run(
        "unnorm", y, _size(x), addresses(y.rows), x, gradients.x, gradients.branch, gradients.pooled, weight, eps,
        normed.mean, normed.variance, shortcut_grad, addresses(into.rows), weight_grad, bias_grad,
    )  # fmt: skip
    return into.rows, weight_grad, bias_grad, shortcut_grad


def unsplit(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """The batch whose samples `parts` hold, as a tensor like `x` (N, ...), and each sample's inner product with that of
    `x`, (N,) in fp32. All of these `suits`.
    """
    out, products = torch.empty_like(x), room(len(x))
    _run("unsplit", parts, addresses(parts.rows), x, x.numel() // len(x), out, products)
    return out, products


def mixes(every: Tensor, experts: int) -> bool:
    """Whether `mixed` takes `every` (N, E * C, H, W)."""
    return every.dim() == 4 and every.shape[1] % (experts * LANES) == 0 and suits(every)


def mixed(every: Tensor, weights: Tensor) -> Tensor:
    """The sum over experts of fp32 `weights` (N, E), contiguous, times what each made, `every` (N, E * C, H, W), which
    `mixes`: (N, C, H, W).
    """
    (n, experts), (_, wide, h, w) = weights.shape, every.shape
    y = images(n, wide // experts, h, w, dtype=every.dtype)
    mix = built().functions[f"mix_{NAMES[every.dtype]}"]
    mix(every.data_ptr(), weights.data_ptr(), n, experts, _size(y), y.data_ptr(), threads_for(n))
    return y


def unmixed(grad: Tensor, every: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `mixed` for `every` and for the weights, by that of its result, `grad` (N, C, H, W)."""
    (n, experts), into = weights.shape, torch.empty_like(every)
    for_weights = room(n, experts)
    unmix = built().functions[f"unmix_{NAMES[every.dtype]}"]
    unmix(
        grad.data_ptr(), every.data_ptr(), weights.data_ptr(), n, experts, _size(grad), into.data_ptr(),
        for_weights.data_ptr(), threads_for(n),
    )  # fmt: skip
    return into, for_weights

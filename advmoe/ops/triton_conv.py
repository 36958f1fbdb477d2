"""Kernels in Triton for convolutions of which each sample uses its own expert's filters: matrix products whose left
matrix, the pixels that a filter covers, is read in place.

No sample is moved, and the host need not know a choice. The rows of a result are its samples' pixels, expert by expert
in the order that `sort` writes on the device; a tile of rows has one expert, and reads that expert's filters. All else
that touches the result while it is in registers is done there: bias, shortcut, ReLU, the mean over pixels.

Axes: `N` batch, `CI CO` channels, `H W` size, `OH OW` size of the result, `E` experts, `KH KW` kernel, `SH SW` stride,
`PH PW` padding, `S` shares. Images are channels-last. `BM BN BK` are a tile's rows, columns, and steps of the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of a tile."""
PROGRAMS = 528
"""Programs that keep a large GPU busy: four for each of an H100's 132 multiprocessors."""


class Samples(NamedTuple):
    """The samples of a batch by expert, on their device."""

    order: Tensor
    """(N,) places in the batch, those of the first expert's samples first, in the batch's order."""
    starts: Tensor
    """(E + 1,): expert e's are `order[starts[e]:starts[e + 1]]`."""

    @property
    def experts(self) -> int:
        """E."""
        return len(self.starts) - 1


class Finish(NamedTuple):
    """What is done to a result before it is written."""

    biases: Tensor | None = None
    """(E, CO), added."""
    shortcut: Tensor | None = None
    """(N, CO, OH, OW), added after them."""
    rectify: bool = False
    """max(y, 0), after both."""
    pool: bool = False
    """Whether the mean over pixels is wanted too."""


class Geometry(NamedTuple):
    """How a kernel moves over an image."""

    stride: tuple[int, int]
    padding: tuple[int, int]

    def size(self, image: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, int]:
        """(OH, OW) for images of (H, W) and a kernel (KH, KW)."""
        h, w = ((i + 2 * p - k) // s + 1 for i, k, s, p in zip(image, kernel, self.stride, self.padding, strict=True))
        return h, w


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (`TRITON_INTERPRET=1`), where they can be tested."""
    return not isinstance(_sort, triton.JITFunction)


def sort(choice: Tensor, experts: int) -> Samples:
    """The samples by their expert, `choice` (N,) from 0 to `experts` - 1."""
    n = len(choice)
    order = torch.empty(n, dtype=torch.int32, device=choice.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=choice.device)
    block = min(1024, triton.next_power_of_2(n))
    _launch(_sort, (1,), choice.contiguous(), order, starts, n, E=experts, BLOCK=block)
    return Samples(order, starts)


def convolve(
    x: Tensor, filters: Tensor, samples: Samples, geometry: Geometry, finish: Finish
) -> tuple[Tensor, Tensor | None]:
    """Each sample of `x` (N, CI, H, W) by its expert's `filters` (E, CO, CI, KH, KW), with what is in `finish`:
    (N, CO, OH, OW) and, if asked for, its mean over pixels (N, CO) in fp32.
    """
    n, ci, h, w = x.shape
    co, *kernel = filters.shape[1], *filters.shape[3:]
    oh, ow = geometry.size((h, w), tuple(kernel))
    y = _images(x, n, co, oh, ow)
    tile = _tile_of(ci, co, x.dtype)
    if finish.pool:  # an image's rows begin a tile, so that a tile's mean is of one image
        tile["BM"] = min(ROWS, _block(oh * ow, ROWS))
    pitch = triton.cdiv(oh * ow, tile["BM"]) * tile["BM"] if finish.pool else oh * ow
    pooled = x.new_empty(n, pitch // tile["BM"], co, dtype=torch.float32) if finish.pool else None
    grid = triton.cdiv(n * pitch, tile["BM"]) + samples.experts, triton.cdiv(co, tile["BN"])
    _launch(
        _convolve, grid, x, filters, _or(finish.biases, x), _or(finish.shortcut, x), y, _or(pooled, x), *samples,
        h, w, ci, oh, ow, co, pitch, *filters.stride(), BIAS=finish.biases is not None,
        SHORTCUT=finish.shortcut is not None, RECTIFY=finish.rectify, POOL=finish.pool,
        **tile, **_constants(samples, geometry, kernel, x.dtype),
    )  # fmt: skip
    return y, None if pooled is None else _summed(pooled)


def unconvolve(grad: Tensor, filters: Tensor, samples: Samples, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """The gradient for the images, (N, CI, H, W) of `size` (H, W), by that of the result, `grad` (N, CO, OH, OW)."""
    n, co, oh, ow = grad.shape
    ci, kernel, (h, w) = filters.shape[2], list(filters.shape[3:]), size
    dx = _images(grad, n, ci, h, w)
    tile, (sh, sw) = _tile_of(co, ci, grad.dtype), geometry.stride
    largest = triton.cdiv(h, sh) * triton.cdiv(w, sw)
    grid = triton.cdiv(n * largest, tile["BM"]) + samples.experts, triton.cdiv(ci, tile["BN"]), sh * sw
    _launch(
        _unconvolve, grid, grad, filters, dx, *samples, h, w, ci, oh, ow, co, *filters.stride(),
        **tile, **_constants(samples, geometry, kernel, grad.dtype),
    )  # fmt: skip
    return dx


def filter_gradients(
    x: Tensor, grad: Tensor, samples: Samples, geometry: Geometry, kernel: list[int]
) -> tuple[Tensor, Tensor]:
    """The gradients for filters (E, CO, CI, KH, KW), and for biases (E, CO), in fp32; zeros where an expert has no
    sample.
    """
    n, ci, h, w = x.shape
    co, oh, ow = grad.shape[1:]
    tile = {"BI": _block(ci, 64), "BO": _block(co, 64), "BP": ROWS}
    blocks, experts = triton.cdiv(ci, tile["BI"]) * triton.cdiv(co, tile["BO"]), samples.experts
    # Of a narrow layer there are few filters and many pixels, which programs share.
    programs, steps = blocks * kernel[0] * kernel[1] * experts, triton.cdiv(n * oh * ow, tile["BP"] * experts)
    shares = max(1, min(PROGRAMS // programs, steps // 4))
    dw = x.new_empty(experts, shares, co, *kernel, ci, dtype=torch.float32)
    db = x.new_empty(experts, shares, co, dtype=torch.float32)
    _launch(
        _filter_gradients, (blocks, kernel[0] * kernel[1], experts * shares), x, grad, dw, db, *samples,
        h, w, ci, oh, ow, co, SHARES=shares, **tile, **_constants(samples, geometry, kernel, x.dtype),
    )  # fmt: skip
    return _summed(dw).permute(0, 1, 4, 2, 3), _summed(db)


def _images(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _summed(parts: Tensor) -> Tensor:
    """The sum over the second axis, in the same order each time."""
    return parts.select(1, 0) if parts.shape[1] == 1 else parts.sum(1)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, whosever the memory is
        kernel[grid](*arguments, **constants)


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument for a tensor that it does not look at."""
    return other if x is None else x


def _constants(samples: Samples, geometry: Geometry, kernel: list[int], dtype: torch.dtype) -> dict[str, Any]:
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    rounds = dtype == torch.float32 and convolutions.fp32_precision == "tf32"
    (sh, sw), (ph, pw) = geometry
    return {
        "E": samples.experts, "KH": kernel[0], "KW": kernel[1], "SH": sh, "SW": sw, "PH": ph, "PW": pw,
        "PRECISION": "tf32" if rounds else "ieee",
    }  # fmt: skip


def _tile_of(inner: int, outer: int, dtype: torch.dtype) -> dict[str, int]:
    """A tile's rows, columns of `outer` channels, and steps of the sum over `inner` ones."""
    return {"BM": ROWS, "BN": _block(outer, 64), "BK": _block(inner, 32 if dtype == torch.float32 else 64)}


def _block(size: int, largest: int) -> int:
    """A power of two of at least 16, as products on tensor cores want it."""
    power: int = triton.next_power_of_2(size)
    return min(largest, max(16, power))


@triton.jit
def _sort(choice, order, starts, N, E: tl.constexpr, BLOCK: tl.constexpr):
    place = 0
    tl.store(starts, place)
    for expert in range(E):
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            chosen = (tl.load(choice + n, mask=n < N, other=-1) == expert).to(tl.int32)
            tl.store(order + place + tl.cumsum(chosen, 0) - 1, n, mask=chosen > 0)
            place += tl.sum(chosen, 0)
        tl.store(starts + expert + 1, place)


@triton.jit
def _rows(order, starts, tile, PITCH, E: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile, and whether it has any row; of each of its rows the sample, the pixel, and whether there is
    one. A sample has PITCH rows.
    """
    expert = 0
    begin = 0
    count = 0
    skipped = 0
    tiles = 0
    for e in range(E):
        first = tl.load(starts + e)
        rows = (tl.load(starts + e + 1) - first) * PITCH
        here = (tile >= tiles) & (tile < tiles + tl.cdiv(rows, BM))
        expert = tl.where(here, e, expert)
        begin = tl.where(here, first, begin)
        count = tl.where(here, rows, count)
        skipped = tl.where(here, tiles, skipped)
        tiles += tl.cdiv(rows, BM)
    row = (tile - skipped) * BM + tl.arange(0, BM)
    there = row < count
    n = tl.load(order + begin + row // PITCH, mask=there, other=0).to(tl.int64)
    return expert, count > 0, n, row % PITCH, there


@triton.jit
def _convolve(
    x, w, bias, shortcut, y, pool, order, starts, H, W, CI, OH, OW, CO, PITCH, WE, WO, WI, WH, WW,
    BIAS: tl.constexpr, SHORTCUT: tl.constexpr, RECTIFY: tl.constexpr, POOL: tl.constexpr,
    E: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    expert, used, n, pixel, there = _rows(order, starts, tl.program_id(0), PITCH, E, BM)
    there &= pixel < OH * OW
    oh, ow = pixel // OW, pixel % OW
    co = tl.program_id(1) * BN + tl.arange(0, BN)
    made = co < CO
    parts = tl.cdiv(CI, BK)
    image, filters = x + (n * H * W * CI)[:, None], w + expert * WE + co[None, :] * WO
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(tl.where(used, KH * KW * parts, 0)):
        kh, kw = step // parts // KW, step // parts % KW
        ci = step % parts * BK + tl.arange(0, BK)
        ih, iw = oh * SH + kh - PH, ow * SW + kw - PW
        inside = there & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        at = image + ((ih * W + iw)[:, None] * CI + ci[None, :])
        a = tl.load(at, mask=inside[:, None] & (ci < CI)[None, :], other=0.0)
        of = filters + (ci * WI + (kh * WH + kw * WW))[:, None]
        b = tl.load(of, mask=(ci < CI)[:, None] & made[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    mask = there[:, None] & made[None, :]
    at = (n * OH * OW + pixel)[:, None] * CO + co[None, :]
    if BIAS:
        acc += tl.load(bias + expert * CO + co, mask=made, other=0.0).to(tl.float32)[None, :]
    if SHORTCUT:
        acc += tl.load(shortcut + at, mask=mask, other=0.0).to(tl.float32)
    if RECTIFY:
        acc = tl.where(acc < 0, 0.0, acc)  # not `maximum`, which makes 0 of a NaN
    if POOL:
        # A tile's rows are one image's: its first says whose, and which of its tiles it is.
        first = tl.min(tl.where(there, n * (PITCH // BM) + pixel // BM, 2**62), 0)
        whole = tl.sum(tl.where(mask, acc, 0.0), 0) / (OH * OW)
        tl.store(pool + first * CO + co, whole, mask=co < CO * tl.max(there.to(tl.int32), 0))
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _unconvolve(
    g, w, dx, order, starts, H, W, CI, OH, OW, CO, WE, WO, WI, WH, WW,
    E: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # The pixels whose place modulo the stride is the same are reached by the same part of the kernel, and by no other:
    # a program has such ones, and passes over that part alone.
    top, left = tl.program_id(2) // SW, tl.program_id(2) % SW
    high, wide = tl.maximum(tl.cdiv(H - top, SH), 1), tl.maximum(tl.cdiv(W - left, SW), 1)
    expert, used, n, pixel, there = _rows(order, starts, tl.program_id(0), high * wide, E, BM)
    ih, iw = pixel // wide * SH + top, pixel % wide * SW + left
    there &= (ih < H) & (iw < W)
    kh_first, kw_first = (top + PH) % SH, (left + PW) % SW
    tall, broad = tl.cdiv(KH - kh_first, SH), tl.cdiv(KW - kw_first, SW)
    ci = tl.program_id(1) * BN + tl.arange(0, BN)
    parts = tl.cdiv(CO, BK)
    image, filters = g + (n * OH * OW * CO)[:, None], w + expert * WE + ci[None, :] * WI
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(tl.where(used, tall * broad * parts, 0)):
        kh, kw = kh_first + step // parts // broad * SH, kw_first + step // parts % broad * SW
        co = step % parts * BK + tl.arange(0, BK)
        down, right = ih + PH - kh, iw + PW - kw
        oh, ow = down // SH, right // SW
        inside = there & (down >= 0) & (oh < OH) & (right >= 0) & (ow < OW)
        at = image + ((oh * OW + ow)[:, None] * CO + co[None, :])
        a = tl.load(at, mask=inside[:, None] & (co < CO)[None, :], other=0.0)
        of = filters + (co * WO + (kh * WH + kw * WW))[:, None]
        b = tl.load(of, mask=(co < CO)[:, None] & (ci < CI)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = ((n * H + ih) * W + iw)[:, None] * CI + ci[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=there[:, None] & (ci[None, :] < CI))


@triton.jit
def _filter_gradients(
    x, g, dw, db, order, starts, H, W, CI, OH, OW, CO,
    SHARES: tl.constexpr, E: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    expert, share = tl.program_id(2) // SHARES, tl.program_id(2) % SHARES
    kh, kw = tl.program_id(1) // KW, tl.program_id(1) % KW
    across = tl.cdiv(CO, BO)
    ci = tl.program_id(0) // across * BI + tl.arange(0, BI)
    co = tl.program_id(0) % across * BO + tl.arange(0, BO)
    begin = tl.load(starts + expert)
    rows = (tl.load(starts + expert + 1) - begin) * OH * OW
    acc = tl.zeros((BI, BO), dtype=tl.float32)
    total = tl.zeros((BO,), dtype=tl.float32)
    for start in range(share * BP, rows, SHARES * BP):
        row = start + tl.arange(0, BP)
        there = row < rows
        n = tl.load(order + begin + row // (OH * OW), mask=there, other=0).to(tl.int64)
        pixel = row % (OH * OW)
        ih, iw = pixel // OW * SH + kh - PH, pixel % OW * SW + kw - PW
        inside = there & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        at = ((n * H + ih) * W + iw)[None, :] * CI + ci[:, None]
        a = tl.load(x + at, mask=inside[None, :] & (ci[:, None] < CI), other=0.0)
        made = (n * OH * OW + pixel)[:, None] * CO + co[None, :]
        d = tl.load(g + made, mask=there[:, None] & (co[None, :] < CO), other=0.0)
        acc = tl.dot(a, d, acc, input_precision=PRECISION)
        total += tl.sum(d.to(tl.float32), 0)
    here = (tl.program_id(2) * CO + co).to(tl.int64)
    at = (here[None, :] * KH * KW + tl.program_id(1)) * CI + ci[:, None]
    tl.store(dw + at, acc, mask=(ci[:, None] < CI) & (co[None, :] < CO))
    if tl.program_id(1) + tl.program_id(0) // across == 0:  # one of those that have summed the same up
        tl.store(db + here, total, mask=co < CO)

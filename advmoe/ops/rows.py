"""Samples as rows of memory.

Axes: `N` batch, `n_e` samples of expert e. A sample is one contiguous row in either memory format, so a permutation of
the batch is a row copy; plain `x[index]` on channels-last tensors is up to three times slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advmoe.ops import raw


def split_rows(x: Tensor, members: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The samples of `x` (N, ...) at each of the places `members` (n_e,): `x[index]`, without a gradient."""
    rows, channels_last = _rows(x)
    return tuple(_unrows(rows.index_select(0, index), x.shape, channels_last) for index in members)


def merge_rows(parts: tuple[Tensor, ...], members: tuple[Tensor, ...]) -> Tensor:
    """The inverse: `out[index] = part`, without a gradient."""
    first, channels_last = _rows(parts[0])
    rows = [first]
    for part in parts[1:]:
        each, last = _rows(part)
        rows.append(each if last == channels_last else _rows(_laid_out(part, channels_last))[0])
    # No view of other memory: autograd then lets what follows change it in place.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        sum(map(len, rows)), *parts[0].shape[1:], dtype=first.dtype, device=first.device, memory_format=layout
    )
    target, *wide = _wide(_rows(out)[0], *rows)
    for each, index in zip(wide, members, strict=True):
        target.index_copy_(0, index, each)
    return out


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's inner product of `a` and `b` (N, ...), (N,)."""
    if raw.suits(a, b):
        return raw.products(a, b)
    (rows, last), (others, same) = _rows(a), _rows(b)
    if last != same:
        others, _ = _rows(_laid_out(b, last))
    # The sum keeps fp32 inside; asked for an fp32 result, PyTorch would first copy a bf16 product whole.
    return (rows * others).sum(1)


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """View `x` (N, ...) as one contiguous row per sample, and whether it is channels-last."""
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    length = x.shape[1:].numel()  # not -1, which a batch without samples leaves open
    if channels_last:
        return x.permute(0, 2, 3, 1).view(len(x), length), True
    return x.contiguous().view(len(x), length), False


def _unrows(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    if channels_last:
        _, c, h, w = shape
        return rows.view(len(rows), h, w, c).permute(0, 3, 1, 2)
    return rows.view(len(rows), *shape[1:])


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _wide(*rows: Tensor) -> tuple[Tensor, ...]:
    """The same memory in units of 16 bytes where it has whole ones: `index_copy_` moves number by number, bf16 up to
    six times slower so.
    """
    units = [
        each.shape[1] * each.element_size() % 16 or each.storage_offset() * each.element_size() % 16 for each in rows
    ]
    return rows if any(units) else tuple(each.view(torch.complex128) for each in rows)

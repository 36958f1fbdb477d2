"""Matrix products of a GPU, of which each sample uses its own expert's matrix. Samples are sorted by expert; how many
each expert has stays on the device, for which the host does not wait.

Axes: `N` batch, `T` tokens or pixels, `C` features, `E` experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.ops import raw
from advmoe.ops.grouping import merge, split


class Sorted(NamedTuple):
    """A batch's samples sorted by expert."""

    order: Tensor
    """(N,): their places in the batch."""
    expert: Tensor
    """(N,): of each in this order."""
    ends: Tensor
    """(E,): where each expert's samples end in it."""

    def split(self, x: Tensor) -> Tensor:
        """The samples of `x` (N, ...) in this order."""
        return split(x, (self.order,))[0]

    def merge(self, x: Tensor) -> Tensor:
        """The inverse."""
        return merge((x,), (self.order,))

    def product(self, x: Tensor, matrices: Tensor, biases: Tensor | None = None) -> Tensor:
        """Samples `x` (N, ..., C) in this order, each by its expert's of the `matrices` (E, C, C'), and `biases`
        (E, C'): (N, ..., C').
        """
        tokens = x.shape[1:-1].numel()
        y = F.grouped_mm(x.reshape(-1, x.shape[-1]), matrices, offs=self.ends * tokens)
        y = y.view(*x.shape[:-1], matrices.shape[2])
        if biases is None:
            return y
        return y + biases.index_select(0, self.expert).view(len(x), *[1] * (x.dim() - 2), -1)


def sorted_by_expert(x: Tensor, choice: Tensor, experts: int, *widths: int) -> Sorted | None:
    """The samples `x` (N, ...) by their expert, `choice` (N,), for products of as many features as `widths` say; None
    where there is no such product, or the host would wait for it.
    """
    if not hasattr(F, "grouped_mm") or not raw.eager() or not _without_waiting(x) or not x.numel():
        return None
    if any(width * x.element_size() % 16 for width in widths):  # as the product asks
        return None
    order = choice.argsort(stable=True)
    each = choice[:, None] == torch.arange(experts, device=choice.device)
    return Sorted(order, choice.index_select(0, order), each.sum(0).cumsum(0).to(torch.int32))


def _without_waiting(x: Tensor) -> bool:
    """Whether `F.grouped_mm` leaves the experts' shares on the device: elsewhere (PyTorch 2.13) it reads them, and on
    Blackwell an expert without samples was reported to get a gradient that is not 0 (pytorch#172439).
    """
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(x.device)[0] == 9

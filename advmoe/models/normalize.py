"""Input normalisation as part of the model, so that attacked models take [0, 1] pixels and eps keeps its unit.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advmoe.errors import InputError


class Normalize(nn.Module):
    """(x - mean) / std per channel, for `x` (N, C, H, W) in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, in the shape and memory format of `x`. Raises `ValueError` for other axes or channels."""
        if x.ndim != 4 or x.shape[1] != self.mean.shape[1]:  # broadcasting would make images of them
            raise InputError(f"images must be (N, {self.mean.shape[1]}, H, W), got {tuple(x.shape)}")
        return (x - self.mean) / self.std

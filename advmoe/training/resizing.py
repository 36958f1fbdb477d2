"""Smaller images in a run's first epochs: progressive resizing.

Axes: `N` batch, `C` channels, `H W` size. Source: Wong et al., ICLR 2020 (fast adversarial training on ImageNet).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.models import Classifier
from advmoe.text import one_line
from advmoe.training.methods import learning


def shrunk(x: Tensor, side: int | None) -> Tensor:
    """Pixels `x` (N, C, H, W) at `side` x `side`, each the mean of those that it covers, channels last; None leaves
    them.
    """
    if side is None:
        return x
    return F.interpolate(x, (side, side), mode="area").contiguous(memory_format=torch.channels_last)


def require_sizes(model: Classifier, sides: Iterable[int], full: int, channels: int) -> None:
    """Raise `ValueError` unless the `sides` (`training.first_image_sizes`) are less than `full`, that of the data's
    images, and `model` takes images of each. Afterwards it points out none of another size.
    """
    for side in sorted(set(sides)):
        name, device = "training.first_image_sizes", next(model.parameters()).device
        if side >= full:
            raise InputError(f"{name} must be < the {full} pixels of the images, got {side}")
        x = torch.zeros(2, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
        try:
            with warnings.catch_warnings(), torch.no_grad(), learning(model, "all", record=False):
                warnings.simplefilter("ignore")
                model(x)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{name} must be sides that the model takes, got {side}: {one_line(error)}") from error

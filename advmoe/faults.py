"""What is wrong with images and classes that are handed in, if anything.

Axes: `N` images, `C` channels, `H W` size, `K` classes. Pixels are in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advmoe.errors import InputError
from advmoe.text import show
from advmoe.threat import ThreatModel


def pixel_fault(images: Tensor) -> str | None:
    """What is wrong with `images` (N, C, H, W), bytes or floating-point, in a line; None if nothing."""
    if images.ndim != 4 or images.numel() == 0:
        return f"images must be of shape (N, C, H, W), none of them 0, got {tuple(images.shape)}"
    if images.dtype == torch.uint8:
        return None
    if not images.is_floating_point():
        return f"pixels must be uint8, or floating-point in [0, 1], got {images.dtype}"
    low, high = (bound.item() for bound in images.aminmax())
    if math.isnan(low):
        first = int(images.isnan().flatten(1).any(1).nonzero()[0])
        return f"pixels must lie in [0, 1], got NaN in image {first}"
    if low < 0 or high > 1:
        return f"pixels must lie in [0, 1], got values from {low:.8g} to {high:.8g}"
    return None


def label_fault(labels: Tensor, n: int, num_classes: int | None) -> str | None:
    """What is wrong with the classes of `n` images, of `num_classes` (K) where that is known; None if nothing."""
    rule = f"0..{'K-1' if num_classes is None else num_classes - 1}"
    if labels.shape != (n,):
        return f"labels must be of shape ({n},), one for each image, got {tuple(labels.shape)}"
    if not integers(labels):
        return f"labels must be integers in {rule}, got {labels.dtype}"
    wrong = outside(labels, num_classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        return f"labels must lie in {rule}, got {labels[first].item()} for image {first}"
    return None


def integers(labels: Tensor) -> bool:
    """Whether labels are whole numbers."""
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def outside(labels: Tensor, num_classes: int | None) -> Tensor:
    """Which of the `labels` (N,) are none of 0 ... `num_classes` - 1, (N,) booleans."""
    labels = labels.long()  # as a uint8, 1000 classes would wrap around to 232
    return (labels < 0) | (labels >= (math.inf if num_classes is None else num_classes))


def require_attackable(x: Tensor, y: Tensor, threat: object) -> None:
    """Raise `InputError` unless `x` are images (N, C, H, W), floating-point pixels, `y` a class for each, and `threat`
    a `ThreatModel`.
    """
    if not isinstance(threat, ThreatModel):
        raise InputError(f"threat must be a ThreatModel(norm, eps), got {show(threat)}")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise InputError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
    fault = pixel_fault(x) or label_fault(y, len(x), None)
    if fault is None and not x.is_floating_point():
        fault = f"pixels must be floating-point in [0, 1], got {x.dtype}"
    if fault is not None:
        raise InputError(fault)

"""Random crops and flips of a whole batch at once, on the batch's device.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class View:
    """Where each pixel of a varied image comes from: `of` makes the varied images, `back` brings them home."""

    rows: Tensor
    """Row of the padded image that each row shows, (N, H)."""
    columns: Tensor
    """Column of the padded image that each column shows, (N, W)."""
    padding: int
    """Zeros on each side of an image, in pixels."""

    @staticmethod
    def draw(images: Tensor, *, generator: torch.Generator, padding: int, flip: bool) -> View:
        """Draw a shift of up to `padding` pixels and, with `flip`, a side for each of `images` (N, C, H, W)."""
        n, _, height, width = images.shape
        device = images.device

        def draw(high: int) -> Tensor:
            values = torch.randint(high, (n, 1), generator=generator, device=generator.device)
            return values.to(device, non_blocking=True)

        rows = torch.arange(height, device=device).expand(n, height)
        columns = torch.arange(width, device=device).expand(n, width)
        if flip:
            columns = torch.where(draw(2) == 1, width - 1 - columns, columns)
        if padding:
            rows = rows + draw(2 * padding + 1)
            columns = columns + draw(2 * padding + 1)
        return View(rows, columns, padding)

    def of(self, images: Tensor) -> Tensor:
        """The varied `images`, (N, C, H, W) of the same dtype and memory format; never `images` itself."""
        sample = torch.arange(len(images), device=images.device)
        if self.padding:
            images = F.pad(images, (self.padding,) * 4)
        rows, columns = self.rows, self.columns
        if images.is_contiguous():
            channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
            return images[sample[:, None, None, None], channel, rows[:, None, :, None], columns[:, None, None, :]]
        # Channels last: one index moves all channels of a pixel, and the result is channels-last again.
        picked = images.permute(0, 2, 3, 1)[sample[:, None, None], rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2)

    def back(self, varied: Tensor, images: Tensor) -> Tensor:
        """`images` (N, C, H, W) with the pixels that `varied`, of the same shape, shows taken from there."""
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        padded = F.pad(images, (self.padding,) * 4)
        padded.permute(0, 2, 3, 1)[sample, self.rows[:, :, None], self.columns[:, None, :]] = varied.permute(0, 2, 3, 1)
        height, width = images.shape[2:]
        return padded[:, :, self.padding : self.padding + height, self.padding : self.padding + width]


@dataclass(frozen=True)
class Variation:
    """How the images of an epoch are varied: shifted in memory (`augment`), cropped in files (`decode.random_crop`)."""

    generator: torch.Generator
    """What images in memory draw from, batch by batch as they are handed out."""
    purpose: tuple[int | str, ...]
    """What an image in a file draws for, with its index and its batch's place in the plan: of these its seed is made.
    """
    flip: bool
    """Whether to flip every other image left to right."""

    def view(self, images: Tensor) -> View:
        """Draw how images in memory, (N, C, H, W), are varied: shifts of up to an eighth of their side, and flips."""
        return View.draw(images, generator=self.generator, padding=images.shape[-1] // 8, flip=self.flip)


def augment(images: Tensor, *, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Shift every image by its own random offset, zeros moving in, and flip half of them left to right.

    The same as padding with zeros on all sides and cropping at random. Random numbers are drawn on the generator's
    device and moved, so one seed gives the same crops of uint8 and float images, on any device.

    Args:
        images: (N, C, H, W), any dtype; contiguous or channels-last.
        generator: Source of the randomness; it may lie on another device than `images`.
        padding: Largest shift, in pixels, in each of the four directions.
        flip: Whether to flip each image with probability 1/2.

    Returns:
        (N, C, H, W) of the same dtype, device and memory format; never `images` itself.

    Raises:
        ValueError: `images` is not a batch, or `padding` is negative.
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, C, H, W), got {tuple(images.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be >= 0, got {padding!r}")
    return View.draw(images, generator=generator, padding=padding, flip=flip).of(images)

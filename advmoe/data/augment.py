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
        """Draw a shift of up to `padding` pixels for each of `images`, (N, C, H, W), and with `flip` a side.

        Zeros move in from the sides. `images` are contiguous or channels-last. Numbers are drawn on the generator's
        device and moved, so that a seed gives the same on any device and for images of any type.
        """
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
    """How the images of an epoch are varied: shifted in memory (`View`), cropped in files (`decode.random_crop`)."""

    generator: torch.Generator
    """What images in memory draw from, batch by batch as they are handed out."""
    purpose: tuple[int | str, ...]
    """From this, its index and its batch's place in the plan follows the seed of an image in a file."""
    flip: bool
    """Whether to flip every other image left to right."""

    def view(self, images: Tensor) -> View:
        """Draw how images in memory, (N, C, H, W), are varied: shifts of up to an eighth of their side, and flips."""
        return View.draw(images, generator=self.generator, padding=images.shape[-1] // 8, flip=self.flip)

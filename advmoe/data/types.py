"""Image sets in memory, data sets, and what is done to a whole set: hold-out split, channel statistics, resizing.

Axes: `N` images, `B` batch, `C` channels, `H W` size. Images are uint8; pixels handed to a model are float32 in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset

from advmoe.data.augment import Variation
from advmoe.data.stream import FileSet
from advmoe.errors import InputError, real, whole
from advmoe.seeding import generator_for

# Values handled at once where uint8 has to become a wider type: bounds the extra memory, whatever the image size.
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class ImageSet(TorchDataset[tuple[Tensor, int]]):
    """Labelled images, held as uint8.

    Raises `ValueError` if dtypes or shapes are not those below.
    """

    images: Tensor
    """Images, (N, C, H, W) uint8."""
    labels: Tensor
    """Class of each image, (N,) int64."""

    def __post_init__(self) -> None:
        """Check dtypes and shapes."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            got = f"{self.images.dtype} of shape {tuple(self.images.shape)}"
            raise InputError(f"images must be uint8 of shape (N, C, H, W), got {got}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            got = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise InputError(f"labels must be int64 of shape ({len(self.images)},), got {got}")

    def __len__(self) -> int:
        """Return the number of images N."""
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, pixels (C, H, W) float32 in [0, 1], and its class."""
        i = range(len(self))[index]
        return self.pixels(slice(i, i + 1))[0], int(self.labels[i])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels C, and size H and W, of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the same set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def pixels(self, index: Tensor | slice) -> Tensor:
        """Return the chosen images as float32 in [0, 1], (B, C, H, W), on the images' device."""
        if isinstance(index, Tensor):
            index = index.to(self.images.device, non_blocking=True)  # a GPU goes on with what it has
        return self.images[index].to(torch.float32).div_(255)

    def subset(self, index: Tensor) -> ImageSet:
        """Return the images at `index`, (B,) int64, in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def batches(
        self, plan: Iterable[Tensor], variation: Variation | None = None, start: int = 0
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) uint8 and classes (B,), on the images' device, for each batch of indices in turn.

        Args:
            plan: Indices (B,) int64 of each batch.
            variation: Shifts images by up to an eighth of their side, and flips; None leaves them as they are.
            start: Batches to leave out, which were handed out before.
        """
        for index in islice(plan, start, None):
            index = index.to(self.images.device, non_blocking=True)
            images, labels = self.images[index], self.labels[index]
            if variation is not None:
                # On bytes, which is several times cheaper than on floats.
                images = variation.view(images).of(images)
            yield images, labels


Images = ImageSet | FileSet
"""Labelled images, wherever they are held: both kinds have the same methods, but for `ImageSet.images`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a reader is asked for; each reader says which fields have no effect there."""

    root: Path
    """Where the images lie, or where downloads go."""
    download: bool
    """Whether to fetch what is missing."""
    image_size: int | None
    """Side in pixels that images are resized to; None for their own, or the data set's customary one."""
    workers: int
    """Processes that decode images which are not held in memory; 0 decodes them in this one."""


class DrawnFrom(NamedTuple):
    """The images that a test set is drawn from, where the data have none of their own: of others another is drawn."""

    images: int
    sha256: str
    """Of their names."""


@dataclass(frozen=True, eq=False)
class Source:
    """What a reader of one kind of data returns: training and test set, before anything is held out."""

    train: Images
    test: Images
    classes: tuple[str, ...]
    flip: bool
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of each channel where they are published; None has them computed from `train`."""
    notes: tuple[str, ...] = ()
    """What was seen and is not used, a line for each rule."""
    cut: str = "middle-square"
    """How a picture becomes one of the test set's: a name of `decode.CUTS`."""
    chosen_size: int | None = None
    """The images' side in pixels, where it was chosen for files of several sizes."""
    drawn_from: DrawnFrom | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split three ways, with what a model needs to know about it."""

    name: str
    """The name that it was loaded by."""
    train: Images
    """Images to train on."""
    val: Images
    """Images held out of the training set; may be empty."""
    test: Images
    """The whole test set."""
    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    mean: tuple[float, ...]
    """Mean of each channel of `train`, pixels in [0, 1]; for ImageNet the published one."""
    std: tuple[float, ...]
    """Standard deviation of each channel of `train`, likewise; at least 1/255."""
    flip: bool
    """Whether a horizontal flip leaves the class as it is (not for digits)."""
    notes: tuple[str, ...] = ()
    """Which images were seen and are not used, a line for each rule."""
    cut: str = "middle-square"
    """How a picture becomes one of the test set's: a name of `decode.CUTS`."""
    chosen_size: int | None = None
    """The images' side in pixels, where it was chosen for files of several sizes."""
    drawn_from: DrawnFrom | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Side of the (square) images, in pixels."""
        return self.train.shape[-1]

    @property
    def in_channels(self) -> int:
        """Number of channels C."""
        return self.train.shape[0]


def drawn(data: Images, examples: int | None) -> Images:
    """Draw `examples` images of a set at random, always the same ones, each number's among a larger one's; None takes
    all. They keep the order of `data`.

    Raises `ValueError` for fewer than 2, or more than there are.
    """
    if examples is None:
        return data
    if not whole(examples) or not 2 <= examples <= len(data):
        rule = f"a whole number >= 2 and <= the {len(data)} training images"
        raise InputError(f"data.train_examples must be {rule}, got {examples!r}")
    index = torch.randperm(len(data), generator=generator_for(0, "train examples"))[:examples].sort().values
    return data.subset(index.to(data.labels.device))


def split(data: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Divide a set at random, class by class, into a part to train on and a part held out.

    The held-out part has `round(fraction * N)` images, but at least one if `fraction > 0`; a class's share of them is
    its share of the set, rounded up or down so that the total fits. The last image of a class is never taken. Both
    parts keep the order of `data`.

    Args:
        data: The set to divide.
        fraction: Share to hold out, in [0, 0.5].
        seed: Decides which images are held out.

    Returns:
        The part to train on, and the part held out.

    Raises:
        ValueError: `fraction` is out of range, or positive where no class has two images.
    """
    require_share(fraction)
    drawn = part_of(data.labels.cpu(), fraction, seed)
    if fraction > 0 and not drawn.any():
        raise InputError(f"data.val_fraction must be 0 when every class has a single image, got {fraction!r}")
    device = data.labels.device
    return data.subset((~drawn).nonzero()[:, 0].to(device)), data.subset(drawn.nonzero()[:, 0].to(device))


def require_share(fraction: object) -> None:
    """Raise `ValueError` unless such a share of a training set can be held out."""
    if not real(fraction) or not 0 <= float(fraction) <= 0.5:
        raise InputError(f"data.val_fraction must be >= 0 and <= 0.5, got {fraction!r}")


def part_of(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which of the images with these `labels`, (N,) int64, `split` holds out: (N,) bool."""
    n = len(labels)
    counts = torch.bincount(labels)
    take = torch.zeros_like(counts)
    if fraction > 0:
        total = max(1, round(fraction * n))
        spare = (counts - 1).clamp(min=0)
        take = torch.minimum(total * counts // n, spare)
        # Largest remainder first, in integers, so that no rounding decides between equal classes.
        order = torch.argsort(total * counts % n, descending=True, stable=True)
        open_classes = order[(take < spare)[order]]
        take[open_classes[: total - int(take.sum())]] += 1
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    first = counts.cumsum(0) - counts
    rank = torch.arange(n) - first[labels[by_class]]
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[by_class] = rank < take[labels[by_class]]
    return held_out


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute mean and standard deviation of each channel, exactly, from the histogram of its values.

    Args:
        images: (N, C, H, W) uint8, with N at least 1.

    Returns:
        Mean and (population) standard deviation per channel, in units of pixels in [0, 1]. A standard deviation below
        one grey level, 1/255, is given as that, so that one may divide by it.
    """
    n, channels, height, width = images.shape
    rows = max(1, _CHUNK // (height * width))
    histogram = torch.zeros(channels, 256, dtype=torch.int64)
    for start in range(0, n, rows):
        for c in range(channels):
            histogram[c] += torch.bincount(images[start : start + rows, c].reshape(-1), minlength=256).cpu()
    # Python integers: sums of squares over a large set of large images do not fit float64's 53 bits.
    means, stds = [], []
    for counts in histogram.tolist():
        number = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value * value * count for value, count in enumerate(counts))
        means.append(first / number / 255)
        stds.append(max(math.sqrt((number * second - first * first) / number**2), 1.0) / 255)
    return tuple(means), tuple(stds)


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize square images to `size` by antialiased bilinear interpolation; None or their own size changes nothing.

    Args:
        images: (N, C, H, H) uint8.
        size: New side in pixels.

    Returns:
        (N, C, size, size) uint8, rounded to nearest.
    """
    if size is None or size == images.shape[-1]:
        return images
    n, channels = images.shape[:2]
    out = torch.empty(n, channels, size, size, dtype=torch.uint8)
    rows = max(1, _CHUNK // (channels * max(size, images.shape[-1]) ** 2))
    for start in range(0, n, rows):
        part = images[start : start + rows].to(torch.float32)
        part = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        out[start : start + rows] = part.round_().clamp_(0, 255).to(torch.uint8)
    return out

"""Images: loading, the hold-out split, augmentation. Pixels handed out are float32 in [0, 1], never normalised."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from advmoe.data.augment import augment
from advmoe.data.cifar import load_cifar10, load_cifar100
from advmoe.data.digits import load_digits
from advmoe.data.folder import load_folder
from advmoe.data.types import Dataset, ImageSet, Source, channel_statistics, split

__all__ = ["Dataset", "ImageSet", "augment", "load_dataset"]

_READERS: dict[str, Callable[..., Source]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "folder": load_folder,
}


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.02,
    seed: int = 0,
    progress: bool = False,
) -> Dataset:
    """Load a data set into memory and hold out a part of its training set.

    Args:
        name: `digits`, `cifar10`, `cifar100`, or `folder` for `root/train/<class>/*` and `root/test|val/<class>/*`.
        root: Where the images lie, or where downloads go.
        download: Fetch what is missing (CIFAR), checked by its checksum.
        image_size: Side in pixels that images are resized to; by default their own.
        val_fraction: Share of the training set held out, stratified by class, in [0, 0.5]; 0 leaves `val` empty.
        seed: Decides which images are held out, and nothing else.
        progress: Show progress bars, if stderr is a terminal.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: One line that names the field (`data.name`, `data.root`, `data.download`, `data.image_size`,
            `data.val_fraction`), the rule and the value.
    """
    if name not in _READERS:
        raise ValueError(f"data.name must be one of {', '.join(_READERS)}, got {name!r}")
    if image_size is not None and (not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1):
        raise ValueError(f"data.image_size must be an integer >= 1, got {image_size!r}")
    if not 0 <= val_fraction <= 0.5:
        raise ValueError(f"data.val_fraction must be >= 0 and <= 0.5, got {val_fraction!r}")
    source = _READERS[name](Path(root).expanduser(), download=download, image_size=image_size, progress=progress)
    train, val = split(source.train, val_fraction, seed)
    mean, std = channel_statistics(train.images)
    return Dataset(
        name=name,
        train=train,
        val=val,
        test=source.test,
        classes=source.classes,
        mean=mean,
        std=std,
        flip=source.flip,
    )

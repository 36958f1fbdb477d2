"""Images: loading, the hold-out split, augmentation. Pixels handed out are float32 in [0, 1], never normalised."""

from __future__ import annotations

import os
from contextlib import nullcontext
from multiprocessing import parent_process
from pathlib import Path

from advmoe.data.augment import Variation
from advmoe.data.stream import FileSet
from advmoe.data.types import (
    Dataset,
    Images,
    ImageSet,
    Request,
    Source,
    channel_statistics,
    drawn,
    require_share,
    split,
)
from advmoe.errors import InputError, require_whole
from advmoe.progress import shown, tell
from advmoe.tables import DATASETS
from advmoe.text import printable

__all__ = ["Dataset", "FileSet", "ImageSet", "Images", "Variation", "load_dataset"]


def load_dataset(
    name: str,
    *,
    root: str | os.PathLike[str] = "data",
    download: bool = False,
    image_size: int | None = None,
    val_fraction: float = 0.02,
    train_examples: int | None = None,
    workers: int = 2,
    seed: int = 0,
    progress: bool = False,
) -> Dataset:
    """Load a data set and hold out a part of its training set.

    Images are held in memory, except ImageNet's, which are decoded when they are wanted.

    Args:
        name: `digits`, `cifar10`, `cifar100`, `tiny-imagenet`, `imagenet`, or `folder` for `root/train/<class>/*` and
            `root/test|val/<class>/*`. Layouts: modules `tiny_imagenet`, `imagenet`, `folder`.
        root: Where the images lie, or where downloads go.
        download: Fetch what is missing (CIFAR), checked by its checksum.
        image_size: Side in pixels that images are resized to; by default their own, and 224 for `imagenet`.
        val_fraction: Share of the training set held out, stratified by class, in [0, 0.5]; 0 leaves `val` empty.
        train_examples: How many of the training images are used, validation split included; by default all.
        workers: Processes that decode images not held in memory, ahead of time; 0 decodes them in this one.
        seed: Decides which images are held out, and nothing else.
        progress: Show progress bars, if stderr is a terminal; inside `progress.shown` they are anyway.

    Returns:
        The data set, on the CPU. What its reader saw and does not use is told on stderr, and in its `notes`.

    Raises:
        ValueError: One line that names the field (`data.name`, `data.root`, `data.download`, `data.image_size`,
            `data.val_fraction`, `data.train_examples`, `data.workers`), the rule and the value.
    """
    read = DATASETS.find(name).reader
    if not isinstance(root, str | os.PathLike):
        raise InputError(f"data.root must be a path, got {root!r}")
    if image_size is not None:
        require_whole("data.image_size", image_size, 1)
    if train_examples is not None:
        require_whole("data.train_examples", train_examples, 2)
    require_share(val_fraction)
    require_whole("data.workers", workers, 0)
    require_whole("seed", seed, 0)
    request = Request(root=Path(root).expanduser(), download=download, image_size=image_size, workers=workers)
    with shown() if progress else nullcontext():
        source: Source = read(request)
    for note in source.notes if parent_process() is None else ():  # others read again what the first one told of
        tell(f"note  {note}")
    train, val = split(drawn(source.train, train_examples), val_fraction, seed)
    if source.statistics is None:
        assert isinstance(train, ImageSet)  # readers of images that are not in memory give statistics
        mean, std = channel_statistics(train.images)
    else:
        mean, std = source.statistics
    return Dataset(
        name=name,
        train=train,
        val=val,
        test=source.test,
        classes=tuple(map(printable, source.classes)),
        mean=mean,
        std=std,
        flip=source.flip,
        notes=source.notes,
        cut=source.cut,
        chosen_size=source.chosen_size,
        drawn_from=source.drawn_from,
    )

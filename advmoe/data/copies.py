"""Copies of data sets in another form."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from advmoe.data.cifar import load_cifar10
from advmoe.data.listing import CIFAR10_JPEG
from advmoe.data.types import ImageSet, Request
from advmoe.errors import InputError
from advmoe.progress import counting

QUALITY = 75


def write_cifar10_jpeg(root: Path, *, download: bool = False) -> Path:
    """Write all images of CIFAR-10 as JPEG files of quality 75, a folder as `load_folder` takes it:
    `root/cifar10-jpeg/{train,test}/<class>/NNNN.jpg`, numbered class by class in the archive's order.

    The archive lies in `root`, or is downloaded to there. Returns the folder, which appears whole or not at all. Raises
    `InputError` where it is there already, or the archive cannot be had.
    """
    folder = root / CIFAR10_JPEG
    if folder.exists():
        raise InputError(f"data.root must not hold {CIFAR10_JPEG} yet, got {str(folder)!r}")
    source = load_cifar10(Request(root=root, download=download, image_size=None, workers=0))
    partial = root / f".{CIFAR10_JPEG}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, part in (("train", source.train), ("test", source.test)):
            assert isinstance(part, ImageSet)
            _write(part, source.classes, partial / name)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(part: ImageSet, classes: tuple[str, ...], folder: Path) -> None:
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
    numbers = Counter[int]()
    with counting(folder.name, len(part), unit="image") as step:
        for image, label in zip(part.images.permute(0, 2, 3, 1).numpy(), part.labels.tolist(), strict=True):
            path = folder / classes[label] / f"{numbers[label]:04}.jpg"
            Image.fromarray(image).save(path, quality=QUALITY)
            numbers[label] += 1
            step()

"""CIFAR-10 and CIFAR-100, read from the official binary archives (A. Krizhevsky, 2009) without unpacking them.

Each record of a member is one or two label bytes, then 3072 pixel bytes: 3 channels of 32 rows of 32.
Axes: `N` images, `C` channels, `H W` size.
"""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from advmoe.data.download import fetch, file_md5
from advmoe.data.types import ImageSet, Request, Source, resize
from advmoe.errors import InputError
from advmoe.text import one_line

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One official archive: where it is, what proves it, and what lies inside."""

    file: str
    """Its file name."""
    url: str
    """Where it can be downloaded."""
    md5: str
    """The published checksum."""
    label_bytes: int
    """Label bytes of a record; the last of them is the (fine) class."""
    train: dict[str, int]
    """Training members, by base name, and the number of images in each."""
    test: dict[str, int]
    """Test members, likewise."""
    names: str
    """Member with one class name per line."""
    num_classes: int
    """Number of classes."""


ARCHIVES: dict[str, Archive] = {
    "cifar10": Archive(
        file="cifar-10-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        label_bytes=1,
        train={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test={"test_batch.bin": 10_000},
        names="batches.meta.txt",
        num_classes=10,
    ),
    "cifar100": Archive(
        file="cifar-100-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,
        train={"train.bin": 50_000},
        test={"test.bin": 10_000},
        names="fine_label_names.txt",
        num_classes=100,
    ),
}
"""The archives by the name of their data set."""


def load_cifar10(request: Request) -> Source:
    """Load CIFAR-10; see `load_archive`."""
    return load_archive(ARCHIVES["cifar10"], request)


def load_cifar100(request: Request) -> Source:
    """Load CIFAR-100 with its 100 fine classes; see `load_archive`."""
    return load_archive(ARCHIVES["cifar100"], request)


def fetch_archive(root: Path, *, name: str) -> Path:
    """Have the archive of the data set called `name` in the folder `root`, downloaded unless it is there; its path."""
    archive = ARCHIVES[name]
    path = root / archive.file
    fetch(archive.url, path, archive.md5)
    return path


def load_archive(archive: Archive, request: Request) -> Source:
    """Read a CIFAR archive that lies in the folder `request.root`, or is downloaded to there.

    Returns:
        Both parts, the images (N, 3, 32, 32) unless resized, in the archive's order.

    Raises:
        ValueError: The archive is missing, or cannot be fetched, or its checksum or contents are wrong.
    """
    root = request.root
    path = root / archive.file
    if path.is_file():
        # A third of a second for the official ones: cheaper to repeat than to remember.
        if (got := file_md5(path)) != archive.md5:
            raise InputError(
                f"data.root must hold {archive.file} with md5 {archive.md5}, got md5 {got} in {str(path)!r}"
            )
    elif request.download:
        fetch(archive.url, path, archive.md5)
    else:
        raise InputError(f"data.root must hold {archive.file} (or set data.download=true), got {str(root)!r}")

    record = archive.label_bytes + _PIXELS
    sizes = {member: count * record for member, count in (archive.train | archive.test).items()}
    contents = _read_members(path, {archive.names: None, **sizes})
    classes = tuple(contents[archive.names].decode().split())
    if len(classes) != archive.num_classes:
        got = f"{len(classes)} in {str(path)!r}"
        raise InputError(f"data.root must hold {archive.file} with {archive.num_classes} class names, got {got}")

    def part(members: dict[str, int]) -> ImageSet:
        labels = np.empty(sum(members.values()), dtype=np.int64)
        images = np.empty((len(labels), 3, 32, 32), dtype=np.uint8)
        start = 0
        for member, count in members.items():
            records = np.frombuffer(contents.pop(member), dtype=np.uint8).reshape(count, record)
            labels[start : start + count] = records[:, archive.label_bytes - 1]
            images[start : start + count] = records[:, archive.label_bytes :].reshape(count, 3, 32, 32)
            start += count
        if len(labels) and (highest := int(labels.max())) >= archive.num_classes:
            rule = f"{archive.file} with labels below {archive.num_classes}"
            raise InputError(f"data.root must hold {rule}, got {highest} in {str(path)!r}")
        return ImageSet(resize(torch.from_numpy(images), request.image_size), torch.from_numpy(labels))

    return Source(train=part(archive.train), test=part(archive.test), classes=classes, flip=True)


def _read_members(path: Path, wanted: dict[str, int | None]) -> dict[str, bytes]:
    """Return the content of the members with these base names, in one pass; each must have its size, unless None."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name not in wanted or name in contents or not member.isfile():
                    continue
                size = wanted[name]
                if size is not None and member.size != size:
                    rule = f"{path.name} with {size} bytes in {name}"
                    raise InputError(f"data.root must hold {rule}, got {member.size} in {str(path)!r}")
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"data.root must hold a readable {path.name}, got {one_line(error)}") from error
    if missing := sorted(set(wanted) - set(contents)):
        rule = f"{path.name} with a member {missing[0]}"
        raise InputError(f"data.root must hold {rule}, got none in {str(path)!r}")
    return contents

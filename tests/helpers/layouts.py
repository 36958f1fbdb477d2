"""Data sets in their official layouts, a few made-up images each."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe.data.cifar import ARCHIVES, Archive


def save_png(path: Path, colour: tuple[int, int, int] = (0, 0, 0), size: tuple[int, int] = (8, 8)) -> None:
    """Save an image of one colour, as PNG whatever its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="png")


# CIFAR-10 and CIFAR-100

CIFAR_IMAGES = 6
"""Images in each member of the small archives."""


def cifar_records(label_bytes: int, classes: int, seed: int) -> bytes:
    """Records with random pixels, random first labels, and last labels that count up modulo `classes`."""
    data = np.random.default_rng(seed).integers(0, 256, (CIFAR_IMAGES, label_bytes + 3072), dtype=np.uint8)
    data[:, label_bytes - 1] = np.arange(CIFAR_IMAGES) % classes
    return data.tobytes()


def tarball(members: dict[str, bytes]) -> bytes:
    """A compressed archive with the members in a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_members(name: str, used: int | None = None) -> dict[str, bytes]:
    """Members of a small archive, in an order that differs from the one they are wanted in. Its images are of the first
    `used` classes, by default of all.
    """
    archive = ARCHIVES[name]
    wanted = sorted([*archive.train, *archive.test], reverse=True)
    data = {m: cifar_records(archive.label_bytes, used or archive.num_classes, seed) for seed, m in enumerate(wanted)}
    names = "\n".join(f"class{i}" for i in range(archive.num_classes)) + "\n\n"
    return {"readme.html": b"<p>", "old_" + wanted[0]: b"x"} | data | {archive.names: names.encode()}


def cifar_archive(name: str, content: bytes, url: str = "http://127.0.0.1:9/none") -> Archive:
    """What the table of archives has to hold for `content` to be the data set `name`."""
    real = ARCHIVES[name]
    return Archive(
        file=real.file,
        url=url,
        md5=hashlib.md5(content).hexdigest(),
        label_bytes=real.label_bytes,
        train=dict.fromkeys(real.train, CIFAR_IMAGES),
        test=dict.fromkeys(real.test, CIFAR_IMAGES),
        names=real.names,
        num_classes=real.num_classes,
    )


# Folders of images


def lay_out_folder(root: Path) -> None:
    """Two classes of three images, and one test image; red tells the image, green the class."""
    for i in range(3):
        save_png(root / "train" / "cat" / f"{i}.png", (i, 0, 0))
        save_png(root / "train" / "ant" / f"{i}.png", (i, 100, 0))
    save_png(root / "test" / "cat" / "0.png", (7, 0, 0))


# Tiny ImageNet

TINY_WNIDS = ("n02000000", "n01000000")


def lay_out_tiny_imagenet(root: Path) -> None:
    """Two classes of two images, and three validation images; red tells the class, green the image."""
    for red, wnid in enumerate(TINY_WNIDS):
        for green in range(2):
            save_png(root / "train" / wnid / "images" / f"{wnid}_{green}.JPEG", (red, green, 0))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("box\n")
    (root / "wnids.txt").write_text("\n".join(TINY_WNIDS) + "\n")
    (root / "words.txt").write_text("n00000001\tentity\nn01000000\tcat, true cat\nn02000000\tdog\n")
    for green, red in enumerate([1, 0, 1]):
        save_png(root / "val" / "images" / f"val_{green}.JPEG", (red, green, 200))
    lines = [f"val_{i}.JPEG\t{TINY_WNIDS[red]}\t0\t32\t44\t62\n" for i, red in enumerate([1, 0, 1])]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


# ImageNet

# Sorted wnids, so classes 0, 1, 2; their ILSVRC2012 ids are 2, 3, 1.
IMAGENET_WNIDS = ("n01000000", "n02000000", "n03000000")
# The class of each validation image, in the order of their names.
IMAGENET_VAL = ("n03000000", "n01000000", "n02000000", "n01000000")


def save_imagenet(path: Path, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    """Save an image that is not square."""
    save_png(path, colour, (20, 16))


def imagenet_val_name(number: int) -> str:
    """The name, without its ending, of a validation image."""
    return f"ILSVRC2012_val_{number + 1:08d}"


def lay_out_imagenet(root: Path) -> None:
    """Three classes of four images whose red tells the class, and a flat `val` without labels."""
    for red, wnid in enumerate(IMAGENET_WNIDS):
        for i in range(4):
            save_imagenet(root / "train" / wnid / f"{wnid}_{i}.JPEG", (red, i, 0))
    for number, wnid in enumerate(IMAGENET_VAL):
        save_imagenet(root / "val" / f"{imagenet_val_name(number)}.JPEG", (IMAGENET_WNIDS.index(wnid), 0, 0))


def label_imagenet(root: Path) -> None:
    """A file with the class of each validation image, in another order than theirs."""
    lines = [f"{imagenet_val_name(number)}.JPEG {wnid}\n" for number, wnid in enumerate(IMAGENET_VAL)]
    (root / "val_labels.txt").write_text("".join(reversed(lines)))


# Every data set by name


def _cifar(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def lay_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = tarball(cifar_members(name, used=2))
        (root / ARCHIVES[name].file).write_bytes(content)
        monkeypatch.setitem(ARCHIVES, name, cifar_archive(name, content))

    return lay_out


def _imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out_imagenet(root)
    label_imagenet(root)


LAYOUTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "digits": lambda root, monkeypatch: None,  # they come with scikit-learn
    "cifar10": _cifar("cifar10"),
    "cifar100": _cifar("cifar100"),
    "folder": lambda root, monkeypatch: lay_out_folder(root),
    "tiny-imagenet": lambda root, monkeypatch: lay_out_tiny_imagenet(root),
    "imagenet": _imagenet,
}
"""Writes a small data set into an empty folder, by the data set's name in the table."""

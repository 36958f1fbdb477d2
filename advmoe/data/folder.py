"""Folders of images, held in memory: `root/<class>/*`, or `root/train/<class>/*` with `root/test|val/<class>/*`.

Axes: `N` images, `H` their side in pixels.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from advmoe.data.cache import load_decoded
from advmoe.data.listing import ImageFolder, Listing, by_class, class_names, is_image, left_out, scan
from advmoe.data.types import DrawnFrom, Request, Source, part_of
from advmoe.errors import InputError

TEST_SHARE = 0.2
"""Of the images of a folder without a test set."""
TESTS = ("test", "val", "valid", "validation")
"""Folders beside `train`; the first that is there is the test set."""
_SPLITS = {*TESTS, "train", "training", "testing", "tests", "dev", "eval", "evaluation"}


def load_folder(request: Request) -> Source:
    """Load an image folder, decoded at its first use (see `cache.load_decoded`).

    Classes are the sub-folders of `root/train`, or of `root` where there is no `train`, sorted by name; images in
    sub-folders of theirs are of that class. The test set is the first of `root/test`, `val`, `valid` and `validation`
    that is there; it may lack classes. Without any, it is a fifth of the images, class by class, drawn at random but
    the same for every training's seed. A note tells of that, and of what is left out: files with other endings than
    `listing.EXTENSIONS`, names that begin with a dot, what lies beside the folders that are used. `download` has no
    effect.

    Returns:
        Both parts, images (N, 3, H, H), sorted by class and name.

    Raises:
        ValueError: A folder is missing or empty, images of `train` lie beside class folders, a test class is unknown,
            or a file cannot be decoded.
    """
    folder = list_folder(request.root)
    parts, sizes = load_decoded(request.root, folder.parts, image_size=request.image_size)
    return Source(
        train=parts["train"], test=parts["test"], classes=folder.classes, flip=True, notes=(*folder.notes, *sizes),
        chosen_size=parts["train"].shape[-1] if sizes else None, drawn_from=folder.drawn_from,
    )  # fmt: skip


@dataclass(frozen=True)
class FolderListing:
    """What a folder's images are, none of them read."""

    classes: tuple[str, ...]
    parts: dict[str, Listing]
    """Of `train` and `test`."""
    notes: tuple[str, ...]
    drawn_from: DrawnFrom | None = None


def list_folder(root: Path) -> FolderListing:
    """Find the images in `root`; see `load_folder`."""
    train, test = _parts(root)
    classes = class_names(train)
    if len(classes) < 2:  # one folder too many above the classes, whose images would all be of one
        raise InputError(f"data.root must hold >= 2 class folders{train.inside}, got {classes[0]!r} alone")
    images, notes, drawn_from = by_class(train, classes), list(train.notes), None
    if test is None:
        listings = _divided(images)
        number, there = len(listings["test"]), f"{root}{f'/{train.name}' if train.name else ''}"
        notes.append(f"the test set is {number} of the {len(images)} images of {there}, the same for every seed")
        names = "\0".join(path for path, _ in images)
        drawn_from = DrawnFrom(len(images), hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest())
    else:
        class_names(test)
        listings = {"train": images, "test": by_class(test, classes)}
        notes += test.notes
    if train.name:
        notes += _beside(root, [part.name for part in (train, test) if part is not None])
    return FolderListing(tuple(classes), listings, tuple(notes), drawn_from)


def _parts(root: Path) -> tuple[ImageFolder, ImageFolder | None]:
    """The images to train on, and those of a test set, if there is one."""
    test = next((name for name in TESTS if (root / name).is_dir()), None)
    if test is not None:
        return scan(root, "train"), scan(root, test)
    if root.is_dir() and not os.path.lexists(root / "train"):
        return _whole(root), None
    train = scan(root, "train")
    # A class may be called train, too.
    return (train if train.folders or len((whole := _whole(root)).folders) < 2 else whole), None


def _whole(root: Path) -> ImageFolder:
    """`root` as a folder of class folders; images beside them are left out."""
    part = scan(root)
    for name, paths in part.folders.items():
        if name.lower() in _SPLITS and paths and all(path.count("/") > 1 for path in paths):
            rule = f"hold a folder train, with {' or '.join(TESTS)} beside it or without, or class folders"
            raise InputError(f"data.root must {rule}, got {name!r}, whose images lie in folders")
    if not part.loose or not part.folders:
        return part
    note = left_out("data.root", len(part.loose), "image", "they lie beside class folders", map(repr, part.loose))
    return replace(part, loose=(), notes=(*part.notes, note))


def _divided(images: Listing) -> dict[str, Listing]:
    """The images, in their order, but for those of the test set, and those."""
    drawn = part_of(torch.tensor([label for _, label in images]), TEST_SHARE, seed=0).tolist()
    if not any(drawn):
        raise InputError("data.root must hold a class of >= 2 images, of which some are the test set, got none")
    return {
        "train": [image for image, out in zip(images, drawn, strict=True) if not out],
        "test": [image for image, out in zip(images, drawn, strict=True) if out],
    }


def _beside(root: Path, used: list[str]) -> list[str]:
    """Notes of images in `root` that lie in none of the folders in use."""
    notes, folders = [], " and ".join(used)
    for folder in sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")):
        number = (
            0 if folder in used else sum(is_image(name) for _, _, names in os.walk(root / folder) for name in names)
        )
        if number:
            notes.append(left_out(folder, number, "image", f"used are those in {folders}"))
    loose = sorted(each.name for each in root.iterdir() if is_image(each.name) and each.is_file())
    if loose:
        rule = f"they lie beside the folder{'s' * (len(used) > 1)} {folders}"
        notes.append(left_out("data.root", len(loose), "image", rule, map(repr, loose)))
    return notes

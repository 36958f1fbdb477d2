"""Folders of images in the common layout, `root/train/<class>/*` and `root/test|val/<class>/*`, held in memory.

Axes: `N` images, `H` their side in pixels.
"""

from __future__ import annotations

import os
from pathlib import Path

from advmoe.data.cache import load_decoded
from advmoe.data.listing import by_class, class_names, is_image, left_out, scan
from advmoe.data.types import Request, Source
from advmoe.errors import InputError


def load_folder(request: Request) -> Source:
    """Load an image folder, decoded at its first use (see `cache.load_decoded`).

    Classes are the sub-folders of `root/train`, sorted by name; images in sub-folders of theirs are of that class. The
    test set is `root/test`, or `root/val` where there is no `root/test`; it may lack classes. A note tells what is left
    out: files with other endings than `listing.EXTENSIONS`, names that begin with a dot, and a `val` beside `test`.
    `download` has no effect.

    Returns:
        Both parts, images (N, 3, H, H), sorted by class and name.

    Raises:
        ValueError: A folder is missing or empty, images lie beside class folders, a test class is unknown, a file
            cannot be decoded, or sizes differ.
    """
    root = request.root
    classes = class_names(train := scan(root, "train"))
    if len(classes) < 2:  # one folder too many above the classes, whose images would all be of one
        raise InputError(f"data.root must hold >= 2 class folders in train, got {classes[0]!r} alone")
    name = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if name is None:
        raise InputError(f"data.root must hold a folder test or val beside train, got {str(root)!r}")
    class_names(test := scan(root, name))
    listings = {"train": by_class(train, classes), "test": by_class(test, classes)}
    parts = load_decoded(root, listings, image_size=request.image_size)
    notes = (*train.notes, *test.notes, *_beside(root, name))
    return Source(train=parts["train"], test=parts["test"], classes=tuple(classes), flip=True, notes=notes)


def _beside(root: Path, test: str) -> list[str]:
    """Notes of images in `root` that belong to neither part."""
    notes = []
    if test == "test":
        number = sum(is_image(name) for _, _, names in os.walk(root / "val") for name in names)
        notes += [left_out("val", number, "image", "the folder test is the test set")] if number else []
    loose = sorted(each.name for each in root.iterdir() if is_image(each.name) and each.is_file())
    if loose:
        rule = f"they lie beside the folders train and {test}"
        notes.append(left_out("data.root", len(loose), "image", rule, map(repr, loose)))
    return notes

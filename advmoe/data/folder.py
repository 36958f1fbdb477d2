"""Folders of images in the common layout, `root/train/<class>/*` and `root/test|val/<class>/*`, held in memory."""

from __future__ import annotations

from advmoe.data.cache import load_decoded
from advmoe.data.listing import by_class, class_folders
from advmoe.data.types import Request, Source


def load_folder(request: Request) -> Source:
    """Load an image folder, decoded at its first use (see `cache.load_decoded`).

    Classes are the sub-folders of `root/train`, sorted by name. The test set is `root/test`, or `root/val` where there
    is no `root/test`; it may lack classes. Files with other endings than `listing.EXTENSIONS`, names that begin with a
    dot, and folders inside class folders are ignored. `download` has no effect.

    Returns:
        Both parts, images (N, 3, H, H), sorted by class and name.

    Raises:
        ValueError: A folder is missing or empty, a test class is unknown, a file cannot be decoded, or sizes differ.
    """
    root = request.root
    classes = class_folders(root, "train")
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise ValueError(f"data.root must hold a folder test or val beside train, got {str(root)!r}")
    listings = {"train": by_class(root, "train", classes), "test": by_class(root, test, classes)}
    parts = load_decoded(root, listings, image_size=request.image_size)
    return Source(train=parts["train"], test=parts["test"], classes=tuple(classes), flip=True)

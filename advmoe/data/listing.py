"""Which image files a data set consists of: class folders and what lies in them, found but not read."""

from __future__ import annotations

import os
from pathlib import Path

from advmoe.wording import one_line


EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".jpe", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""File names that count as images, by their ending in lower case; other files in a folder of images are ignored."""

Listing = list[tuple[str, int]]
"""The images of a part: path relative to `root`, with `/`, and class."""


def class_folders(root: Path, part: str) -> list[str]:
    """Return the sorted names of the class folders of `root/part`."""
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder, got {str(root)!r}")
    try:
        with os.scandir(root / part) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_dir(entry))
    except FileNotFoundError:
        raise ValueError(f"data.root must hold a folder {part}, got {str(root)!r}") from None
    except OSError as error:
        raise ValueError(f"data.root must hold a readable folder {part}, got {one_line(error)}") from error
    if not names:
        raise ValueError(f"data.root must hold class folders in {part}, got none in {str(root / part)!r}")
    return names


def by_class(root: Path, part: str, classes: list[str]) -> Listing:
    """Return the images of `root/part/<class>/*`, sorted by class and name; classes may be missing there."""
    folders = class_folders(root, part)
    index = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(folders) - set(classes)):
        rule = f"have only classes of train in {part}"
        raise ValueError(f"data.root must {rule}, got {unknown[0]!r} in {str(root / part)!r}")
    return [(file, index[name]) for name in folders for file in image_files(root, f"{part}/{name}")]


def image_files(root: Path, folder: str) -> list[str]:
    """Return the image files that lie directly in `root/folder`, relative to `root`, sorted by name.

    Files with other endings than `EXTENSIONS`, names that begin with a dot, and folders are left out.
    """
    try:
        with os.scandir(root / folder) as entries:
            files = [f"{folder}/{entry.name}" for entry in entries if _is_image(entry.name) and not _is_dir(entry)]
    except OSError as error:
        raise ValueError(f"data.root must hold readable files in {folder}, got {one_line(error)}") from error
    if not files:
        raise ValueError(f"data.root must hold at least one image in {folder}, got none in {str(root / folder)!r}")
    return sorted(files)


def read_lines(root: Path, name: str) -> list[str]:
    """Return the lines of the text file `root/name`, without empty ones."""
    try:
        lines = (root / name).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"data.root must hold {name}, got {str(root)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.root must hold a readable {name}, got {one_line(error)}") from error
    return [line for line in lines if line.strip()]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that leads nowhere is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False

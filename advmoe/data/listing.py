"""Which image files a data set consists of: class folders and the files in them, listed but not read.

Every image that is seen is used, refused, or counted in a note that names the rule.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from advmoe.errors import InputError
from advmoe.text import few, one_line

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jpe", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""File names that count as images, by their ending in lower case; a note tells of others in a folder of images."""
_NO_IMAGES = frozenset(
    {".csv", ".db", ".htm", ".html", ".ini", ".json", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
)
"""Endings of files that lie among images and are none: no note tells of them."""

CIFAR10_JPEG = "cifar10-jpeg"
"""The folder with CIFAR-10 as JPEG files, on which the studies run."""

Listing = list[tuple[str, int]]
"""The images of a part: path relative to `root`, with `/`, and class."""


@dataclass(frozen=True)
class ImageFolder:
    """The images in a folder of `root`, whose classes are not known yet."""

    root: Path
    name: str
    """The folder, relative to `root`; empty for `root` itself."""
    folders: Mapping[str, Sequence[str]]
    """By class folder (see `composed`), sorted: the images in it and in its sub-folders, sorted."""
    loose: Sequence[str]
    """Images beside class folders, sorted."""
    notes: tuple[str, ...]
    """What was seen and is left out, a line for each rule."""

    @property
    def images(self) -> list[str]:
        """All of them, sorted."""
        return sorted([*self.loose, *(path for paths in self.folders.values() for path in paths)])

    @property
    def place(self) -> str:
        """The folder, as errors show it."""
        return repr(str(self.root / self.name))

    @property
    def inside(self) -> str:
        """The folder, after what lies in it."""
        return f" in {self.name}" if self.name else ""


def scan(root: Path, name: str = "") -> ImageFolder:
    """List the images in the folder `root/name`, or in `root` itself. Links are followed, but for those to a folder
    that they lie in.

    Raises:
        ValueError: A folder is missing or cannot be read, or an image is no file, as where a link leads nowhere.
    """
    if not root.is_dir():
        hint = f" (`advmoe data {root.name} --root {root.parent}` makes it)" if root.name == CIFAR10_JPEG else ""
        raise InputError(f"data.root must be a folder, got {str(root)!r}{hint}")
    if not os.path.lexists(root / name):
        raise InputError(f"data.root must hold a folder {name}, got {str(root)!r}")
    unused, above = _Unused(), (_identity(root), _identity(root / name))
    folders: dict[str, list[str]] = {}
    loose: list[str] = []
    for entry in _entries(root, name):
        path, hidden = f"{name}/{entry.name}".lstrip("/"), entry.name.startswith(".")
        if not _is(entry.is_dir):
            _sort(entry, path, hidden, loose, unused)
        elif hidden:
            _walk(root, path, True, above, unused)
        else:
            folders.setdefault(composed(entry.name), []).extend(_walk(root, path, False, above, unused))
    return ImageFolder(
        root,
        name,
        {each: sorted(folders[each]) for each in sorted(folders)},
        sorted(loose),
        unused.notes(name or "data.root"),
    )


def class_names(part: ImageFolder) -> list[str]:
    """Return the names of the class folders, sorted; each must hold an image, and no image may lie beside them."""
    if part.loose:
        rule = f"hold the images of {part.name or 'root'} in class folders"
        raise InputError(f"data.root must {rule}, got {len(part.loose)} beside them: {few(map(repr, part.loose))}")
    if not part.folders:
        raise InputError(f"data.root must hold class folders{part.inside}, got none in {part.place}")
    require_filled(part, part.folders)
    return list(part.folders)


def require_filled(part: ImageFolder, folders: Iterable[str]) -> None:
    """Raise `ValueError` where one of these class folders is missing or holds no image."""
    if (empty := next((name for name in folders if not part.folders.get(name)), None)) is not None:
        rule = f"hold at least one image in {PurePosixPath(part.name, empty)}"
        raise InputError(f"data.root must {rule}, got none in {str(part.root / part.name / empty)!r}")


def by_class(part: ImageFolder, classes: Sequence[str]) -> Listing:
    """Return the images of the class folders, sorted by class and path; classes may be missing."""
    if unknown := next(iter(sorted(set(part.folders) - set(classes))), None):
        rule = f"have only classes of train in {part.name}"
        raise InputError(f"data.root must {rule}, got {unknown!r} in {part.place}")
    return [(path, label) for label, name in enumerate(classes) for path in part.folders.get(name, ())]


def composed(name: str) -> str:
    """A file's name with every accented letter as one character (NFC), from bytes taken for UTF-8 whatever the locale:
    what one system stores and another reads is one name.
    """
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do, in either case."""
    return _ending(name) in EXTENSIONS


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition(".")  # several times faster than splitext, for each of a million files
    return f".{ending.lower()}" if dot else ""


def left_out(part: str, number: int, what: str, rule: str, shown: Iterable[str] = ()) -> str:
    """A note: how many images or files of a part are not used, by which rule, and the names of a few."""
    told = few(shown)
    return f"{part}: {number} {what}{'s' * (number != 1)} left out ({rule}){': ' if told else ''}{told}"


def read_lines(root: Path, name: str) -> list[str]:
    """Return the lines of the text file `root/name`, without empty ones and without blanks at their ends.

    UTF-8, or UTF-16 where a byte-order mark says so; lines end as on any system.
    """
    try:
        content = (root / name).read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"data.root must hold {name}, got {str(root)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.root must hold a readable {name}, got {one_line(error)}") from error
    # splitlines() would also cut at rare characters that a name may hold.
    return [unicodedata.normalize("NFC", line.rstrip()) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


@dataclass
class _Unused:
    """Files that are seen and not used."""

    hidden: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)

    def notes(self, part: str) -> tuple[str, ...]:
        notes = []
        if self.hidden:
            rule = "a file's or a folder's name begins with a dot"
            notes.append(left_out(part, len(self.hidden), "image", rule, map(repr, sorted(self.hidden))))
        if self.endings:
            rule = f"the name's ending is none of {', '.join(sorted(EXTENSIONS))}"
            kinds = [f"{count} {repr(ending) if ending else 'without'}" for ending, count in self.endings.most_common()]
            notes.append(left_out(part, self.endings.total(), "file", rule, kinds))
        return tuple(notes)


def _walk(root: Path, folder: str, hidden: bool, above: tuple[tuple[int, int], ...], unused: _Unused) -> list[str]:
    """Return the images in `folder` and below; `above` identifies the folders that it lies in."""
    images: list[str] = []
    pending = [(folder, hidden, above)]
    while pending:
        here, hidden, above = pending.pop()
        if (identity := _identity(root / here)) in above:
            continue
        for entry in _entries(root, here):
            path, dotted = f"{here}/{entry.name}", hidden or entry.name.startswith(".")
            if _is(entry.is_dir):
                pending.append((path, dotted, (*above, identity)))
            else:
                _sort(entry, path, dotted, images, unused)
    return images


def _sort(entry: os.DirEntry[str], path: str, hidden: bool, images: list[str], unused: _Unused) -> None:
    """Add a file to `images` or to `unused`."""
    ending = _ending(entry.name)
    if hidden:
        if ending in EXTENSIONS:
            unused.hidden.append(path)
    elif ending in _NO_IMAGES:
        return
    elif not _is(entry.is_file):  # asks the system about links alone
        what = "a link that leads nowhere" if entry.is_symlink() else "which is no file"
        raise InputError(f"data.root must hold readable files in {path.rpartition('/')[0]}, got {path!r}, {what}")
    elif ending in EXTENSIONS:
        images.append(path)
    else:
        unused.endings[ending] += 1


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"data.root must hold a readable folder {folder}, got {one_line(error)}") from error


def _identity(folder: Path) -> tuple[int, int]:
    try:
        stat = folder.stat()
    except OSError as error:
        raise InputError(f"data.root must hold readable folders, got {one_line(error)}") from error
    return stat.st_dev, stat.st_ino


def _is(kind: Callable[[], bool]) -> bool:
    """Whether an entry, or what it links to, is of a kind; a link that leads nowhere is of none."""
    try:
        return kind()
    except OSError:
        return False

"""Tiny ImageNet (Stanford CS231N) in its official layout, at 64x64 or whatever size its files have, held in memory.

Axes: `N` images, `H` their side in pixels.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path, PurePosixPath

from advmoe.data.cache import load_decoded
from advmoe.data.listing import ImageFolder, Listing, composed, left_out, read_lines, require_filled, scan
from advmoe.data.types import Request, Source
from advmoe.errors import InputError
from advmoe.text import few

FOLDER = "tiny-imagenet-200"
"""Name of the folder inside the official archive."""
_ANNOTATIONS = "val/val_annotations.txt"


def load_tiny_imagenet(request: Request) -> Source:
    """Load Tiny ImageNet, decoded at its first use (see `cache.load_decoded`).

    `root`, or `root/tiny-imagenet-200`, holds `wnids.txt`, `words.txt`, `train/<wnid>/images/*`, `val/images/*` and
    `val/val_annotations.txt`. Classes are the wnids, sorted, and are called by their words; the test set is the
    official validation set, since the official test set has no labels. Images may lie elsewhere in `train/<wnid>` and
    in `val` too, as scripts that sort them leave them. A note tells of folders of `train` that `wnids.txt` does not
    name, and of what `folder.load_folder` leaves out. `download` has no effect.

    Returns:
        Both parts, images (N, 3, H, H), in the order of class and path, and of path.

    Raises:
        ValueError: A file or folder of the layout is missing, an image of `val` has no class or a class no images, two
            images or lines are of one name, or a file cannot be decoded.
    """
    root = request.root
    if not (root / "wnids.txt").is_file() and (root / FOLDER).is_dir():
        root = root / FOLDER
    if not root.is_dir():
        raise InputError(f"data.root must be a folder, got {str(root)!r}")
    wnids = sorted(line.strip() for line in read_lines(root, "wnids.txt"))
    index = {wnid: label for label, wnid in enumerate(wnids)}
    if twice := next((wnid for wnid, after in pairwise(wnids) if wnid == after), None):
        raise InputError(f"data.root must hold wnids.txt with every wnid once, got {twice!r} twice")
    words = {
        wnid.strip(): said.strip() for line in read_lines(root, "words.txt") for wnid, _, said in [line.partition("\t")]
    }
    if unnamed := next((wnid for wnid in wnids if not words.get(wnid)), None):
        raise InputError(f"data.root must hold words.txt with words for {unnamed}, got none in {str(root)!r}")
    train, val = scan(root, "train"), scan(root, "val")
    listings = {"train": _of_wnids(train, wnids), "test": _annotated(root, val, index)}
    parts, sizes = load_decoded(root, listings, image_size=request.image_size)
    notes = (*train.notes, *_unlisted(train, index), *val.notes, *sizes)
    classes = tuple(words[wnid] for wnid in wnids)
    return Source(train=parts["train"], test=parts["test"], classes=classes, flip=True, notes=notes)


def _of_wnids(train: ImageFolder, wnids: list[str]) -> Listing:
    """Return the images of the folders that `wnids.txt` names, by class."""
    require_filled(train, wnids)
    if train.loose:
        rule = "hold the images of train in folders that wnids.txt names"
        raise InputError(f"data.root must {rule}, got {len(train.loose)} beside them: {few(map(repr, train.loose))}")
    return [(file, label) for label, wnid in enumerate(wnids) for file in train.folders[wnid]]


def _unlisted(train: ImageFolder, index: dict[str, int]) -> list[str]:
    """A note of folders of `train` that are no class."""
    names = [name for name, files in train.folders.items() if files and name not in index]
    number = sum(len(train.folders[name]) for name in names)
    return (
        [left_out("train", number, "image", "wnids.txt does not name their folders", map(repr, names))] if names else []
    )


def _annotated(root: Path, val: ImageFolder, index: dict[str, int]) -> Listing:
    """Return the images of `val`, each with the class that the annotations give its name."""
    wnid_of: dict[str, str] = {}
    for line in read_lines(root, _ANNOTATIONS):
        name, wnid = (each.strip() for each in f"{line}\t".split("\t")[:2])
        if wnid not in index:
            raise InputError(f"data.root must hold {_ANNOTATIONS} with wnids of wnids.txt, got {line!r}")
        if wnid_of.setdefault(name, wnid) != wnid:
            raise InputError(f"data.root must hold {_ANNOTATIONS} with one class for each image, got two for {name!r}")
    files: dict[str, str] = {}
    for file in val.images:
        name = composed(PurePosixPath(file).name)
        if name not in wnid_of:
            raise InputError(f"data.root must hold {_ANNOTATIONS} with a line for each image, got none for {file!r}")
        if name in files:
            raise InputError(f"data.root must hold every image of val once, got {files[name]!r} and {file!r}")
        files[name] = file
    if missing := next(iter(sorted(set(wnid_of) - set(files))), None):
        raise InputError(f"data.root must hold the images in {_ANNOTATIONS}, got no {missing!r}")
    return [(file, index[wnid_of[name]]) for name, file in files.items()]

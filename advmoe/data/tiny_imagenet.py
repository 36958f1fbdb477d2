"""Tiny ImageNet (Stanford CS231N) in its official layout, at 64x64 or whatever size it is found in, held in memory."""

from __future__ import annotations

from pathlib import Path

from advmoe.data.cache import load_decoded
from advmoe.data.listing import Listing, image_files, read_lines
from advmoe.data.types import Request, Source

FOLDER = "tiny-imagenet-200"
"""Name of the folder inside the official archive."""
_ANNOTATIONS = "val/val_annotations.txt"


def load_tiny_imagenet(request: Request) -> Source:
    """Load Tiny ImageNet, decoded at its first use (see `cache.load_decoded`).

    `root`, or `root/tiny-imagenet-200`, holds `wnids.txt`, `words.txt`, `train/<wnid>/images/*`, `val/images/*` and
    `val/val_annotations.txt`. Classes are the wnids, sorted, and are called by their words; the test set is the
    official validation set, since the official test set has no labels. `download` has no effect.

    Returns:
        Both parts, images (N, 3, H, H), in the order of class and name, and of name.

    Raises:
        ValueError: A file or folder of the layout is missing, an image of `val` has no class or a class no images, a
            file cannot be decoded, or sizes differ.
    """
    root = request.root
    if not (root / "wnids.txt").is_file() and (root / FOLDER).is_dir():
        root = root / FOLDER
    if not root.is_dir():
        raise ValueError(f"data.root must be a folder, got {str(root)!r}")
    wnids = sorted(line.strip() for line in read_lines(root, "wnids.txt"))
    index = {wnid: label for label, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in read_lines(root, "words.txt") if "\t" in line)
    if unnamed := next((wnid for wnid in wnids if wnid not in words), None):
        raise ValueError(f"data.root must hold words.txt with words for {unnamed}, got none in {str(root)!r}")
    train = [(file, label) for wnid, label in index.items() for file in image_files(root, f"train/{wnid}/images")]
    listings = {"train": train, "test": _annotated(root, index)}
    parts = load_decoded(root, listings, image_size=request.image_size)
    return Source(train=parts["train"], test=parts["test"], classes=tuple(words[w] for w in wnids), flip=True)


def _annotated(root: Path, index: dict[str, int]) -> Listing:
    """Return the images of `val`, each with the class that the annotations give it."""
    wnid_of = {}
    for line in read_lines(root, _ANNOTATIONS):
        name, _, rest = line.partition("\t")
        wnid_of[f"val/images/{name}"] = wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise ValueError(f"data.root must hold {_ANNOTATIONS} with wnids of wnids.txt, got {line!r}")
    files = image_files(root, "val/images")
    if unknown := next((file for file in files if file not in wnid_of), None):
        raise ValueError(f"data.root must hold {_ANNOTATIONS} with a line for each image, got none for {unknown!r}")
    if missing := next(iter(sorted(set(wnid_of) - set(files))), None):
        raise ValueError(f"data.root must hold the images in {_ANNOTATIONS}, got no {missing!r}")
    return [(file, index[wnid_of[file]]) for file in files]

"""ImageNet (ILSVRC2012), read from its files as they are wanted.

The training set is `train/<wnid>/*`; classes are the wnids, sorted, as in published models. The test set is the
official validation set: `val/<wnid>/*`, or `val/*` with a file that says which class each image has; of a `val` that is
sorted in part, the file tells the class of what is not. The first of these in `root`, `root/val`, `root/data`,
`root/ILSVRC2012_devkit_t12/data` counts:

`val_labels.txt`          a line per image: its file name, then its wnid, with a space, tab or comma between
`LOC_val_solution.csv`    Kaggle's: `ImageId,PredictionString`, the image's name without ending, then its wnid and boxes
`ILSVRC2012_validation_ground_truth.txt`
                          of the development kit: a number from 1 to 1000 per line, for the images sorted by name

Those numbers are the ILSVRC2012 ids, not the order of the sorted wnids. A file beside them says what they mean:
`map_clsloc.txt` (of later kits; lines such as `n02119789 1 kit_fox`) or `meta.mat`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from advmoe.data.listing import ImageFolder, Listing, by_class, class_names, composed, read_lines, scan
from advmoe.data.stream import file_set
from advmoe.data.types import Request, Source
from advmoe.errors import InputError
from advmoe.text import few, one_line

IMAGE_SIZE = 224
"""Side in pixels unless another is asked for."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Statistics of ImageNet's training pixels, red, green and blue, as torchvision publishes them with its models."""

LABEL_FILES = ("val_labels.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
"""Names of files with the classes of a flat `val`, in the order in which they are looked for."""
_PLACES = ("", "val/", "data/", "ILSVRC2012_devkit_t12/data/")
_NAMES = ("LOC_synset_mapping.txt", "words.txt")


def load_imagenet(request: Request) -> Source:
    """List ImageNet's files; they are decoded when batches are asked for (see `stream.FileSet`).

    `download` has no effect: the images must be fetched under their own terms. Images are 224x224 unless
    `image_size` says otherwise. Classes are called by their words where `root` holds `LOC_synset_mapping.txt` or
    `words.txt`, and by their wnids elsewhere. Channel statistics are the published ones.

    A note tells what `folder.load_folder` leaves out, and how many images that the label file names are not there.

    Raises:
        ValueError: A folder is missing or empty, an image of `train` lies beside class folders, an image of `val` has
            no class, two, or an unknown one, or the label file is missing or has other than one line for each image.
    """
    root = request.root
    classes = class_names(train := scan(root, "train"))
    val, notes = _validation(scan(root, "val"), classes)
    size = request.image_size or IMAGE_SIZE
    listings = by_class(train, classes), val
    parts = [file_set(root, listing, image_size=size, workers=request.workers) for listing in listings]
    words = _words(root)
    names = tuple(words.get(wnid, wnid) for wnid in classes)
    notes = (*train.notes, *notes)
    return Source(
        train=parts[0], test=parts[1], classes=names, flip=True, statistics=(MEAN, STD), notes=notes, cut="central-crop"
    )


def _validation(val: ImageFolder, classes: list[str]) -> tuple[Listing, tuple[str, ...]]:
    """Return the official validation images with their classes, whichever of them are in class folders; and notes."""
    if not val.loose:
        class_names(val)
        return by_class(val, classes), val.notes
    # Empty folders are what a script that sorts the images begins with; others may lie in a flat `val`.
    filled = replace(val, folders={name: files for name, files in val.folders.items() if files})
    listing = by_class(filled, classes)
    wnids, notes = _flat_labels(val)
    index = {wnid: label for label, wnid in enumerate(classes)}
    if unknown := next((wnid for wnid in wnids if wnid not in index), None):
        raise InputError(f"data.root must hold val images of classes of train, got {unknown!r} in {str(val.root)!r}")
    listing += [(file, index[wnid]) for file, wnid in zip(val.loose, wnids, strict=True)]
    # By name, wherever an image lies: a `val` is in one order until it is sorted.
    return sorted(listing, key=lambda each: PurePosixPath(each[0]).name), (*val.notes, *notes)


def _flat_labels(val: ImageFolder) -> tuple[list[str], list[str]]:
    """Return the wnid of each image that lies in no class folder, and notes."""
    root, files = val.root, val.images
    candidates = (f"{place}{name}" for name in LABEL_FILES for place in _PLACES)
    name = next((path for path in candidates if (root / path).is_file()), None)
    if name is None:
        rule = f"class folders in val, or beside a flat val one of {', '.join(LABEL_FILES)}"
        flat = f"{len(val.loose)} images without a class: {few(map(repr, val.loose))}"
        raise InputError(f"data.root must hold {rule}, got neither in {str(root)!r} for {flat}")
    if name.endswith(LABEL_FILES[2]):
        return _by_number(val, name), []
    wnid_of: dict[str, str] = {}
    for line in read_lines(root, name):
        words = re.findall(r'[^\s,;"]+', line)
        if len(words) > 1 and words[0] != "ImageId":
            stem = PurePosixPath(words[0].replace("\\", "/")).stem
            if wnid_of.setdefault(stem, words[1]) != words[1]:
                rule = f"hold {name} with one class for each image"
                raise InputError(f"data.root must {rule}, got {wnid_of[stem]!r} and {words[1]!r} for {stem!r}")
    if missing := next((file for file in val.loose if _stem(file) not in wnid_of), None):
        raise InputError(f"data.root must hold {name} with a line for each image of val, got none for {missing!r}")
    absent = len(set(wnid_of) - set(map(_stem, files)))
    notes = [f"val: {len(files)} images, {absent} that {name} names are not there"] if absent else []
    return [wnid_of[_stem(file)] for file in val.loose], notes


def _stem(path: str) -> str:
    return composed(PurePosixPath(path).stem)


def _by_number(val: ImageFolder, name: str) -> list[str]:
    """Return the wnid of each loose image by the development kit's file `name`: a line for every image, by name."""
    lines, files = read_lines(val.root, name), sorted(val.images, key=lambda path: PurePosixPath(path).name)
    if len(lines) != len(files):
        rule = f"a line in {name} for each image of val"
        raise InputError(f"data.root must hold {rule}, got {len(lines)} lines for {len(files)} images")
    wnids = _wnids_by_id(val.root / name)
    if unknown := next((line for line in lines if line.strip() not in wnids), None):
        raise InputError(f"data.root must hold {name} with ILSVRC2012 ids, got {unknown!r}")
    wnid_of = {file: wnids[line.strip()] for file, line in zip(files, lines, strict=True)}
    return [wnid_of[file] for file in val.loose]


def _wnids_by_id(labels: Path) -> dict[str, str]:
    """Return the wnid of each ILSVRC2012 id, from the file beside `labels` that says it."""
    text, matlab = labels.with_name("map_clsloc.txt"), labels.with_name("meta.mat")
    if text.is_file():
        return {words[1]: words[0] for line in read_lines(text.parent, text.name) if len(words := line.split()) > 1}
    if not matlab.is_file():
        rule = f"meta.mat or map_clsloc.txt beside {labels.name} (its numbers are no order of wnids)"
        raise InputError(f"data.root must hold {rule}, got neither in {str(labels.parent)!r}")
    from scipy.io import loadmat  # a dependency of scikit-learn

    try:
        synsets = loadmat(matlab, squeeze_me=True)["synsets"]
        return {str(int(each)): str(wnid) for each, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    # Damaged files raise errors of many kinds.
    except Exception as error:
        raise InputError(f"data.root must hold a readable meta.mat, got {str(matlab)!r}: {one_line(error)}") from error


def _words(root: Path) -> dict[str, str]:
    """Return the words for each wnid, if there is a file that says them."""
    name = next((name for name in _NAMES if (root / name).is_file()), None)
    lines = [] if name is None else read_lines(root, name)
    return {words[0]: words[1].strip() for line in lines if len(words := line.split(maxsplit=1)) > 1}

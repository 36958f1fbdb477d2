"""Folders of images, `root/train/<class>/*` and `root/test|val/<class>/*`, decoded once and kept as arrays.

The arrays lie in `root/.advmoe-cache`, or in the user's cache folder where `root` cannot be written. They are used as
long as every file has the name, size and time of change that it had when they were made.
Axes: `N` images, `C` channels (always 3), `H W` size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import uuid
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from advmoe.data.download import one_line
from advmoe.data.types import ImageSet, Source

if TYPE_CHECKING:
    from PIL import Image

Bytes = npt.NDArray[np.uint8]

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".jpe", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""File names that count as images, by their ending in lower case; other files in a class folder are ignored."""
CACHE_FOLDER = ".advmoe-cache"
"""Name of the cache folder inside `root`."""
# Part of the fingerprint: raise it when decoding changes, so that arrays made the old way are not used.
_CACHE_VERSION = 1
_FILES_PER_TASK = 64
# Mean bytes per file under which threads do not help: 60,000 of 1 kB took 27 s with two, 17 s with one.
_SMALL_FILE = 2**14


class Listed(NamedTuple):
    """One image file of a part, found but not read."""

    path: str
    """Relative to `root`, with `/`."""
    label: int
    size: int
    changed: int
    """Time of the last change, in nanoseconds."""


def load_folder(root: Path, *, download: bool, image_size: int | None, progress: bool) -> Source:
    """Load an image folder; the first use decodes every file, later ones open the cache.

    Classes are the sub-folders of `root/train`, sorted by name. The test set is `root/test`, or `root/val` where there
    is no `root/test`; it may lack classes. Images become RGB, turned as their EXIF data says; an alpha channel is
    dropped; 16-bit grey is scaled to 8 bits. Files with other endings than `EXTENSIONS`, names that begin with a dot,
    and folders inside class folders are ignored. `download` has no effect.

    Args:
        root: The folder.
        download: Ignored.
        image_size: Side in pixels: images are cropped to their middle square and resized (bicubic, antialiased). None
            takes them as they are, which must be square and of one size.
        progress: Whether to show a bar while decoding.

    Returns:
        Both parts, images (N, 3, H, H), sorted by class and name.

    Raises:
        ValueError: A folder is missing or empty, a test class is unknown, a file cannot be decoded, or sizes differ.
    """
    classes = _class_folders(root, "train")
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if test is None:
        raise ValueError(f"data.root must hold a folder test or val beside train, got {str(root)!r}")
    test_classes = _class_folders(root, test)
    if unknown := sorted(set(test_classes) - set(classes)):
        rule = f"have only classes of train in {test}"
        raise ValueError(f"data.root must {rule}, got {unknown[0]!r} in {str(root / test)!r}")
    index = {name: label for label, name in enumerate(classes)}
    parts = {
        "train": [file for name in classes for file in _image_files(root, f"train/{name}", index[name])],
        "test": [file for name in test_classes for file in _image_files(root, f"{test}/{name}", index[name])],
    }

    fingerprint = _fingerprint(parts, image_size)
    stem = f"{'own' if image_size is None else image_size}"
    folders = _cache_folders(root)
    arrays = next((found for folder in folders if (found := _open_cache(folder, stem, fingerprint))), None)
    if arrays is None:
        arrays = _decode_parts(root, parts, image_size, progress=progress)
        if not any(_write_cache(folder, stem, fingerprint, arrays) for folder in folders):
            tried = ", ".join(str(folder) for folder in folders)
            warnings.warn(f"the decoded images could not be kept for the next time (tried {tried})", stacklevel=2)

    def image_set(part: str) -> ImageSet:
        labels = torch.tensor([file.label for file in parts[part]], dtype=torch.int64)
        return ImageSet(torch.from_numpy(arrays[part]), labels)

    return Source(train=image_set("train"), test=image_set("test"), classes=tuple(classes), flip=True)


def _class_folders(root: Path, part: str) -> list[str]:
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


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that leads nowhere is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _image_files(root: Path, folder: str, label: int) -> list[Listed]:
    """Return the image files that lie directly in `root/folder`, sorted by name."""
    files = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                    continue
                if _is_dir(entry):
                    continue
                # Links are followed, so that a change of the file behind one is seen; a dead one is an error.
                stat = entry.stat()
                files.append(Listed(f"{folder}/{entry.name}", label, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise ValueError(f"data.root must hold readable files in {folder}, got {one_line(error)}") from error
    if not files:
        raise ValueError(f"data.root must hold at least one image in {folder}, got none in {str(root / folder)!r}")
    return sorted(files)


def _fingerprint(parts: dict[str, list[Listed]], image_size: int | None) -> str:
    """Return a digest of everything that the decoded arrays depend on."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {image_size}\n".encode())
    for part, files in parts.items():
        text = json.dumps([part, [(file.path, file.size, file.changed) for file in files]])
        digest.update(text.encode())
    return digest.hexdigest()


def _cache_folders(root: Path) -> tuple[Path, Path]:
    """Return where the arrays may lie: in `root`, else in the user's cache under a name that depends on `root`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    user = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root / CACHE_FOLDER, user / "advmoe" / key


def _open_cache(folder: Path, stem: str, fingerprint: str) -> dict[str, Bytes] | None:
    """Return the arrays kept in `folder`, or None if there are none, or not of these files, or they are damaged."""
    try:
        record = json.loads((folder / f"{stem}.json").read_text())
        if record["fingerprint"] != fingerprint:
            return None
        arrays: dict[str, Bytes] = {}
        for part in ("train", "test"):
            array = np.load(folder / f"{stem}-{fingerprint[:16]}-{part}.npy", allow_pickle=False)
            if array.dtype != np.uint8 or list(array.shape) != record[part]["shape"]:
                return None
            if zlib.crc32(array.data) != record[part]["crc32"]:
                return None
            arrays[part] = array
        return arrays
    # Whatever is wrong with files that can be made again, the answer is to make them again.
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _write_cache(folder: Path, stem: str, fingerprint: str, arrays: dict[str, Bytes]) -> bool:
    """Keep the arrays in `folder`, replacing those of the same `stem`; return whether that was possible."""
    record: dict[str, object] = {"fingerprint": fingerprint}
    kept = {f"{stem}.json"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, array in arrays.items():
            name = f"{stem}-{fingerprint[:16]}-{part}.npy"
            _write_atomically(folder / name, partial(np.save, arr=array))
            record[part] = {"shape": list(array.shape), "crc32": zlib.crc32(array.data)}
            kept.add(name)
        # Last, since this is what makes the arrays count.
        text = json.dumps(record, indent=1).encode()
        _write_atomically(folder / f"{stem}.json", lambda file: file.write(text))
        for old in folder.glob(f"{stem}-*.npy"):
            if old.name not in kept:
                old.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _write_atomically(path: Path, write: Callable[[io.BufferedWriter], object]) -> None:
    """Write a file under a name of its own, and give it its final name when it is whole."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _decode_parts(
    root: Path, parts: dict[str, list[Listed]], image_size: int | None, *, progress: bool
) -> dict[str, Bytes]:
    """Decode every file; large ones with a thread per core."""
    first = parts["train"][0].path
    shape = _decode(root / first, image_size).shape
    if shape[1] != shape[2]:
        rule = "given when images are not square"
        raise ValueError(f"data.image_size must be {rule}, got None with {_size(shape)} in {str(root / first)!r}")
    arrays = {part: np.empty((len(files), *shape), dtype=np.uint8) for part, files in parts.items()}

    def decode(part: str, start: int) -> int:
        files: Sequence[Listed] = parts[part][start : start + _FILES_PER_TASK]
        for i, file in enumerate(files, start):
            image = _decode(root / file.path, image_size)
            if image.shape != shape:
                got = f"{_size(shape)} in {str(root / first)!r} and {_size(image.shape)} in {str(root / file.path)!r}"
                raise ValueError(f"data.image_size must be given when sizes differ, got None with {got}")
            arrays[part][i] = image
        return len(files)

    total = sum(len(files) for files in parts.values())
    hidden = not (progress and sys.stderr.isatty())
    # Pillow decodes outside the interpreter's lock. With small files the work is in Python, and threads only contend.
    small = sum(file.size for files in parts.values() for file in files) < _SMALL_FILE * total
    pool = ThreadPoolExecutor(1 if small else os.cpu_count())
    try:
        tasks = [
            pool.submit(decode, part, start)
            for part, files in parts.items()
            for start in range(0, len(files), _FILES_PER_TASK)
        ]
        with tqdm(total=total, unit="image", desc="decoding", disable=hidden) as bar:
            # In the order of the files, so that the first bad one is the one reported.
            for task in tasks:
                bar.update(task.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return arrays


def _size(shape: tuple[int, ...]) -> str:
    """Return the size of an image (C, H, W) as text, width first."""
    return f"{shape[2]}x{shape[1]}"


def _decode(path: Path, image_size: int | None) -> Bytes:
    """Return one file as RGB, (3, H, W) uint8, cut to its middle square of `image_size` if that is given."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            ImageOps.exif_transpose(opened, in_place=True)
            image = _to_rgb(opened)
            image.load()
        if image_size is not None and image.size != (image_size, image_size):
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # Cropped first: with a box, Pillow's filter would take in pixels from outside of it.
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    # Pillow's decoders raise errors of many kinds; which one says nothing more than the path and its text.
    except Exception as error:
        raise ValueError(
            f"data.root must hold images that can be decoded, got {str(path)!r}: {one_line(error)}"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut values off at 255 here instead of scaling them. 65535 / 257 = 255.
        grey = (np.asarray(image).astype(np.int64) + 128) // 257
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")

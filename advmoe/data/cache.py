"""Images decoded once and stored as arrays, whatever the layout of their folder.

The arrays lie in `root/.advmoe-cache`, or in the user's cache folder where `root` cannot be written. They are used as
long as every file has the name, size and time of change that it had when it was decoded.
Axes: `N` images, `C` channels (always 3), `H W` size.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from advmoe.data.decode import Bytes, decode, middle_square
from advmoe.data.listing import Listing
from advmoe.data.types import ImageSet
from advmoe.documents import read_array
from advmoe.errors import InputError
from advmoe.files import read_object, write_array, write_text
from advmoe.progress import bar
from advmoe.text import one_line

CACHE_FOLDER = ".advmoe-cache"
"""Name of the cache folder inside `root`."""
# Part of the fingerprint: raise it when decoding changes, so that arrays of the old way are not used.
_CACHE_VERSION = 1
_FILES_PER_TASK = 64
# Mean bytes per file under which threads do not help: 60,000 of 1 kB took 27 s with two, 17 s with one.
_SMALL_FILE = 2**14


class _File(NamedTuple):
    """One image file of a part, not yet read."""

    path: str
    """Relative to `root`, with `/`."""
    size: int
    changed: int
    """Time of the last change, in nanoseconds."""


def load_decoded(root: Path, listings: dict[str, Listing], *, image_size: int | None) -> dict[str, ImageSet]:
    """Load listed files into memory; the first use decodes every file, later ones open the cache.

    Images become RGB, turned as their EXIF data says; an alpha channel is dropped; 16-bit grey is scaled to 8 bits.

    Args:
        root: The folder that paths are relative to.
        listings: The images of `train` and of `test`, at least one each.
        image_size: Side in pixels: images are cropped to their middle square and resized (bicubic, antialiased). None
            takes them as they are, which must be square and of one size.

    Returns:
        Each part, images (N, 3, H, H) in the order of its listing.

    Raises:
        ValueError: A file cannot be found or decoded, or sizes differ.
    """
    parts = {part: [_stamped(root, path) for path, _ in listing] for part, listing in listings.items()}
    fingerprint = _fingerprint(parts, image_size)
    stem = f"{'own' if image_size is None else image_size}"
    folders = _cache_folders(root)
    arrays = next(filter(None, (_open_cache(folder, stem, fingerprint) for folder in folders)), None)
    if arrays is None:
        arrays = _decode_parts(root, parts, image_size)
        if not any(_write_cache(folder, stem, fingerprint, arrays) for folder in folders):
            tried = ", ".join(str(folder) for folder in folders)
            warnings.warn(f"the decoded images could not be kept for the next time (tried {tried})", stacklevel=2)
    return {
        part: ImageSet(torch.from_numpy(arrays[part]), torch.tensor([label for _, label in listing]))
        for part, listing in listings.items()
    }


def _stamped(root: Path, path: str) -> _File:
    """Return a file with its size and time of change, which tell whether it has changed."""
    try:
        # Links are followed, so that a change of the file behind one is seen; a dead one is an error.
        stat = os.stat(root / path)
    except OSError as error:
        folder = path.rpartition("/")[0]
        raise InputError(f"data.root must hold readable files in {folder}, got {one_line(error)}") from error
    return _File(path, stat.st_size, stat.st_mtime_ns)


def _fingerprint(parts: dict[str, list[_File]], image_size: int | None) -> str:
    """Return a digest of everything that the decoded arrays depend on."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {image_size}\n".encode())
    for part, files in parts.items():
        text = json.dumps([part, files])
        digest.update(text.encode())
    return digest.hexdigest()


def _cache_folders(root: Path) -> tuple[Path, Path]:
    """Return where the arrays may lie: in `root`, else in the user's cache under a name that depends on `root`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    user = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root / CACHE_FOLDER, user / "advmoe" / key


def _open_cache(folder: Path, stem: str, fingerprint: str) -> dict[str, Bytes] | None:
    """Return the arrays in `folder`, or None if there are none, or not of these files, or they are damaged."""
    try:
        record = read_object(folder / f"{stem}.json")
        if record["fingerprint"] != fingerprint:
            return None
        arrays: dict[str, Bytes] = {}
        for part in ("train", "test"):
            array = read_array(folder / f"{stem}-{fingerprint[:16]}-{part}.npy")
            if array.dtype != np.uint8 or list(array.shape) != record[part]["shape"]:
                return None
            if zlib.crc32(array.data) != record[part]["crc32"]:
                return None
            arrays[part] = array
        return arrays
    # The arrays can be decoded again, whatever is wrong with these: for a damaged header NumPy raises errors of many
    # kinds, MemoryError among them.
    except Exception:
        return None


def _write_cache(folder: Path, stem: str, fingerprint: str, arrays: dict[str, Bytes]) -> bool:
    """Store the arrays in `folder`, replacing those of the same `stem`; return whether that was possible."""
    record: dict[str, object] = {"fingerprint": fingerprint}
    current = set[str]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, array in arrays.items():
            name = f"{stem}-{fingerprint[:16]}-{part}.npy"
            write_array(folder / name, array)
            record[part] = {"shape": list(array.shape), "crc32": zlib.crc32(array.data)}
            current.add(name)
        # Last, since this is what makes the arrays count.
        write_text(folder / f"{stem}.json", json.dumps(record, indent=1))
        for old in folder.glob(f"{stem}-*.npy"):
            if old.name not in current:
                old.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _decode_parts(root: Path, parts: dict[str, list[_File]], image_size: int | None) -> dict[str, Bytes]:
    """Decode every file; large ones with a thread per core."""
    first = parts["train"][0].path
    shape = _decode(root / first, image_size).shape
    if shape[1] != shape[2]:
        rule = "given when images are not square"
        raise InputError(f"data.image_size must be {rule}, got None with {_size(shape)} in {str(root / first)!r}")
    arrays = {part: np.empty((len(files), *shape), dtype=np.uint8) for part, files in parts.items()}

    def decode(part: str, start: int) -> int:
        files: Sequence[_File] = parts[part][start : start + _FILES_PER_TASK]
        for i, file in enumerate(files, start):
            image = _decode(root / file.path, image_size)
            if image.shape != shape:
                got = f"{_size(shape)} in {str(root / first)!r} and {_size(image.shape)} in {str(root / file.path)!r}"
                raise InputError(f"data.image_size must be given when sizes differ, got None with {got}")
            arrays[part][i] = image
        return len(files)

    total = sum(len(files) for files in parts.values())
    # Pillow decodes outside the interpreter's lock. With small files the work is in Python, and threads only contend.
    small = sum(file.size for files in parts.values() for file in files) < _SMALL_FILE * total
    pool = ThreadPoolExecutor(1 if small else os.cpu_count())
    try:
        tasks = [
            pool.submit(decode, part, start)
            for part, files in parts.items()
            for start in range(0, len(files), _FILES_PER_TASK)
        ]
        with bar("decoding", total, unit="image") as drawn:
            # In the order of the files, so that the first bad one is the one reported.
            for task in tasks:
                drawn.update(task.result())
    finally:
        pool.shutdown(cancel_futures=True)
    return arrays


def _size(shape: tuple[int, ...]) -> str:
    """Return the size of an image (C, H, W) as text, width first."""
    return f"{shape[2]}x{shape[1]}"


def _decode(path: Path, image_size: int | None) -> Bytes:
    """Return one file as RGB, (3, H, W) uint8, cut to its middle square of `image_size` if that is given."""
    return decode(path, None if image_size is None else middle_square(image_size)).transpose(2, 0, 1)

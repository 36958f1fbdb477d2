"""Images decoded once and stored as arrays, whatever the layout of their folder.

The arrays lie in `root/.advmoe-cache`, or in the user's cache folder where `root` cannot be written; and in a folder of
this machine, if `ADVMOE_CACHE` names one, which is read first. They are used as long as every file has the name, size
and time of change that it had when it was decoded. Of several processes one decodes, and the others wait for it.
Axes: `N` images, `C` channels (always 3), `H W` size.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from advmoe.data.listing import Listing
from advmoe.data.types import ImageSet
from advmoe.decode import Bytes, decode, middle_square, shorter_side
from advmoe.documents import read_array
from advmoe.errors import InputError
from advmoe.files import read_object, write_array, write_text
from advmoe.locks import hold
from advmoe.progress import bar, tracked
from advmoe.text import one_line

CACHE_FOLDER = ".advmoe-cache"
"""Name of the cache folder inside `root`."""
# Part of the fingerprint: raise it when decoding changes, so that arrays of the old way are not used.
_CACHE_VERSION = 1
_FILES_PER_TASK = 64
SIDES = (32, 64, 128, 224)
"""Sides in pixels that images of several sizes, or of none that is square, are brought to."""
# Mean bytes per file under which threads do not help: 60,000 of 1 kB took 27 s with two, 17 s with one.
_SMALL_FILE = 2**14


class _File(NamedTuple):
    """One image file of a part, not yet read."""

    path: str
    """Relative to `root`, with `/`."""
    size: int
    changed: int
    """Time of the last change, in nanoseconds."""


class Decoded(NamedTuple):
    """Listed images in memory."""

    parts: dict[str, ImageSet]
    notes: tuple[str, ...]
    """Which size was chosen for them, where that was left to this module."""


class _NotOfOneSize(Exception):
    """Images that make no array as they are."""


def load_decoded(root: Path, listings: dict[str, Listing], *, image_size: int | None) -> Decoded:
    """Load listed files into memory; the first use decodes every file, later ones open the cache.

    Images become RGB, turned as their EXIF data says; an alpha channel is dropped; 16-bit grey is scaled to 8 bits.

    Args:
        root: The folder that paths are relative to.
        listings: The images of `train` and of `test`, at least one each.
        image_size: Side in pixels: images are cropped to their middle square and resized (bicubic, antialiased). None
            takes squares of one size, of 224 pixels at most, as they are; for others it is the largest of `SIDES`
            that most of them fill.

    Returns:
        Each part, images (N, 3, H, H) in the order of its listing.

    Raises:
        ValueError: A file cannot be found or decoded.
    """
    parts = {part: [_stamped(root, path) for path, _ in listing] for part, listing in listings.items()}
    fingerprint = _fingerprint(parts, image_size)
    stem = f"{'own' if image_size is None else image_size}"
    node = _node_folder(root)
    cached = None if node is None else _open_cache(node, stem, fingerprint)
    if cached is None:
        cached = _shared(root, parts, image_size, stem, fingerprint)
        if node is not None:
            with _alone((node,), stem):
                _write_cache(node, stem, fingerprint, *cached)
    arrays, note = cached
    images = {
        part: ImageSet(torch.from_numpy(arrays[part]), torch.tensor([label for _, label in listing]))
        for part, listing in listings.items()
    }
    return Decoded(images, () if note is None else (note,))


def _shared(
    root: Path, parts: dict[str, list[_File]], image_size: int | None, stem: str, fingerprint: str
) -> tuple[dict[str, Bytes], str | None]:
    """Return the arrays that all machines share, decoded and stored where there are none yet, and the note on them."""
    folders = _cache_folders(root)
    cached = _found(folders, stem, fingerprint)
    if cached is not None:
        return cached
    with _alone(folders, stem):
        cached = _found(folders, stem, fingerprint)  # of another process, for which this one waited
        if cached is not None:
            return cached
        arrays, note = _decode_parts(root, parts, image_size)
        if not any(_write_cache(folder, stem, fingerprint, arrays, note) for folder in folders):
            tried = ", ".join(str(folder) for folder in folders)
            warnings.warn(f"the decoded images could not be kept for the next time (tried {tried})", stacklevel=3)
        return arrays, note


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


def _cache_folders(root: Path) -> tuple[Path, ...]:
    """Return where the arrays may lie: in `root`, else in the user's cache under a name that depends on `root`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    user = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return root / CACHE_FOLDER, user / "advmoe" / _key(root)


def _node_folder(root: Path) -> Path | None:
    """Return where the arrays may lie on this machine alone, if the user names a place. Raises `ValueError` for a
    relative one, which would be another in every folder.
    """
    place = os.environ.get("ADVMOE_CACHE", "")
    if place and not os.path.isabs(place):
        raise InputError(f"ADVMOE_CACHE must be an absolute path, got {place!r}")
    return Path(place) / _key(root) if place else None


def _key(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


@contextmanager
def _alone(folders: Sequence[Path], stem: str) -> Iterator[None]:
    """Inside, no other process makes these arrays, where one of `folders` can hold a lock."""
    lock = None
    for file in (folder / f"{stem}.lock" for folder in folders):
        with suppress(OSError, InputError):
            lock = hold(file, wait=True)
            break
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):
                file.unlink()  # `hold` sees that what it locked is gone
                file.parent.rmdir()  # where nothing came of it
            lock.close()


def _found(folders: Sequence[Path], stem: str, fingerprint: str) -> tuple[dict[str, Bytes], str | None] | None:
    """Return what the first of `folders` holds that has the arrays."""
    return next(filter(None, (_open_cache(folder, stem, fingerprint) for folder in folders)), None)


def _open_cache(folder: Path, stem: str, fingerprint: str) -> tuple[dict[str, Bytes], str | None] | None:
    """Return the arrays in `folder`, and the note on them, or None if there are none, or not of these files, or they
    are damaged.
    """
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
        note = record.get("note")
        return arrays, None if note is None else str(note)
    # The arrays can be decoded again, whatever is wrong with these: for a damaged header NumPy raises errors of many
    # kinds, MemoryError among them.
    except Exception:
        return None


def _write_cache(folder: Path, stem: str, fingerprint: str, arrays: dict[str, Bytes], note: str | None) -> bool:
    """Store the arrays in `folder`, replacing those of the same `stem`; return whether that was possible."""
    record: dict[str, object] = {"fingerprint": fingerprint, "note": note}
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


def _decode_parts(
    root: Path, parts: dict[str, list[_File]], image_size: int | None
) -> tuple[dict[str, Bytes], str | None]:
    """Decode every file; a note says which size was chosen, if one was."""
    if image_size is not None:
        return _decode_all(root, parts, image_size), None
    try:
        return _decode_all(root, parts, None), None
    except _NotOfOneSize:
        size, note = _chosen_size([root / file.path for files in parts.values() for file in files])
        return _decode_all(root, parts, size), note


def _chosen_size(paths: list[Path]) -> tuple[int, str]:
    """The largest of `SIDES` that most of these images fill, and a note on it."""
    sides = sorted(shorter_side(path) for path in tracked(paths, "sizes", unit="image"))
    size = _filled_by_most(sides)
    wide = f"{sides[0]}" if sides[0] == sides[-1] else f"{sides[0]} to {sides[-1]}"
    cut = f"cut to their middle squares, resized to {size} pixels (data.image_size)"
    return size, f"images, whose shorter sides have {wide} pixels, are {cut}"


def _filled_by_most(sides: list[int]) -> int:
    """The largest of `SIDES` that most of these shorter sides, sorted, reach."""
    middle = sides[(len(sides) - 1) // 2]  # at least as many images fill it as do not
    return max((side for side in SIDES if side <= middle), default=SIDES[0])


def usual_side(sizes: list[tuple[int, int]]) -> int:
    """The side in pixels that images of these widths and heights get where none is asked for."""
    width, height = sizes[0]
    if len(set(sizes)) == 1 and width == height <= SIDES[-1]:
        return width
    return _filled_by_most(sorted(map(min, sizes)))


def _decode_all(root: Path, parts: dict[str, list[_File]], image_size: int | None) -> dict[str, Bytes]:
    """Decode every file; large ones with a thread per core. Raises `_NotOfOneSize` where no size is given and they make
    no array as they are.
    """
    first = parts["train"][0].path
    shape = _decode(root / first, image_size).shape
    if image_size is None and not shape[1] == shape[2] <= SIDES[-1]:
        raise _NotOfOneSize
    arrays = {part: np.empty((len(files), *shape), dtype=np.uint8) for part, files in parts.items()}

    def decode(part: str, start: int) -> int:
        files: Sequence[_File] = parts[part][start : start + _FILES_PER_TASK]
        for i, file in enumerate(files, start):
            image = _decode(root / file.path, image_size)
            if image.shape != shape:
                raise _NotOfOneSize
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


def _decode(path: Path, image_size: int | None) -> Bytes:
    """Return one file as RGB, (3, H, W) uint8, cut to its middle square of `image_size` if that is given."""
    return decode(path, None if image_size is None else middle_square(image_size)).transpose(2, 0, 1)

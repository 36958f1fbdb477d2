"""Files written whole or not at all, a check that they can be written, and JSON objects read back."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from advmoe.documents import MOST_JSON, parse_object, read_text
from advmoe.errors import InputError


def sync(path: Path) -> None:
    """Wait until the system has put `path` on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(name: str, folder: Path) -> None:
    """Raise `ValueError`, which calls it `name`, unless files can be written in `folder`, which may be missing."""
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    try:
        # Tried, not asked: permissions say nothing of root's limits, of /proc or of a read-only file system.
        with tempfile.TemporaryDirectory(dir=there, prefix=".advmoe-"):
            pass
    except OSError as error:
        reason = f"{there}: {error.strerror}"
        raise InputError(f"{name} must be where files can be written, got {str(folder)!r} ({reason})") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, which then takes its place; a failure leaves `path` as it was.

    Raises `ValueError` where `path` is a folder, before anything is written.
    """
    if path.is_dir():
        raise InputError(f"{path} must be a file, got a folder")
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path, most: int = MOST_JSON, *, finite: bool = False) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises `ValueError`, which names the file, for one that holds
    anything else (see `documents.parse_json`).
    """
    return parse_object(read_text(path, most, "JSON"), str(path), finite=finite)


def write_array(path: Path, array: Any) -> None:
    """Write one NumPy array as an .npy file, whole or not at all."""
    import numpy as np

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.save(file, array)

    write_whole(path, write)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays by name as a compressed .npz file, whole or not at all."""
    import numpy as np  # here, as the command line's help does without it

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_whole(path, write)

"""What commands write, compared by what it says; and folders, compared by all that is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

TIMES = re.compile(
    r"seconds|_ms$|^ms_|_per_second$|^(speedup|started|finished|created|created_at|wall_seconds|command|passes|host|pid|checksum)$"
)
"""Names of values that differ from one run to the next."""


class Differs(Exception):
    """What was found is not what was expected."""


def _plain(value: Any) -> Any:
    """A JSON value without what differs between two equal runs."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if not TIMES.search(name)}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def tensors(path: Path) -> dict[str, Any]:
    """A safetensors file as types, shapes and bytes by name; what else its header says does not count."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: (each["dtype"], each["shape"], data[slice(*each["data_offsets"])]) for name, each in header.items()}


def content(path: Path) -> Any:
    """What a result says, without times. Raises `Differs` for a file that is not whole."""
    try:
        match path.suffix:
            case ".safetensors":
                return tensors(path)
            case ".jsonl":
                return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
            case ".json":
                return _plain(json.loads(path.read_text()))
            case ".npz":
                import numpy as np  # only here, as the soak itself starts at once without

                with np.load(path, allow_pickle=False) as arrays:
                    return {name: (arrays[name].dtype.str, arrays[name].tolist()) for name in arrays.files}
            case ".pt2":
                with zipfile.ZipFile(path) as file:
                    return file.testzip()
            case ".svg" | ".html":
                ends = path.read_text().rstrip().endswith(f"</{path.suffix[1:]}>")
                if not ends:
                    raise ValueError("it is cut off")
                return ends
            case _:
                return path.stat().st_size > 0
    except (OSError, ValueError, KeyError, struct.error, zipfile.BadZipFile) as error:
        raise Differs(f"{path.name} is not whole: {type(error).__name__}: {error}") from error


def require_same(found: Path, expected: Path, names: list[str]) -> None:
    """Raise `Differs` unless the files `names` say the same in both folders."""
    for name in names:
        if not (expected / name).exists() and not (found / name).exists():
            continue
        if content(found / name) != content(expected / name):
            raise Differs(f"{name} differs: {_first(content(found / name), content(expected / name))}")


def _first(found: Any, expected: Any, where: str = "") -> str:
    """Where two values first differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                return _first(found.get(name), expected.get(name), f"{where}.{name}")
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if one != other:
                return _first(one, other, f"{where}[{number}]")
    return f"{where}: {str(found)[:100]} for {str(expected)[:100]}"


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that is in `folder`, by path: kind, permissions, size and content. Links are not followed."""
    found: dict[str, tuple[Any, ...]] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            what: Any = None
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                large = status.st_size > 2**28
                what = status.st_mtime_ns if large else hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (kind, status.st_size if what is not None else 0, what)
    return found


def changes(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> list[str]:
    """What became of the files of a folder between two snapshots, in words."""
    gone = [f"{name} is gone" for name in before if name not in after]
    new = [f"{name} is new" for name in after if name not in before]
    other = [f"{name} is changed" for name in before if name in after and before[name] != after[name]]
    return [*gone, *new, *other]

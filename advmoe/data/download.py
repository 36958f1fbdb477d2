"""Fetch one file over HTTP: resumed where it stopped, and never under its final name before its checksum is right."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from advmoe.errors import InputError
from advmoe.files import checksum
from advmoe.locks import exclusive
from advmoe.progress import bar
from advmoe.text import one_line

TRIES = 4
"""Requests made for a file before giving up; each goes on where the last one stopped."""
TIMEOUT = 30.0
"""Seconds without an answer after which a request is given up."""
_BLOCK = 2**20


def file_md5(path: Path) -> str:
    """Return a file's md5 as hexadecimal text."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_CHECKSUMS = {"md5": file_md5, "sha256": checksum}


def fetch(
    url: str, path: Path, expected: str, *, kind: str = "md5", fields: tuple[str, str] = ("data.download", "data.root")
) -> None:
    """Download `url` to `path`, through `<path>.part`: a later call goes on from there if this one is cut off.

    Of two processes that download the same file, the second waits for the first.

    Args:
        url: Where the file is.
        path: Final name; it appears at once, whole and with the right checksum.
        expected: The checksum that the file must have.
        kind: Of the checksum, `md5` or `sha256`.
        fields: What messages call the download and the folder.

    Raises:
        ValueError: The folder cannot be written, the server cannot be reached or stops early every time (what came is
            kept), or the checksum is wrong (what came is removed).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{fields[1]} must be a folder to download to, got {str(path.parent)!r}: {error}") from error
    with exclusive(lock := path.with_name(f".{path.name}.lock")):
        try:
            if not (path.is_file() and _CHECKSUMS[kind](path) == expected):
                _fetch(url, path, expected, kind, fields[0])
        finally:
            lock.unlink(missing_ok=True)


def _fetch(url: str, path: Path, expected: str, kind: str, field: str) -> None:
    part = path.with_name(path.name + ".part")
    reason = "an early end"
    for _ in range(TRIES):
        try:
            if _receive(url, part, lambda: _CHECKSUMS[kind](part) == expected):
                break
        except ValueError as error:  # of an address that is none
            raise InputError(f"{field} must name an address, got {url!r}: {one_line(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = one_line(error)
            if isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500:
                raise InputError(f"{field} must find {url}, got {reason}") from error
    else:
        received = part.stat().st_size if part.exists() else 0
        raise InputError(f"{field} must reach the end of {url}, got {received} bytes (kept), then {reason}")
    if (got := _CHECKSUMS[kind](part)) != expected:
        part.unlink()
        raise InputError(
            f"{field} must fetch {path.name} with {kind} {expected}, got {kind} {got} from {url} (removed)"
        )
    os.replace(part, path)


def _receive(url: str, part: Path, whole: Callable[[], bool]) -> bool:
    """Make one request and write what it brings to `part`; return whether that is the end of the file. `whole` says
    whether `part` is the file.
    """
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # The server has nothing after `start`: the part is either the whole file, or not a beginning of it.
        if whole():
            return True
        part.unlink()
        return False
    with response:
        if response.status != 206:
            start = 0  # Range ignored: the file comes whole.
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            return False
        length = response.headers.get("Content-Length")
        end = None if length is None else start + int(length)
        drawn = bar(part.stem, end, unit="B", done=start, unit_scale=True)
        with drawn, part.open("ab" if start else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                start += len(block)
                drawn.update(len(block))
    return end is None or start == end

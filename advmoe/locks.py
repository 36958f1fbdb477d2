"""Files and folders that one process has to itself: by a lock of the system's, or by a claim beside them where the file
system has no locks.

A claim is a file that names its process, which touches it from time to time (its heartbeat). It is taken over when that
process is gone: of this host that can be told at once, of another when the file has not been touched for long.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.errors import InputError
from advmoe.progress import tell

CLAIM = ".claim"
"""The name of a folder's claim, and what a file's ends in: no content of the folder's."""
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_PAUSE = 1.0
"""Seconds between two looks at what another process has."""
BEAT = 30.0
"""Seconds between two heartbeats of a claim."""
_MISSED = 10
"""Heartbeats that are missed by a process that is gone."""


class Hold:
    """A lock on a path, until `close` or the process's end."""

    def __init__(self, descriptor: int, claim: Path | None) -> None:
        self._descriptor, self._claim, self._closed = descriptor, claim, threading.Event()
        if claim is not None:
            threading.Thread(target=_beat, args=(claim, claim.stat().st_ino, self._closed), daemon=True).start()

    def close(self) -> None:
        """Release the lock."""
        self._closed.set()
        if self._claim is not None:
            self._claim.unlink(missing_ok=True)
            self._claim = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hold(path: Path, *, folder: bool = False, wait: bool = False) -> Hold | None:
    """Lock `path`, a file or a `folder`, which may be missing, until the hold is closed. None where another process has
    it; with `wait` this waits until none has.

    Raises `ValueError` for a link, and for what is neither a file nor a folder; and, without `wait`, where a process of
    another host has it, or seems to.
    """
    waited = False
    while True:
        attempt = _tried(path, folder, wait)
        if isinstance(attempt, Hold):
            return attempt
        if attempt is not None and not wait:
            raise InputError(f"{path} must be free of other processes, got {attempt}")
        if not wait:
            return None
        if attempt is not None and not waited:
            tell(f"note  waiting for {path}, which is another's: {attempt}")
            waited = True
        time.sleep(_PAUSE)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Inside, no other process holds the file `path`, which may be missing; waits until none does."""
    lock = hold(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.close()


def busy(path: Path) -> bool:
    """Whether another process holds the file `path` now."""
    if not path.exists():
        return False
    try:
        lock = hold(path)
    except InputError:
        return True
    if lock is not None:
        lock.close()
    return lock is None


def _tried(path: Path, folder: bool, wait: bool) -> Hold | str | None:
    """The hold; else who has `path`, in words, or None for a process of this host."""
    claim = path / CLAIM if folder else path.with_name(f"{path.name}{CLAIM}")
    while True:
        with suppress(FileNotFoundError):  # removed before it was locked
            descriptor = _opened(path, folder)
            try:
                locked = _locked(descriptor, wait=wait)
                if locked is False or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.close(descriptor)
                    if locked is False:
                        return None
                    continue
                other = _claimed(claim, make=locked is None)
                if other is None:
                    return Hold(descriptor, claim if locked is None else None)
                os.close(descriptor)
                return other or None
            except BaseException:
                with suppress(OSError):
                    os.close(descriptor)
                raise


def _opened(path: Path, folder: bool) -> int:
    if path.is_symlink():
        raise InputError(f"{path} must be no link, got one to {os.readlink(path)}")
    if os.path.lexists(path) and not (path.is_dir() if folder else path.is_file()):
        raise InputError(f"{path} must be a {'folder' if folder else 'file'}, got something else")
    (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    usual = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, usual | careful, 0o666)


def _locked(descriptor: int, *, wait: bool) -> bool | None:
    """Whether a file could be locked; None where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except ImportError:
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None
    return True


# Claims


def _claimed(claim: Path, *, make: bool) -> str | None:
    """Who has claimed the path; None where nobody has, after making a claim of ours if `make`.

    An owner is a line of text for a process that is unknown or of another host, and an empty one for one of this host.
    """
    while True:
        try:
            text = claim.read_text("utf-8") if not claim.is_symlink() else ""
        except FileNotFoundError:
            if not make or _make(claim):
                return None
            continue
        except UnicodeDecodeError:
            text = ""
        other = _owner(claim, text)
        if other is not None:
            return other
        _take(claim, text)


def _make(claim: Path) -> bool:
    """Make the claim, if nobody else has just done so."""
    try:
        descriptor = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        own = {"process": os.getpid(), "started": _started(os.getpid()), "since": since, "beat": BEAT}
        json.dump(_where() | own, file)
        file.flush()
        os.fsync(file.fileno())
    return True


def _owner(claim: Path, text: str) -> str | None:
    """Who made a claim: None for a process that is gone, an empty line for one of this host that is at work."""
    try:
        claimed = json.loads(text)
        host, boot, space, process, started, since = (
            claimed[name] for name in (*_where(), "process", "started", "since")
        )
    except (ValueError, TypeError, KeyError):
        return f"a claim that nobody can read: delete {claim} if no process is at work there"
    here = _where()
    if host == here["host"] and boot is not None and boot != here["boot"]:
        return None  # the host was started again since
    if (host, space) == (here["host"], here["space"]):
        now = _started(process) if isinstance(process, int) else None
        return None if now is None or now != started else ""
    if isinstance(beat := claimed.get("beat"), int | float) and _untouched(claim) > _MISSED * max(beat, 1.0):
        return None
    return f"process {process} of host {host} since {since}: delete {claim} if it is gone"


def _beat(claim: Path, file: int, closed: threading.Event) -> None:
    """Touch a claim, as long as it is that `file`, until it is `closed`."""
    while not closed.wait(BEAT):
        with suppress(OSError):  # one missed says nothing
            if claim.stat().st_ino != file:
                return
            os.utime(claim)


def _untouched(claim: Path) -> float:
    """Seconds since a claim was last touched, by the clock of its file system, which may not be this host's."""
    probe = claim.with_name(f"{claim.name}.{os.getpid()}.probe")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - claim.stat().st_mtime
    except OSError:
        return 0.0


def _take(claim: Path, text: str) -> None:
    """Remove the claim of a process that is gone, unless another one has taken it over meanwhile."""
    aside = claim.with_name(f"{claim.name}.{os.getpid()}.partial")
    with suppress(FileNotFoundError):
        claim.rename(aside)
        if aside.read_text("utf-8") != text:
            aside.rename(claim)  # somebody's new one
        aside.unlink(missing_ok=True)


def _where() -> dict[str, Any]:
    """This host, since when it runs, and which of its processes can be seen from here."""
    boot = space = None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "space": space}


def _started(process: int) -> str | None:
    """When a process of this host started, in a form of the system's; None where there is none."""
    if Path("/proc/self/stat").exists():
        try:
            # What comes after the name, which may hold blanks and brackets: first the state, as the 20th the start.
            fields = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    if os.name == "nt":  # where signal 0 would end it
        return "unknown"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"

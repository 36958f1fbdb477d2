"""Compile the kernels for this machine's CPU, once, and load them.

They need a C++ compiler with OpenMP, on Linux, and a PyTorch that runs on GNU's OpenMP, whose threads they share.
Without one of these, or with `ADVMOE_NATIVE=0` in the environment, everything is computed by PyTorch alone.

A file that is not what was compiled would end the process that loads it, or worse. So a new file is loaded by another
process first, and kept with its checksum; it is loaded only where it is whole, a plain file and this user's own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from advmoe.progress import tell

SOURCE = Path(__file__).parents[1] / "csrc" / "kernels.cpp"
"""What is compiled; it includes the headers beside it."""
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
KERNELS = 3
"""What `advmoe_kernels()` of the source must say: the interface that `advmoe.ops.raw` calls."""
COMPILING_SECONDS = 120
"""How long a compiler may take."""
_LARGEST = 2**26
"""Bytes that a compiled file may have."""
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Built:
    """The kernels' functions, or why there are none."""

    functions: Any
    reason: str = ""


@cache
def built() -> Built:
    """The kernels, compiled at the first call on this machine and kept in the user's cache folder.

    Where they cannot be made though all they need is there, one line on stderr says why.
    """
    if os.environ.get("ADVMOE_NATIVE", "") == "0":
        return Built(None, "ADVMOE_NATIVE=0")
    try:
        _require_openmp()
        compiler = _compiler()
    except _Absent as error:
        return Built(None, str(error))
    except (OSError, ValueError) as error:
        return _without(error)
    try:
        return Built(_load(compiler))
    except (OSError, ValueError, _Unfit, _Hangs) as error:
        return _without(error)


def _without(error: Exception) -> Built:
    reason = " ".join("".join(each if each.isprintable() else " " for each in str(error)).split())[:200]
    if parent_process() is None:  # said once, not by each worker
        tell(f"note  no kernels, PyTorch computes everything: {reason} (ADVMOE_NATIVE=0 does without them)")
    return Built(None, reason)


class _Absent(Exception):
    """This machine lacks something that the kernels need."""


class _Unfit(Exception):
    """A compiler, or what it wrote, is no good."""


class _Hangs(Exception):
    """A compiler, or what it wrote, does not end: another try would take as long."""


def _require_openmp() -> None:
    if sys.platform != "linux":
        raise _Absent(f"not for {sys.platform}")
    # A second OpenMP would keep threads of its own, which wait for work on the same cores.
    if not _openmp():
        raise _Absent("PyTorch does not run on GNU's OpenMP")


def _openmp() -> list[str]:
    """The files of GNU's OpenMP that this process has loaded."""
    mapped = (line.split(maxsplit=5) for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines())
    files = dict.fromkeys(fields[5] for fields in mapped if len(fields) == 6)
    return [file for file in files if Path(file).name.startswith("libgomp")]


def _load(compiler: list[str]) -> Any:
    """The functions of the file in the cache, of one compiled for it or, where neither works, of one that passes."""
    name = f"kernels-{_fingerprint(compiler)}.so"
    folder = _own_folder()
    if folder is not None:
        file = folder / name
        if _is_whole(file):
            with suppress(OSError, _Unfit):
                return _opened(file)
        with suppress(OSError, _Unfit):  # the folder may be to blame: full, read-only, of another system
            return _opened(_compiled(compiler, file))
    with tempfile.TemporaryDirectory(prefix="advmoe-") as passing:
        return _opened(_compiled(compiler, Path(passing) / name))


def _compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, or the first of the usual ones."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise _Absent("no C++ compiler found")
    return [compiler]


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the compiled file depends on."""
    path = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    changed = path.stat().st_mtime_ns if path.exists() else 0
    telling = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    cpu = {
        line for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines() if line.startswith(telling)
    }
    sources = (file.read_text("utf-8") for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    parts = (
        *sources,
        *FLAGS,
        *compiler,
        str(path),
        str(changed),
        platform.machine(),
        *platform.libc_ver(),
        *sorted(cpu),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _own_folder() -> Path | None:
    """The folder of compiled files, which nobody else may write to; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache") / "advmoe" / "native"
    if not folder.is_absolute():  # nobody's home is known
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        runs = not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:
        return None
    private = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and runs else None


def _is_whole(file: Path) -> bool:
    """Whether `file` is what `_compiled` wrote, by its checksum: this user's own, plain file, not a link to one."""
    try:
        # A FIFO is not waited for.
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            own = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
            if not own or not _DIGEST < status.st_size <= _LARGEST + _DIGEST:
                return False
            content = opened.read()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _compiled(compiler: list[str], file: Path) -> Path:
    """Compile to `file`, whole or not at all: several processes may do so at once. Its checksum ends it."""
    with tempfile.TemporaryDirectory(prefix=_PASSING, dir=file.parent) as passing:
        _sweep(file.parent)
        partial = Path(passing) / file.name
        _run(f"compiling by {compiler[0]}", [*compiler, *FLAGS, str(SOURCE), "-o"], partial)
        if partial.is_symlink() or not partial.is_file() or not 0 < partial.stat().st_size <= _LARGEST:
            raise _Unfit(f"{compiler[0]} wrote no library")
        _try(partial)
        with partial.open("r+b") as opened:
            opened.write(hashlib.sha256(opened.read()).digest())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    return file


_PASSING = ".compiling-"


def _sweep(folder: Path) -> None:
    """Remove what compilers left whose process was killed."""
    for old in folder.glob(f"{_PASSING}*"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 10 * COMPILING_SECONDS:
                shutil.rmtree(old)


_TRY = """
import ctypes, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for each in sys.argv[1:]:
    library = ctypes.CDLL(each, ctypes.RTLD_GLOBAL)
library.advmoe_kernels()
"""


def _try(library: Path) -> None:
    """Have another process load a new library, beside this one's OpenMP: one that is no good may end it."""
    if sys.executable and not getattr(sys, "frozen", False):  # else what would start is no interpreter
        _run("loading the compiled library", [sys.executable, "-ISc", _TRY, *_openmp()], library)


def _run(what: str, call: list[str], file: Path) -> None:
    """Run a command, which may hang, crash or flood, on a file in a folder of a passing name.

    Raises `_Unfit`, which says `what` failed and how, unless it ends well, and `_Hangs` unless it ends in time.
    """
    said, deadline = b"", time.monotonic() + COMPILING_SECONDS
    process = subprocess.Popen(
        [*call, str(file)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        # Its end is waited for, not that of its output, which something left in the background may hold.
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise _Hangs(f"{what} took more than {COMPILING_SECONDS} s")
            said = _heard(process.stderr.fileno(), said)
        said = _heard(process.stderr.fileno(), said)
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()
    if code := process.returncode:
        lines = said.decode("utf-8", "replace").strip().splitlines() or ["failed"]
        how = next((line for line in lines if "error" in line.lower()), lines[0]).replace(f"{file.parent}/", "")
        raise _Unfit(f"{what} failed: {f'ended by signal {-code}' if code < 0 else how}")


def _heard(descriptor: int, said: bytes) -> bytes:
    """The first that came through a pipe: `said`, and what comes within a moment."""
    heard = select.poll()
    heard.register(descriptor, select.POLLIN)
    if heard.poll(50):
        if part := os.read(descriptor, 2**16):
            return (said + part)[: 2**12]
        time.sleep(0.05)  # it is closed, and what held it may go on
    return said


def _opened(file: Path) -> Any:
    """The library's functions, with what they take. Raises `_Unfit` for one of another version."""
    library = ctypes.CDLL(str(file))
    pointer, count, whole, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    takes: dict[str, tuple[Any, list[Any]]] = {
        "kernels": (whole, []),
        "score": (None, [pointer, pointer, count, pointer, pointer, whole]),
        "unscore": (None, [pointer, pointer, pointer, count, pointer, whole]),
        "gate": (None, [pointer, pointer, count, count, pointer]),
        "ungate": (None, [pointer, pointer, pointer, count, count, pointer]),
        "tiles": (whole, []),
        "pack_bf16": (count, [pointer, whole, pointer, pointer, whole]),
    }
    for dtype in ("fp32", "bf16"):
        takes |= {
            f"pool_{dtype}": (None, [pointer, count, count, count, pointer, whole]),
            f"products_{dtype}": (None, [pointer, pointer, count, count, pointer, whole]),
            f"rectify_{dtype}": (None, [*[pointer] * 6, whole]),
            f"unrectify_{dtype}": (None, [*[pointer] * 7, whole]),
            f"norm_{dtype}": (None, [*[pointer] * 5, real, *[pointer] * 5, whole]),
            f"unnorm_{dtype}": (None, [*[pointer] * 8, real, *[pointer] * 6, whole]),
            f"mix_{dtype}": (None, [pointer, pointer, count, count, pointer, pointer, whole]),
            f"unmix_{dtype}": (None, [pointer, pointer, pointer, count, count, pointer, pointer, pointer, whole]),
            f"layer_{dtype}": (None, [pointer] * 10 + [whole]),
            f"convolve_{dtype}": (count, [pointer] * 7 + [whole]),
            f"convolve_backward_{dtype}": (None, [pointer] * 8 + [whole]),
            f"unsplit_{dtype}": (None, [pointer, pointer, pointer, count, pointer, pointer, whole]),
        }
    functions: dict[str, Any] = {}
    for name, (gives, arguments) in takes.items():
        function = functions[name] = getattr(library, f"advmoe_{name}", None)
        if function is None:
            raise _Unfit(f"{file} has no {name}")
        function.argtypes, function.restype = arguments, gives
    if (version := functions["kernels"]()) != KERNELS:
        raise _Unfit(f"{file} holds kernels {version}, not {KERNELS}")
    return functions

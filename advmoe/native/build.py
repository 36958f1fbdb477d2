"""Compile the kernels for this machine's CPU, once, and load them.

They need a C++ compiler with OpenMP, on Linux, and a PyTorch that runs on GNU's OpenMP, whose threads they share.
Without one of these, or with `ADVMOE_NATIVE=0` in the environment, everything is computed by PyTorch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("kernels.cpp")
"""What is compiled; it includes the headers beside it."""
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
KERNELS = 3
"""What `advmoe_kernels()` of the source must say: the interface that `advmoe.native` calls."""
_COMPILING_SECONDS = 120


@dataclass(frozen=True)
class Built:
    """The kernels' functions, or why there are none."""

    functions: Any
    reason: str = ""


@cache
def built() -> Built:
    """The kernels, compiled at the first call on this machine and kept in the user's cache folder."""
    if os.environ.get("ADVMOE_NATIVE", "") == "0":
        return Built(None, "ADVMOE_NATIVE=0")
    try:
        return Built(_load())
    except (OSError, ValueError, subprocess.SubprocessError, _Unfit) as error:
        return Built(None, " ".join(str(error).split())[:200])


class _Unfit(Exception):
    """This machine cannot have the kernels."""


def _load() -> Any:
    if sys.platform != "linux":
        raise _Unfit(f"not for {sys.platform}")
    # A second OpenMP would keep threads of its own, which wait for work on the same cores.
    if "libgomp" not in Path("/proc/self/maps").read_text():
        raise _Unfit("PyTorch does not run on GNU's OpenMP")
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    folder = _own_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="advmoe-") as passing:
            return _opened(_compiled(compiler, Path(passing) / name))
    file = folder / name
    if file.exists():
        try:
            return _opened(file)
        except (OSError, _Unfit):
            file.unlink(missing_ok=True)
    return _opened(_compiled(compiler, file))


def _compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, or the first of the usual ones."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        raise _Unfit("no C++ compiler found")
    return [found]


def _fingerprint(compiler: list[str]) -> str:
    """Of all that the compiled file depends on."""
    path = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    changed = path.stat().st_mtime_ns if path.exists() else 0
    telling = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    cpu = {
        line for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines() if line.startswith(telling)
    }
    sources = (file.read_text("utf-8") for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    parts = (*sources, *FLAGS, *compiler, str(path), str(changed), platform.machine(), *sorted(cpu))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _own_folder() -> Path | None:
    """The folder of compiled files, which nobody else may write to; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache") / "advmoe" / "native"
    if not folder.is_absolute():  # nobody's home is known
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None


def _compiled(compiler: list[str], file: Path) -> Path:
    """Compile to `file`, whole or not at all: several processes may do so at once."""
    handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".so")
    os.close(handle)
    try:
        call = [*compiler, *FLAGS, str(SOURCE), "-o", partial]
        done = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=_COMPILING_SECONDS)
        if done.returncode:
            raise _Unfit(f"{compiler[0]}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)
    return file


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

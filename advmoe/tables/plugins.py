"""Entries from outside the package: files that the user names, and packages that register themselves.

`ADVMOE_PLUGINS` names files, separated as in PATH; `--plugin FILE.py` of a command adds to it, so that the processes
which it starts know them too. A package names a module in the entry points `advmoe.plugins`. All are executed once,
when a name is looked for that no table has, or all names are asked for.
"""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from advmoe.errors import InputError
from advmoe.text import one_line

PLUGINS = "ADVMOE_PLUGINS"
GROUP = "advmoe.plugins"

_executed: set[str] = set()


def add_plugin(path: str | os.PathLike[str]) -> None:
    """Execute the file `path`, which registers entries, here and in the processes that this one starts.

    Raises `InputError` where it is no file, or fails.
    """
    file = Path(path).expanduser().resolve()
    _execute(file)
    if str(file) not in named():
        os.environ[PLUGINS] = os.pathsep.join([*named(), str(file)])


def named() -> list[str]:
    """The files that are named as plugins."""
    return [*filter(None, os.environ.get(PLUGINS, "").split(os.pathsep))]


def executed() -> bool:
    """Whether a plugin has been executed so far."""
    return bool(_executed)


def discover() -> None:
    """Execute what is named and has not been executed yet. Raises `InputError` for what fails."""
    for name in named():
        _execute(Path(name))
    for point in entry_points(group=GROUP):
        if point.value not in _executed:
            _executed.add(point.value)
            try:
                point.load()
            except (Exception, SystemExit) as error:
                raise InputError(f"the plugin {point.name} ({point.value}) must load, got {one_line(error)}") from error


def _execute(file: Path) -> None:
    if str(file) in _executed:
        return
    if not file.is_file() or file.suffix != ".py":
        raise InputError(f"a plugin must be a Python file, got {str(file)!r}")
    # A name of its own: two files may be called alike, and what they define is found by it.
    name = f"advmoe_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py
    module = sys.modules[name] = module_from_spec(spec)
    _executed.add(str(file))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        _executed.discard(str(file))
        raise InputError(f"the plugin {str(file)!r} must run, got {one_line(error)}") from error

"""A user's own classifier, from a Python file: `path/to/model.py:factory`, and weights beside it if need be.

Loading executes that file, as running it would: it is for the user's own code. Weights are data alone: safetensors,
never a pickle.

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from advmoe.errors import InputError
from advmoe.moe.routing import require_numbered
from advmoe.text import few, in_file, one_line

Predict = Callable[[Tensor], Tensor]
"""Pixels (N, C, H, W) -> logits (N, K)."""

_numbers = itertools.count(1)
_OWN_SEED = 0x6164766D6F65


def load_classifier(spec: str, weights: str | None = None) -> Predict:
    """The classifier that `FILE.py:NAME` makes, in eval mode if it is a module.

    The file is executed the first time that this process sees it, and again only if it, or a file beside it that it
    imports, has changed. NAME is called each time: every classifier is an instance of its own.

    Args:
        spec: a Python file, and a function or class in it that takes no arguments and returns a `torch.nn.Module` or
            another callable, (N, C, H, W) pixels in [0, 1] -> (N, K) logits. The file may import what lies beside it,
            as `import layers` or `from .layers import Block`, but not later, in `forward`.
        weights: a `.safetensors` file with the module's whole state dict.

    Files of the same name, or with neighbours of the same name, do not clash. The random state of PyTorch's CPU
    generator and `sys.path` are left as they were.

    Raises `ValueError`: one line naming the file or name, the rule and the value, the file's own errors included.
    """
    file, name = _parsed(spec)
    path = Path(weights).expanduser() if weights is not None else None
    if path is not None:
        _require_weights_file(path)
    folder = _folder(file.parent)
    with torch.random.fork_rng(devices=[]), _importable(file.parent, folder):
        model = _instance(_factory(_executed(file, folder), name, spec), file, spec)
    if isinstance(model, nn.Module):
        require_numbered(model)
        if path is not None:
            _load_weights(model, path)
        model.eval()
    elif path is not None:
        raise InputError(f"weights must be left out where {spec} returns no torch.nn.Module, got {str(path)!r}")
    return model


def load_module(spec: str) -> nn.Module:
    """The module that `FILE.py:NAME` makes, as of `load_classifier`. Raises `ValueError` for another callable too."""
    model = load_classifier(spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} must return a torch.nn.Module, got an object of type {type(model).__name__}")
    return model


def file_of(spec: str) -> Path:
    """The file of `FILE.py:NAME`, which must exist."""
    return _parsed(spec)[0]


def _parsed(spec: str) -> tuple[Path, str]:
    text, _, name = spec.rpartition(":")
    if not text.endswith(".py") or not name.isidentifier():
        raise InputError(f"a classifier must be given as FILE.py:NAME, got {spec!r}")
    file = Path(text).expanduser()
    if not file.is_file():
        raise InputError(f"a classifier's file must exist, got {text!r}")
    return file.resolve(), name


@dataclass
class _Source:
    """A file that has been executed."""

    content: bytes
    module: ModuleType
    seeded: Tensor | None
    """PyTorch's random state afterwards, where the file set a seed: each instance starts from there."""


@dataclass
class _Folder:
    """What files of a folder have been executed, and what they imported from beside them."""

    package: ModuleType
    """Of those files, for relative imports."""
    sources: dict[Path, _Source] = field(default_factory=dict)
    neighbours: dict[str, ModuleType] = field(default_factory=dict)
    """Modules by their names in `sys.modules`, where they are while a file runs."""
    contents: dict[Path, bytes] = field(default_factory=dict)
    """Of the files of these and of the package's."""

    def changed(self) -> bool:
        """Whether a file that others imported is not what it was."""
        return any(not file.is_file() or file.read_bytes() != content for file, content in self.contents.items())

    def note(self) -> None:
        """Remember the contents of files that have been imported since."""
        inside = [each for name, each in list(sys.modules.items()) if name.startswith(f"{self.package.__name__}.")]
        sources = {source.module.__name__ for source in self.sources.values()}
        for module in [*self.neighbours.values(), *inside]:
            place = getattr(module, "__file__", None)
            if place is not None and module.__name__ not in sources and Path(place) not in self.contents:
                self.contents[Path(place)] = Path(place).read_bytes()


_folders: dict[Path, _Folder] = {}


def _folder(path: Path) -> _Folder:
    """What is known of the folder; nothing any more where something that was imported from it has changed."""
    known = _folders.get(path)
    if known is None or known.changed():
        package = ModuleType(f"_advmoe_source_{next(_numbers)}")
        package.__path__ = [str(path)]
        known = _folders[path] = _Folder(package)
    return known


@contextmanager
def _importable(path: Path, folder: _Folder) -> Iterator[None]:
    """Let imports find what lies beside a file; afterwards take that away, as another folder may have the same names.

    Where the folder is importable anyway, its modules are ordinary ones, and stay.
    """
    importlib.invalidate_caches()  # its listing of a folder may be older than a file just written
    if any(Path(entry or ".").resolve() == path for entry in sys.path):
        yield
        folder.note()
        return
    before, known = sys.path.copy(), set(sys.modules)
    sys.path.insert(0, str(path))
    sys.modules |= {name: module for name, module in folder.neighbours.items() if name not in known}
    try:
        yield
    finally:
        ours = {name for name in set(sys.modules) - known if _lies_in(sys.modules[name], path)}
        # By their top-level name: new submodules of a package that was there before belong to it.
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            folder.neighbours[name] = sys.modules.pop(name)
        folder.note()
        sys.path[:] = before


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Whether `module` is a file or a package directly in `folder`."""
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = spec.submodule_search_locations or [spec.origin or ""]
    return any(Path(place).parent == folder for place in places)


def _executed(file: Path, folder: _Folder) -> ModuleType:
    """The module of `file`, executed once in a process unless its content changes, in the package of its folder.

    Leaves PyTorch's random state as it was, or as the file seeds it.
    """
    content = file.read_bytes()
    known = folder.sources.get(file)
    if known is not None and known.content == content:
        if known.seeded is not None:
            torch.set_rng_state(known.seeded)
        return known.module
    number = "" if known is None else f"_{next(_numbers)}"
    name = f"{folder.package.__name__}.{file.stem.replace('.', '_')}{number}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # of a `.py` file
    module = importlib.util.module_from_spec(spec)
    # With random numbers of its own: what an instance starts from must not depend on which one is the first.
    before, there = torch.get_rng_state(), set(sys.modules)
    torch.default_generator.manual_seed(_OWN_SEED)
    sys.modules |= {folder.package.__name__: folder.package, name: module}
    try:
        # Not the loader, which may take the byte code of an older file of the same second and size.
        exec(compile(content, str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        for each in [each for each in set(sys.modules) - there if each.startswith(folder.package.__name__)]:
            del sys.modules[each]
        raise InputError(f"{file} must run without an error, got {in_file(error, file)}") from error
    seeded = torch.get_rng_state() if torch.default_generator.initial_seed() != _OWN_SEED else None
    torch.set_rng_state(before if seeded is None else seeded)
    folder.sources[file] = _Source(content, module, seeded)
    return module


def _factory(module: ModuleType, name: str, spec: str) -> Callable[[], Any]:
    """What is called `name` in `module`, if it can be called without arguments."""
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public, n=3)
        own = [known for known in public if getattr(vars(module)[known], "__module__", None) == module.__name__]
        hint = f"did you mean {' or '.join(near)}?" if near else f"it defines {few(own) or 'nothing'}"
        raise InputError(f"{spec} must name something in the file ({hint}), got {name!r}")
    value = getattr(module, name)
    if not callable(value) or isinstance(value, nn.Module):
        kind = type(value).__name__
        raise InputError(f"{spec} must be a function or class that makes the classifier, got an object of type {kind}")
    factory: Callable[[], Any] = value
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # some built-in callables have none
        return factory
    try:
        signature.bind()
    except TypeError as error:
        raise InputError(f"{spec} must take no arguments, got {name}{signature}") from error
    return factory


def _instance(factory: Callable[[], Any], file: Path, spec: str) -> Predict:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise InputError(f"{spec} must make the classifier without an error, got {in_file(error, file)}") from error
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"an object of type {type(model).__name__}"
        raise InputError(f"{spec} must return a torch.nn.Module or another callable from pixels to logits, got {got}")
    classifier: Predict = model
    return classifier


def _require_weights_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise InputError(f"weights must be a .safetensors file (a pickle can run code, so none is read), got '{path}'")
    if not path.is_file():
        raise InputError(f"weights must be a file that exists, got '{path}'")


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load `model`'s whole state from `path`, or name up to 3 entries that do not fit."""
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} must be an undamaged safetensors file, got {one_line(error)}") from error
    state = model.state_dict()
    differing = [
        f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
        for name, value in state.items()
        if name in weights and isinstance(value, Tensor) and not is_lazy(value) and weights[name].shape != value.shape
    ]
    missing = [name for name in state if name not in weights]
    unexpected = [name for name in weights if name not in state]
    for kind, names in (("no", missing), ("unexpected", unexpected), ("other shapes:", differing)):
        if names:
            raise InputError(f"{path} must hold the weights of {type(model).__name__}, got {kind} {few(names)}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path} must hold the weights of {type(model).__name__}, got {one_line(error)}") from error

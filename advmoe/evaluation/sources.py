"""A user's own classifier, from a Python file: `path/to/model.py:factory`, and weights beside it if need be.

Loading executes that file, as running it would: it is for the user's own code. Weights are data alone: safetensors,
never a pickle.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from advmoe.attacks.pgd import Predict
from advmoe.wording import few, one_line

_numbers = itertools.count(1)


def load_classifier(spec: str, weights: str | None = None) -> Predict:
    """The classifier that `FILE.py:NAME` makes, in eval mode if it is a module. Executes the file.

    Args:
        spec: a Python file, and a function or class in it that takes no arguments and returns a `torch.nn.Module` or
            another callable, (N, C, H, W) pixels in [0, 1] -> (N, K) logits. The file may import what lies beside it,
            as `import layers` or `from .layers import Block`; imports made later, in `forward`, do not find it.
        weights: a `.safetensors` file with the module's whole state dict.

    Files of the same name, or with neighbours of the same name, do not clash. The random state of PyTorch's CPU
    generator and `sys.path` are left as they were.

    Raises `ValueError`: one line naming the file or name, the rule and what was found, the file's own errors included.
    """
    file, name = _parsed(spec)
    path = Path(weights).expanduser() if weights is not None else None
    if path is not None:
        _require_weights_file(path)
    with torch.random.fork_rng(devices=[]), _importable(file.parent):
        model = _made(_factory(_executed(file), name, spec), file, spec)
    if isinstance(model, nn.Module):
        if path is not None:
            _load_weights(model, path)
        model.eval()
    elif path is not None:
        raise ValueError(f"weights must be left out where {spec} returns no torch.nn.Module, got {str(path)!r}")
    return model


def load_module(spec: str) -> nn.Module:
    """The module that `FILE.py:NAME` makes, as of `load_classifier`. Raises `ValueError` for another callable too."""
    model = load_classifier(spec)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} must return a torch.nn.Module, got an object of type {type(model).__name__}")
    return model


def file_of(spec: str) -> Path:
    """The file of `FILE.py:NAME`, which must exist."""
    return _parsed(spec)[0]


def _parsed(spec: str) -> tuple[Path, str]:
    text, _, name = spec.rpartition(":")
    if not text.endswith(".py") or not name.isidentifier():
        raise ValueError(f"a classifier must be given as FILE.py:NAME, got {spec!r}")
    file = Path(text).expanduser()
    if not file.is_file():
        raise ValueError(f"a classifier's file must exist, got {text!r}")
    return file.resolve(), name


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let imports find what lies in `folder`; afterwards forget that, for another file's neighbours of the same name.

    Where the folder is importable anyway, its modules are ordinary ones, and stay.
    """
    importlib.invalidate_caches()  # its listing of a folder may be older than a file just written
    if any(Path(entry or ".").resolve() == folder for entry in sys.path):
        yield
        return
    path, known = sys.path.copy(), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        ours = {name for name in set(sys.modules) - known if _lies_in(sys.modules[name], folder)}
        # By their top-level name: new submodules of a package that was there before belong to it.
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = path


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Whether `module` is a file or a package directly in `folder`."""
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = spec.submodule_search_locations or [spec.origin or ""]
    return any(Path(place).parent == folder for place in places)


def _executed(file: Path) -> ModuleType:
    """The module of `file`, in a package of its own: a unique name in `sys.modules`, and relative imports."""
    package = ModuleType(f"_advmoe_source_{next(_numbers)}")
    package.__path__ = [str(file.parent)]
    name = f"{package.__name__}.{file.stem.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # of a `.py` file
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {package.__name__: package, name: module}
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        for known in [known for known in sys.modules if known.partition(".")[0] == package.__name__]:
            del sys.modules[known]
        raise ValueError(f"{file} must run without an error, got {_told(error, file)}") from error
    return module


def _factory(module: ModuleType, name: str, spec: str) -> Callable[[], Any]:
    """What is called `name` in `module`, if it can be called without arguments."""
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, public, n=3)
        own = [known for known in public if getattr(vars(module)[known], "__module__", None) == module.__name__]
        hint = f"did you mean {' or '.join(near)}?" if near else f"it defines {few(own) or 'nothing'}"
        raise ValueError(f"{spec} must name something in the file ({hint}), got {name!r}")
    found = getattr(module, name)
    if not callable(found) or isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ValueError(f"{spec} must be a function or class that makes the classifier, got an object of type {kind}")
    factory: Callable[[], Any] = found
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # some built-in callables have none
        return factory
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(f"{spec} must take no arguments, got {name}{signature}") from error
    return factory


def _made(factory: Callable[[], Any], file: Path, spec: str) -> Predict:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec} must make the classifier without an error, got {_told(error, file)}") from error
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"an object of type {type(model).__name__}"
        raise ValueError(f"{spec} must return a torch.nn.Module or another callable from pixels to logits, got {got}")
    classifier: Predict = model
    return classifier


def _require_weights_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"weights must be a .safetensors file (a pickle can run code, so none is read), got '{path}'")
    if not path.is_file():
        raise ValueError(f"weights must be a file that exists, got '{path}'")


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load `model`'s whole state from `path`, or name up to 3 entries that do not fit."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be an undamaged safetensors file, got {one_line(error)}") from error
    state = model.state_dict()
    differing = [
        f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}"
        for name, value in state.items()
        if name in found and isinstance(value, Tensor) and not is_lazy(value) and found[name].shape != value.shape
    ]
    missing, unexpected = [name for name in state if name not in found], [name for name in found if name not in state]
    for kind, names in (("no", missing), ("unexpected", unexpected), ("other shapes:", differing)):
        if names:
            raise ValueError(f"{path} must hold the weights of {type(model).__name__}, got {kind} {few(names)}")
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"{path} must hold the weights of {type(model).__name__}, got {one_line(error)}") from error


def _told(error: BaseException, file: Path) -> str:
    """An error and, where it passed through `file`, the last line there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{one_line(error)}{where}"

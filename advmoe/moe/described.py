"""Type, place and shape of a parameter without its values: what a network may ask of a layer that became an MoE layer.

Axes: `R` rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.errors import InputError

KNOWN = (
    "device", "dtype", "element_size", "dim", "is_complex", "is_cuda", "is_floating_point", "itemsize",
    "layout", "ndim", "nelement", "numel", "requires_grad", "shape", "size",
)  # fmt: skip
"""What can be asked of a tensor without its values."""

_LIKE: frozenset[Callable[..., Any]] = frozenset(
    [
        Tensor.__len__, Tensor.to, Tensor.type_as, torch.empty_like, torch.full_like, torch.is_complex,
        torch.is_floating_point, torch.numel, torch.ones_like, torch.rand_like, torch.randn_like, torch.result_type,
        torch.zeros_like,
    ]
)  # fmt: skip
"""Functions that take type, place or shape from a tensor, but not its values."""


def asks_no_values(function: Callable[..., Any], arguments: Sequence[Any]) -> bool:
    """Whether a function of PyTorch, or a look at an attribute, leaves the values of its tensors alone."""
    if function in (Tensor.to, Tensor.type_as):
        return len(arguments) > 1  # of what follows the first, if that is one
    return function in _LIKE or function in _KNOWN


_KNOWN: frozenset[Any] = frozenset(
    each.__get__ if hasattr(each, "__set__") else each for each in (getattr(Tensor, name) for name in KNOWN)
)


class Described:
    """A parameter (R, ...) of a layer that an MoE layer has replaced, of which each expert has its own.

    It has a type, a place and a shape, and tensors can be made like it. Asking for its values raises `ValueError`; for
    any other attribute, `AttributeError`.
    """

    def __init__(self, like: Tensor, rows: int, name: str) -> None:
        self.__dict__.update(
            _name=name, _meta=torch.empty(rows, *like.shape[1:], dtype=like.dtype, device="meta"),
            device=like.device, is_cuda=like.is_cuda, requires_grad=like.requires_grad,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name in KNOWN:
            return getattr(self.__dict__["_meta"], name)
        raise AttributeError(f"{self._rule()}, got .{name}")

    def _rule(self) -> str:
        rule = "must not be read, as each expert has its own (leave the layer plain: `to_moe(..., skip=...)`)"
        return f"{self.__dict__['_name']} {rule}"

    def __len__(self) -> int:
        return len(self.__dict__["_meta"])

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Others made like it; nothing else."""
        arguments = [*args, *(kwargs or {}).values()]
        if not asks_no_values(func, args) or (isinstance(arguments[0], cls) and func in (Tensor.to, Tensor.type_as)):
            flat = [part for each in arguments for part in (each if isinstance(each, list | tuple) else [each])]
            described = next((each for each in flat if isinstance(each, cls)), None)
            rule = "a parameter of an MoE layer must not be read" if described is None else described._rule()
            raise InputError(f"{rule}, got {getattr(func, '__name__', func)}")
        return func(*map(_plain, args), **{name: _plain(each) for name, each in (kwargs or {}).items()})


def _plain(value: Any) -> Any:
    if not isinstance(value, Described):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _refused(name: str) -> Callable[..., Any]:
    def refuse(self: Described, *_: Any) -> Any:
        raise InputError(f"{self._rule()}, got {name}")

    return refuse


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _side in ("", "r"):
        setattr(Described, f"__{_side}{_name}__", _refused(f"__{_side}{_name}__"))
for _name in ("__neg__", "__abs__", "__getitem__", "__iter__"):
    setattr(Described, _name, _refused(_name))

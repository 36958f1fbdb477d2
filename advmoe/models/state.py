"""A module's state as weight files take it, and its digest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.rundir import MOST_HEADER, model_digest
from advmoe.text import few


def savable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` on the CPU, contiguous, each in memory of its own: tied ones under each of their names."""
    tensors, taken = dict[str, Tensor](), set[int]()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if place in taken else plain
        taken.add(place)
    return tensors


def digest(module: nn.Module) -> str:
    """The digest of a module (`rundir.model_digest`), which device and memory format do not change."""
    state = sorted(module.state_dict().items())
    entries = (
        (name, str(value.dtype), value.shape, value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, value in state
        if isinstance(value, Tensor) and not value.is_meta
    )
    return model_digest(getattr(module, "spec", None) or {}, entries)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors by name, by its header alone. Raises `SafetensorError`."""
    with path.open("rb") as file:
        told = int.from_bytes(file.read(8), "little")
    if told > MOST_HEADER:
        raise SafetensorError(f"a header of {told} bytes, where {MOST_HEADER} are the most")
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many values tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())


def require_fitting(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless the tensors of `state`, which may lie nowhere, have these names and `shapes`."""
    missing, unknown = [n for n in state if n not in shapes], [n for n in shapes if n not in state]
    other = [f"{n} {shapes[n]} for {tuple(t.shape)}" for n, t in state.items() if shapes.get(n, t.shape) != t.shape]
    for what, names in (("no", missing), ("unexpected", unknown), ("other shapes:", other)):
        if names:
            raise InputError(f"{what} {few(names)}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors`, as `savable` gives them, as safetensors. Raises `OSError` where the disk is full, say."""
    path.write_bytes(save(dict(tensors), metadata))  # a library that writes itself tells of it by errors of its own

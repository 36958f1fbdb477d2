"""Checkpoints that survive a kill at any moment: written whole or not at all, refused by name when damaged.

A checkpoint is a folder: `model.safetensors`, `state.pt` (optimisers and counters; opened with `weights_only`, so that
it runs no code), `more.safetensors` where the way of training has more to remember, and `checksums.json`, which makes
damage visible.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from advmoe.errors import InputError
from advmoe.files import checksum, read_object, sync, write_text
from advmoe.models.state import savable, write_tensors
from advmoe.rundir import WEIGHTS
from advmoe.text import one_line

_FILES, _MORE = (WEIGHTS, "state.pt"), "more.safetensors"


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are missing or not as they were written."""


@dataclass
class TrainingState:
    """What a run needs to go on: `weights` and buffers, `optimizers` states, `progress` counters, and `more`
    tensors that the way of training remembers.
    """

    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    progress: dict[str, Any]
    more: dict[str, Tensor] = field(default_factory=dict)


def save(folder: Path, checkpoint: TrainingState, *, keep_previous: bool = True) -> None:
    """Write `checkpoint` to `folder`; what stood there moves to `<folder>-previous` (or goes, without `keep_previous`).

    At every instant at least one complete checkpoint stands under one of the two names.
    """
    fresh, previous = folder.with_name(f".{folder.name}.partial"), folder.with_name(f"{folder.name}-previous")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_tensors(fresh / WEIGHTS, savable(checkpoint.weights))
    state = io.BytesIO()  # PyTorch, writing to the disk itself, hides what the system says
    torch.save({"optimizers": checkpoint.optimizers, "progress": checkpoint.progress}, state)
    (fresh / "state.pt").write_bytes(state.getbuffer())
    names = list(_FILES)
    if checkpoint.more:
        write_tensors(fresh / _MORE, savable(checkpoint.more))
        names.append(_MORE)
    write_text(fresh / "checksums.json", json.dumps({name: checksum(fresh / name) for name in names}))
    for name in names:
        sync(fresh / name)
    if folder.exists():
        if previous.exists() and not _is_sound(folder):  # then what stands under the other name is what counts
            shutil.rmtree(folder)
        else:
            shutil.rmtree(previous, ignore_errors=True)
            folder.replace(previous)
    fresh.replace(folder)
    sync(folder.parent)
    if not keep_previous:
        shutil.rmtree(previous, ignore_errors=True)


def _is_sound(folder: Path) -> bool:
    try:
        _verified(folder)
    except DamagedCheckpoint:
        return False
    return True


def _verified(folder: Path) -> dict[str, str]:
    """The checksums of the files in `folder`, which are right. Raises `DamagedCheckpoint` else."""
    try:
        expected: dict[str, str] = read_object(folder / "checksums.json")
    except OSError as error:
        raise DamagedCheckpoint(f"{folder / 'checksums.json'} must be readable, got: {error}") from error
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    for name in (*_FILES, *[_MORE] * (_MORE in expected)):
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} must exist, got nothing")
        if (actual := checksum(path)) != expected.get(name):
            raise DamagedCheckpoint(f"{path} must have checksum {expected.get(name)}, got {actual}: it is damaged")
    return expected


def load(folder: Path) -> TrainingState:
    """The checkpoint in `folder`. Raises `DamagedCheckpoint` naming the file that is missing or damaged."""
    more = _MORE in _verified(folder)
    optimizers, progress = _state(folder / "state.pt")
    remembered = load_file(folder / _MORE) if more else {}
    return TrainingState(load_file(folder / WEIGHTS), optimizers, progress, remembered)


def _state(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The optimisers' states and the counters in `state.pt`, which takes no more memory than it has bytes."""
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise InputError("compressed entries, which can be of any size")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state["optimizers"], state["progress"]
    except (ValueError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DamagedCheckpoint(f"{path} must hold a state of training, got {one_line(error)}") from error


def candidates(folder: Path) -> list[Path]:
    """What there is of `folder` and `<folder>-previous`, sound or not, the newest first."""
    return [each for each in (folder, folder.with_name(f"{folder.name}-previous")) if each.exists()]


def load_latest(folder: Path) -> TrainingState | None:
    """The newest sound checkpoint of `folder` and `<folder>-previous`; None where neither exists.

    Warns, naming the file, about one that is damaged. Raises `DamagedCheckpoint` if all that exist are.
    """
    refused: list[str] = []
    for candidate in candidates(folder):
        try:
            checkpoint = load(candidate)
        except DamagedCheckpoint as error:
            refused.append(str(error))
            continue
        for message in refused:
            warnings.warn(f"{message}; going on from {candidate.name}", stacklevel=2)
        return checkpoint
    if refused:
        raise DamagedCheckpoint("; ".join(refused))
    return None

"""Random numbers as a function of what they are for.

Every draw comes from a generator seeded by the run's seed and the draw's purpose (epoch, process, ...), so that a run
continued from a checkpoint needs no saved generator state to go on as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from advmoe.errors import InputError
from advmoe.text import show


def seed_for(*purpose: int | str) -> int:
    """A seed (63 bits) that is a hash of `purpose`: the run's seed first, then what the draws are for. Raises
    `ValueError` for what is neither a whole number, of whatever type, nor text.
    """
    digest = hashlib.sha256(repr(tuple(map(_plain, purpose))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _plain(part: object) -> int | str:
    """A number of NumPy's, say, as Python's own, which is written the same as any other of its value."""
    if isinstance(part, str):
        return str(part)
    try:
        return operator.index(part)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"a seed must be a whole number, got {show(part)}") from None


def generator_for(*purpose: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, seeded by `seed_for(*purpose)`."""
    return torch.Generator(device).manual_seed(seed_for(*purpose))


@contextmanager
def drawing_for(*purpose: int | str, device: torch.device) -> Iterator[None]:
    """Inside, what draws from PyTorch's own generators (dropout, on `device`) follows from `purpose`; these are left as
    they were.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_for(*purpose))
        yield

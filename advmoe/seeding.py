"""Random numbers as a function of what they are for.

Every draw comes from a generator seeded by the run's seed and the draw's purpose (epoch, process, ...), so that a run
continued from a checkpoint needs no saved generator state to go on as if it had never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_for(*purpose: int | str) -> int:
    """A seed (63 bits) that is a hash of `purpose`: the run's seed first, then what the draws are for."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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

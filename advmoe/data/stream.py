"""Images that stay in their files: decoded when they are wanted, ahead of time and by processes of their own.

A batch is decoded whole by one process, and each image of it draws its crop from a seed of its own, so that neither
the number of processes nor their pace changes a pixel.
Axes: `N` images, `B` batch, `C` channels (always 3), `H W` size.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from advmoe.data.augment import Variation
from advmoe.decode import central_crop, decode, random_crop
from advmoe.errors import InputError
from advmoe.seeding import seed_for
from advmoe.signals import leave_to_parent
from advmoe.text import one_line


@dataclass(frozen=True, eq=False)
class FileSet(Dataset[tuple[Tensor, int]]):
    """Labelled images in files, square and of one size once decoded; its methods are those of `ImageSet`."""

    root: Path
    """Folder that paths are relative to."""
    paths: npt.NDArray[np.bytes_]
    """File of each image, (N,): one array, since a million Python strings take several times the memory."""
    labels: Tensor
    """Class of each image, (N,) int64; on the device that batches are brought to."""
    image_size: int
    """Side in pixels that images are cropped and resized to."""
    workers: int
    """Processes that decode ahead; 0 decodes in this one, when a batch is wanted."""

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, pixels (C, H, W) float32 in [0, 1], and its class."""
        i = range(len(self))[index]
        return self.pixels(slice(i, i + 1))[0], int(self.labels[i])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels C, and size H and W, of an image."""
        return 3, self.image_size, self.image_size

    def to(self, device: torch.device | str) -> FileSet:
        """Return the same set, its batches brought to `device`."""
        return replace(self, labels=self.labels.to(device))

    def subset(self, index: Tensor) -> FileSet:
        """Return the images at `index`, (B,) int64, in that order."""
        return replace(self, paths=self.paths[index.cpu().numpy()], labels=self.labels[index])

    def pixels(self, index: Tensor | slice) -> Tensor:
        """Decode the chosen images, here and now: float32 in [0, 1], (B, C, H, W), cropped as for evaluation.

        Raises `ValueError` that names a file which cannot be decoded.
        """
        if isinstance(index, Tensor):
            index = index.cpu()
        chosen = torch.arange(len(self))[index]
        images = _unpacked(_Decoder(self.root, self.image_size)[self._files(chosen)])
        return images.to(self.labels.device).to(torch.float32).div_(255)

    def batches(
        self, plan: Iterable[Tensor], variation: Variation | None = None, start: int = 0
    ) -> Generator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, H, W) uint8, channels-last, and classes (B,), for each batch of indices in turn.

        The next two batches of every process are decoded while the caller is busy with one. Close the generator to end
        the processes before its end.

        Args:
            plan: Indices (B,) int64 of each batch.
            variation: Random crops and flips; None crops as for evaluation.
            start: Batches to leave out, which were handed out before.

        Raises:
            ValueError: A file cannot be decoded, or a process cannot run; raised at the batch that it concerns.
        """
        plan = [index.cpu() for index in plan][start:]
        device = self.labels.device
        # A daemonic process, as evaluations start them, may have no children.
        workers = 0 if multiprocessing.current_process().daemon else min(self.workers, len(plan))
        loader: DataLoader[_Decoded] = DataLoader(
            _Decoder(self.root, self.image_size),
            batch_size=None,
            # Made as they are sent.
            sampler=(self._files(index, variation, place) for place, index in enumerate(plan, start)),
            num_workers=workers,
            multiprocessing_context=_start_method() if workers else None,
            worker_init_fn=_start,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from PyTorch's global one
        )
        with _without_main():
            batches = iter(loader)
        try:
            for index in plan:
                try:
                    batch = next(batches)
                except (RuntimeError, EOFError, OSError) as error:  # each by another way for a process to end
                    rule = "a number of processes that can run (0 decodes in this one; they need shared memory)"
                    raise InputError(f"data.workers must be {rule}, got {self.workers}: {one_line(error)}") from error
                yield _unpacked(batch).to(device, non_blocking=True), self.labels[index.to(device, non_blocking=True)]
        finally:
            del batches  # which ends the processes, even where a traceback keeps this frame

    def digest(self) -> str:
        """Return what changes with a file's name, size or time of change, with a class, or with the size of images."""
        digest = hashlib.sha256(f"{self.image_size}\n".encode() + self.labels.cpu().numpy().tobytes())
        for path in self.paths:
            file = self.root / os.fsdecode(path)
            try:
                stat = file.stat()
            except OSError as error:
                raise InputError(f"data.root must hold readable files, got {one_line(error)}") from error
            digest.update(path + f"\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _files(self, index: Tensor, variation: Variation | None = None, place: int = 0) -> _BatchFiles:
        paths = tuple(self.paths[index.numpy()].tolist())
        if variation is None:
            return _BatchFiles(paths, None, False)
        seeds = tuple(seed_for(*variation.purpose, place, image) for image in index.tolist())
        return _BatchFiles(paths, seeds, variation.flip)


def file_set(root: Path, listing: Sequence[tuple[str, int]], *, image_size: int, workers: int) -> FileSet:
    """Return the set of the listed files: path relative to `root`, and class."""
    paths = np.array([os.fsencode(path) for path, _ in listing])
    labels = torch.tensor([label for _, label in listing], dtype=torch.int64)
    return FileSet(root, paths, labels, image_size, workers)


class _BatchFiles(NamedTuple):
    """A batch to be decoded, and all that it depends on: the processes do not have the set."""

    paths: tuple[bytes, ...]
    seeds: tuple[int, ...] | None
    """Of random crops; None for those of evaluation."""
    flip: bool


_Decoded = Tensor | ValueError
"""A batch, or what was wrong with a file: as a value, since PyTorch would wrap what is raised in pages of text."""


@dataclass(frozen=True)
class _Decoder(Dataset[_Decoded]):
    """Decodes batches, in this process or in one of the loader's."""

    root: Path
    image_size: int

    def __getitem__(self, batch: _BatchFiles) -> _Decoded:
        """Return images (B, C, H, W) uint8, channels-last: the order in which they are decoded."""
        images = np.empty((len(batch.paths), self.image_size, self.image_size, 3), dtype=np.uint8)
        crop = central_crop(self.image_size)
        try:
            for i, path in enumerate(batch.paths):
                if batch.seeds is not None:
                    crop = random_crop(self.image_size, batch.seeds[i], flip=batch.flip)
                images[i] = decode(self.root / os.fsdecode(path), crop)
        except ValueError as error:
            return InputError(str(error))
        return torch.from_numpy(images).permute(0, 3, 1, 2)


def _unpacked(batch: _Decoded) -> Tensor:
    if isinstance(batch, ValueError):
        raise batch
    return batch


def _start_method() -> BaseContext:
    """How the processes are started: forked from a process that has imported this module and done nothing else.

    Forking the caller itself would copy locks that its threads (OpenMP's, CUDA's) may hold; starting each from nothing
    (`spawn`, all that Windows has) imports PyTorch for each, which takes seconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, processes start without running the caller's script again.

    They need nothing of it, running it may take seconds, and without `if __name__ == "__main__":` it would fail.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(_: int) -> None:  # pragma: no cover - runs in a process of its own
    """Leave interruptions to the process that waits, end with it, and say nothing of metadata that do not matter.

    PyTorch's own watch looks at the process it was forked from, which lives as long as this one does.
    """
    leave_to_parent(terminable=True)
    warnings.filterwarnings("ignore", message="Corrupt EXIF data")

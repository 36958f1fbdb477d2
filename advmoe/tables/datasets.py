"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advmoe.tables.table import Table, lazily


@dataclass(frozen=True)
class DataSet:
    """A data set, or a layout of folders."""

    reader: Callable[..., Any]
    """`(data.types.Request) -> data.types.Source`."""
    label: str
    """What tables and pages call it."""
    streamed: bool = False
    """Whether images are read when they are wanted, by worker processes, and not held in memory."""
    hub: str | None = None
    """Its name on the Hugging Face Hub, where it is there officially."""


DATASETS: Table[DataSet] = Table(
    "data.name",
    {
        "digits": DataSet(lazily("advmoe.data.digits:load_digits"), "digits"),
        "cifar10": DataSet(lazily("advmoe.data.cifar:load_cifar10"), "CIFAR-10", hub="cifar10"),
        "cifar100": DataSet(lazily("advmoe.data.cifar:load_cifar100"), "CIFAR-100", hub="cifar100"),
        "folder": DataSet(lazily("advmoe.data.folder:load_folder"), "folder"),
        "tiny-imagenet": DataSet(lazily("advmoe.data.tiny_imagenet:load_tiny_imagenet"), "Tiny-ImageNet"),
        "imagenet": DataSet(
            lazily("advmoe.data.imagenet:load_imagenet"), "ImageNet", streamed=True, hub="imagenet-1k"
        ),
    },
)  # fmt: skip

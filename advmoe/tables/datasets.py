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
    about: str = ""
    """What it holds, and how much that is."""
    licence: str = "unknown"
    origin: str = ""
    """Where it comes from."""
    streamed: bool = False
    """Whether images are read when they are wanted, by worker processes, and not held in memory."""
    hub: str | None = None
    """Its name on the Hugging Face Hub, where it is there officially."""
    fetch: Callable[..., Any] | None = None
    """`(root) -> path`, where it can be downloaded without more ado."""


DATASETS: Table[DataSet] = Table(
    "data.name",
    {
        "digits": DataSet(
            lazily("advmoe.data.digits:load_digits"), "digits",
            about="1,797 grey digits of 8x8 pixels, 10 classes", licence="CC BY 4.0 (UCI)",
            origin="comes with scikit-learn",
        ),
        "cifar10": DataSet(
            lazily("advmoe.data.cifar:load_cifar10"), "CIFAR-10", hub="cifar10",
            about="60,000 images of 32x32 pixels, 10 classes, 170 MB", licence="none stated (Krizhevsky, 2009)",
            origin="advmoe data fetch cifar10", fetch=lazily("advmoe.data.cifar:fetch_archive", name="cifar10"),
        ),
        "cifar100": DataSet(
            lazily("advmoe.data.cifar:load_cifar100"), "CIFAR-100", hub="cifar100",
            about="60,000 images of 32x32 pixels, 100 classes, 169 MB", licence="none stated (Krizhevsky, 2009)",
            origin="advmoe data fetch cifar100", fetch=lazily("advmoe.data.cifar:fetch_archive", name="cifar100"),
        ),
        "folder": DataSet(
            lazily("advmoe.data.folder:load_folder"), "folder",
            about="your own pictures: a folder of class folders", licence="yours", origin="advmoe data check ROOT",
        ),
        "tiny-imagenet": DataSet(
            lazily("advmoe.data.tiny_imagenet:load_tiny_imagenet"), "Tiny-ImageNet",
            about="110,000 images of 64x64 pixels, 200 classes, 240 MB", licence="ImageNet's terms: research only",
            origin="cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked",
        ),
        "imagenet": DataSet(
            lazily("advmoe.data.imagenet:load_imagenet"), "ImageNet", streamed=True, hub="imagenet-1k",
            about="1,331,167 photographs, 1,000 classes, 150 GB", licence="ImageNet's terms: research only",
            origin="image-net.org, by registration; train/ and val/",
        ),
    },
)  # fmt: skip

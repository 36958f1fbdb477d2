"""The 8x8 handwritten digits that come with scikit-learn: small enough to try a whole run in seconds.

Axes: `N` images, one channel, `H W` size.
"""

from __future__ import annotations

import csv
import gzip
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from advmoe.data.types import ImageSet, Request, Source, resize

_TEST_EVERY = 5


def load_digits(request: Request) -> Source:
    """Load the 1,797 digits; every fifth image of each class, in their order, is a test image.

    Grey levels 0..16 become 0..255. Only `image_size` has an effect: the data comes with scikit-learn.
    """
    levels, labels = _levels()
    images = levels.double().mul(255 / 16).round().to(torch.uint8)[:, None]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_test[(labels == label).nonzero()[_TEST_EVERY - 1 :: _TEST_EVERY, 0]] = True
    images = resize(images, request.image_size)
    return Source(
        train=ImageSet(images[~is_test], labels[~is_test]),
        test=ImageSet(images[is_test], labels[is_test]),
        classes=tuple(str(label) for label in range(10)),
        flip=False,
    )


def _levels() -> tuple[Tensor, Tensor]:
    """Grey levels (N, H, W) of 0 to 16 and labels (N,), from scikit-learn's file where it lies as ever: importing
    scikit-learn takes two seconds.
    """
    spec = find_spec("sklearn")
    path = Path(spec.origin if spec and spec.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        from sklearn.datasets import load_digits as load

        bunch = load()
        return torch.from_numpy(bunch.images), torch.from_numpy(bunch.target).to(torch.int64)
    with gzip.open(path, "rt", newline="") as file:
        rows = torch.tensor([[int(float(value)) for value in row] for row in csv.reader(file)])
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64]

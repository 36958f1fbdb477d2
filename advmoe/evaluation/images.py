"""Images to try a model on: its run's own where they can be read, else random ones.

Axes: `N` images, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.evaluation.scoring import take
from advmoe.evaluation.subject import open_subject
from advmoe.models import Classifier
from advmoe.rundir import CONFIG
from advmoe.seeding import generator_for


def random_images(shape: tuple[int, ...], number: int = 100) -> Tensor:
    """Pixels (number, C, H, W) in [0, 1], the same at every call.

    They differ in brightness, colour and coarse shapes, and so in pathway.
    """
    channels, height, width = shape
    generator = generator_for("export", "images")
    light = torch.rand(number, channels, 1, 1, generator=generator)
    shapes = F.interpolate(torch.rand(number, channels, 4, 4, generator=generator), (height, width), mode="bilinear")
    noise = torch.rand(number, channels, height, width, generator=generator)
    return 0.5 * light + 0.3 * shapes + 0.2 * noise


def input_shape(model: Classifier) -> tuple[int, int, int]:
    """Channels C, and size H and W, of the images that `model` takes. Raises `ValueError` where it takes any size."""
    channels, size = model.spec["in_channels"], model.spec["input_size"]
    if channels is None or size is None:
        raise InputError(f"images must be given for a model without an input size, got {model.spec['name']!r}")
    return channels, size, size


def run_images(
    run: str | Path,
    model: Classifier,
    number: int,
    *,
    source: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Tensor, str]:
    """At most `number` test images (N, C, H, W) of the run, or that many random ones; and what they are, in words.

    Args: as of `Options`; nothing is downloaded. Raises `ValueError` where neither can be had.
    """
    overrides = dict(overrides or {})
    overrides["data"] = {"download": False, **overrides.get("data", {})}
    try:
        if not (Path(run) / CONFIG).is_file():
            raise InputError("the run has no config.yaml")
        subject = open_subject(run, source=source, overrides=overrides, num_examples=number, seed=0, writes=False)
        images, _ = take(subject.data, slice(0, number), torch.device("cpu"))
        if (size := model.spec["input_size"]) not in (None, images.shape[-1]):
            raise InputError(f"the model takes images of {size} x {size}, got {tuple(images.shape[2:])}")
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return random_images(input_shape(model), number), f"random images, not the run's ({reason})"
    return images, f"test images of {subject.data_name}"

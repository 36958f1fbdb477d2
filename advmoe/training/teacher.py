"""A network that another one learns from: robust soft-label distillation (RSLAD, Zi et al., ICCV 2021).

Axes: `N` batch, `C` channels, `H W` size, `K` classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from advmoe import zoo
from advmoe.config import TrainingConfig, is_source
from advmoe.data import Dataset
from advmoe.errors import InputError
from advmoe.evaluation.checks import SUM_LIMIT
from advmoe.evaluation.scoring import measuring
from advmoe.evaluation.subject import digest_of
from advmoe.models import Classifier
from advmoe.models.sources import load_classifier
from advmoe.seeding import generator_for
from advmoe.text import one_line


class Teacher:
    """A fixed network's predictions of clean images: in eval mode, in fp32 whatever the student's precision."""

    def __init__(self, network: nn.Module, digest: str | None = None) -> None:
        self.network, self.digest = network, digest
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K), detached, of clean pixels `x` (N, C, H, W), which are computed once for the same tensor: a
        batch's attack and every level on it ask for them.
        """
        if self._last is None or self._last[0] is not x:
            with measuring(self.network, x.device), torch.no_grad():
                self._last = x, self.network(x).float()
        return self._last[1]


def teacher_of(training: TrainingConfig, dataset: Dataset, device: torch.device) -> Teacher | None:
    """The teacher of a run, on `device`; None for one without. Raises `ValueError` as `load_teacher` does."""
    if training.teacher is None:
        return None
    teacher = load_teacher(training, dataset)
    teacher.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher


def load_teacher(training: TrainingConfig, dataset: Dataset) -> Teacher:
    """The network that `training.teacher` names, on the CPU. That of a `FILE.py:FACTORY` is executed.

    Raises `ValueError` of one line for one that cannot be loaded, or is not of the data's classes and channels.
    """
    name = training.teacher
    assert name is not None
    try:
        own = is_source(name)
        network = load_classifier(name, training.teacher_weights) if own else zoo.load(_named(name))
    except ValueError as error:
        raise InputError(f"training.teacher {name}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"training.teacher must be a torch.nn.Module, got a {type(network).__name__} of {name}")
    _require_fitting(name, network, dataset)
    return Teacher(network, digest_of(network))


def _named(name: str) -> str | Path:
    return name if name.startswith(zoo.PREFIX) else Path(name).expanduser()


def _require_fitting(name: str, network: nn.Module, dataset: Dataset) -> None:
    """Raise `ValueError` unless the teacher takes the data's images and knows their classes."""
    size, classes, channels = dataset.image_size, dataset.num_classes, dataset.in_channels
    if isinstance(network, Classifier):
        expected = network.spec["num_classes"], network.spec["in_channels"]
        if any(wanted not in (None, got) for wanted, got in zip(expected, (classes, channels), strict=True)):
            rule = f"of the data's (classes, channels) ({classes}, {channels})"
            raise InputError(f"training.teacher must be {rule}, got {expected} of {name}")
        theirs = tuple(network.spec.get("classes", dataset.classes))
        if theirs != dataset.classes:
            one, other = next(pair for pair in zip(dataset.classes, theirs, strict=True) if pair[0] != pair[1])
            rule = "of the data's classes in their order"
            raise InputError(f"training.teacher must be {rule}, got {other!r} for {one!r} in {name}")
        side = network.spec["input_size"]
        if side not in (None, size):
            rule = f"of the data's images, {size}x{size}"
            raise InputError(f"training.teacher must be {rule}, got one of {side}x{side}: {name}")
    x = torch.rand(8, channels, size, size, generator=generator_for(0, "teacher"))
    try:
        with measuring(network, x.device), torch.no_grad():
            first, again = network(x), network(x.clone())
    except Exception as error:
        rule = f"take the data's images, ({channels}, {size}, {size})"
        raise InputError(f"training.teacher must {rule}, got {one_line(error)} of {name}") from error
    if not isinstance(first, Tensor) or first.shape != (len(x), classes):
        got = tuple(first.shape[1:]) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise InputError(f"training.teacher must make logits of the data's {classes} classes, got {got} of {name}")
    rows = first.double()
    for wrong, got in (
        (not bool(rows.isfinite().all()), "NaN or infinite ones"),
        (bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() <= SUM_LIMIT).all()), "probabilities"),
        (not torch.allclose(first, again, rtol=1e-3, atol=1e-4), "others at each call"),
    ):
        if wrong:
            raise InputError(f"training.teacher must make finite logits, the same each time, got {got} of {name}")

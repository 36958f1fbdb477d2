"""What is wrong with images and classes: the first fault, with the rule and the value, or nothing."""

import math

import pytest
import torch

from advmoe.errors import InputError
from advmoe.faults import label_fault, outside, pixel_fault, require_attackable
from advmoe.threat import ThreatModel

HALF = torch.full((2, 1, 2, 2), 0.5)


def changed(value):
    images = HALF.clone()
    images[1, 0, 0, 1] = value
    return images


@pytest.mark.parametrize(
    ("images", "ends"),
    [
        (HALF, None), (HALF.half(), None), (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), None), (changed(1.0), None),
        (changed(1.5), "got values from 0.5 to 1.5"), (changed(-0.25), "got values from -0.25 to 0.5"),
        (changed(math.nan), "got NaN in image 1"), (HALF[0], "got (1, 2, 2)"), (HALF[:0], "got (0, 1, 2, 2)"),
        (HALF.long(), "got torch.int64"), (HALF.to(torch.complex64), "got torch.complex64"),
    ],
)  # fmt: skip
def test_pixels(images, ends):
    fault = pixel_fault(images)
    assert fault is None if ends is None else fault.endswith(ends)


@pytest.mark.parametrize(
    ("labels", "classes", "ends"),
    [
        (torch.tensor([0, 2]), 3, None), (torch.tensor([0, 200]), None, None),
        (torch.tensor([0, 200], dtype=torch.uint8), 201, None), (torch.tensor([0, 3]), 3, "in 0..2, got 3 for image 1"),
        (torch.tensor([-1, 3]), None, "in 0..K-1, got -1 for image 0"), (torch.tensor([0.0, 1.0]), 3, "torch.float32"),
        (torch.tensor([True, False]), 3, "torch.bool"), (torch.tensor([1]), 3, "got (1,)"),
        (torch.tensor([[1], [2]]), 3, "got (2, 1)"),
    ],
)  # fmt: skip
def test_labels(labels, classes, ends):
    fault = label_fault(labels, 2, classes)
    assert fault is None if ends is None else fault.endswith(ends)


def test_small_integers_do_not_wrap_around():
    assert outside(torch.tensor([232, 5], dtype=torch.uint8), 1000).tolist() == [False, False]


def test_what_may_be_attacked():
    y, threat = torch.tensor([0, 1]), ThreatModel()
    require_attackable(HALF, y, threat)
    for x, labels, given, ends in (
        (HALF, y, ("linf", 0.1), "ThreatModel(norm, eps), got ('linf', 0.1)"), (HALF, y, None, "got None"),
        (HALF.numpy(), y, threat, "got ndarray and Tensor"), (HALF, [0, 1], threat, "got Tensor and list"),
        (HALF.to(torch.uint8), y, threat, "floating-point in [0, 1], got torch.uint8"),
        (changed(2.0), y, threat, "got values from 0.5 to 2"), (HALF, y - 1, threat, "got -1 for image 0"),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            require_attackable(x, labels, given)
        assert str(error.value).endswith(ends)

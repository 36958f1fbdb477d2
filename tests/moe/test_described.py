"""What may be known of a parameter of which each expert has its own: everything but its values."""

import pytest
import torch
from torch import nn

from advmoe.moe.described import Described


@pytest.fixture
def weight():
    """Of one expert with 2 of a bank's 6 rows."""
    return Described(nn.Parameter(torch.rand(6, 3, dtype=torch.double)), 2, "the weight of layer 4")


def test_shape_type_and_place_are_those_of_one_expert(weight):
    assert weight.shape == (2, 3) and weight.size(0) == 2 and len(weight) == 2 and weight.numel() == 6
    assert weight.dtype == torch.double and weight.device == torch.device("cpu") and weight.requires_grad
    assert weight.dim() == weight.ndim == 2 and weight.is_floating_point() and not weight.is_cuda


def test_others_are_made_like_it(weight):
    zeros = torch.zeros_like(weight)
    assert zeros.shape == (2, 3) and zeros.dtype == torch.double and not zeros.any()
    assert torch.ones(1).to(weight).dtype == torch.double and torch.ones(1).type_as(weight).dtype == torch.double
    assert torch.numel(weight) == 6 and torch.is_floating_point(weight)


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w + 1, lambda w: 2 * w, lambda w: -w, lambda w: w @ torch.ones(3, 1), lambda w: w[0], list,
        torch.sum, lambda w: torch.stack([w, w]), lambda w: nn.functional.linear(torch.ones(1, 3).double(), w),
        lambda w: w.to(torch.float32),
    ],
)  # fmt: skip
def test_values_are_refused_by_name(weight, ask):
    with pytest.raises((ValueError, AttributeError), match="the weight of layer 4 must not be read, as each"):
        ask(weight)


def test_methods_that_read_values_are_no_attributes(weight):
    assert not hasattr(weight, "sum") and not hasattr(weight, "data")

"""How a model computes its experts, by device and by what is asked for."""

import pytest
import torch
from torch import nn

from advmoe.models.compute import compute_on, set_compute
from advmoe.moe import MoEConv2d


@pytest.mark.parametrize(
    ("device", "wanted", "experts", "expected"),
    [
        ("cpu", "auto", 2, "dispatch"), ("cuda", "auto", 2, "masked"), ("cuda", "auto", 4, "masked"),
        ("cuda", "auto", 5, "dispatch"), ("cuda", "dispatch", 2, "dispatch"), ("cpu", "masked", 8, "masked"),
    ],
)  # fmt: skip
def test_a_gpu_computes_few_experts_masked(device, wanted, experts, expected):
    assert compute_on(torch.device(device), wanted, experts) == expected


def test_every_layer_computes_by_its_own_number_of_experts():
    few, many = (MoEConv2d(2, 2, 1, bank_rows=2 * number, num_experts=number, layer=0) for number in (4, 5))
    model = nn.Sequential(few, nn.Conv2d(2, 2, 1), many)
    for device, wanted, expected in (("cuda", "auto", (True, False)), ("cpu", "masked", (True, True)),
                                     ("cpu", "auto", (False, False))):  # fmt: skip
        set_compute(model, wanted, torch.device(device))
        assert (few.masks, many.masks) == expected

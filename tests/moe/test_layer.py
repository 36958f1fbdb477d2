"""What all MoE layers share: whose rows are whose, and what of the banks one pathway leaves unused."""

import pytest
import torch
from torch import nn

from advmoe.moe import MoELinear, route
from advmoe.moe.layer import windows
from advmoe.moe.routing import require_numbered


@pytest.mark.parametrize(
    ("bank", "window", "experts", "expected"),
    [
        (8, 4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # r = 1/2: disjoint halves
        (6, 6, 2, [[0, 1, 2, 3, 4, 5]] * 2),  # r = 1: all the same
        (8, 4, 3, [[0, 1, 2, 3], [2, 3, 4, 5], [0, 5, 6, 7]]),  # starts 0, 8/3, 16/3; the last wraps around
        (9, 6, 3, [[0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 1, 2, 6, 7, 8]]),
        (8, 2, 2, [[0, 1], [4, 5]]),  # r N < 1: some rows belong to nobody
        (4, 4, 1, [[0, 1, 2, 3]]),
    ],
)
def test_windows_by_hand(bank, window, experts, expected):
    assert windows(bank, window, experts) == expected


def linear(**kwargs):
    torch.manual_seed(0)
    layer = MoELinear(3, 2, **{"bank_rows": 4, "num_experts": 2, "layer": 5, "bias": False, **kwargs})
    layer.router = None  # scores are made ahead
    return layer


def test_rows_of_an_expert_are_a_view_where_they_lie_together():
    layer = linear(bank_rows=5, num_experts=3)  # starts 0, 5/3 and 10/3
    assert layer.rows == [[0, 1], [1, 2], [3, 4]]
    bank = torch.arange(5.0)
    assert [layer.of_expert(e, bank).tolist() for e in range(3)] == [[0.0, 1.0], [1.0, 2.0], [3.0, 4.0]]
    assert layer.of_expert(1, bank).data_ptr() == bank[1:].data_ptr()
    wrapping = linear(bank_rows=3, num_experts=3)
    assert wrapping.rows[2] == [0, 2] and wrapping.of_expert(2, bank[:3]).tolist() == [0.0, 2.0]


def test_what_a_pathway_leaves_unused_is_counted():
    # Of 4 rows of 3 weights and a bias each, an expert has 2.
    assert linear(bias=True).idle_parameters() == 2 * 3 + 2
    assert linear(bank_rows=2).idle_parameters() == 0  # both experts are the whole bank


def test_experts_copied_from_the_first_are_equal_and_overlapping_ones_are_refused():
    layer = linear()
    layer.copy_first_expert()
    assert torch.equal(layer.bank[:2], layer.bank[2:])
    with pytest.raises(ValueError, match=r"experts_init must be independent where .*3 experts of 2 of 5 channels"):
        linear(bank_rows=5, num_experts=3).copy_first_expert()


def test_scores_made_ahead_decide_for_a_layer_without_a_router():
    layer, x = linear(layer=0), torch.eye(3)
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    with torch.no_grad(), route() as routing:
        routing.shared = [scores]
        y = layer(x)
    assert routing.pathway().tolist() == [[0], [1], [1]]
    assert torch.equal(y, torch.stack([layer.bank[:2, 0], layer.bank[2:, 1], layer.bank[2:, 2]]))


def test_a_batch_of_another_length_than_its_scores_is_named():
    with route() as routing, pytest.raises(ValueError, match=r"MoE layer 0 must get one row for each of the 2 images"):
        routing.shared = [torch.zeros(2, 2)]
        linear(layer=0)(torch.rand(6, 3))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("num_experts", 0, 1), ("num_experts", 2.0, 1), ("num_experts", True, 1), ("layer", -1, 0), ("layer", "a", 0),
     ("layer", 1.5, 0), ("bank_rows", 1, 2), ("bank_rows", 0, 2)],
)  # fmt: skip
def test_what_no_layer_can_be(name, value, least):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number >= {least}, got {value!r}$"):
        linear(**{name: value})


def test_layers_of_a_network_are_numbered_once():
    require_numbered(nn.Sequential(linear(layer=1), linear(layer=0), nn.ReLU()))
    for numbers, told in (((0, 0, 1), "0, 0, 1"), ((5, 0), "0, 5"), ((1,), "1")):
        with pytest.raises(ValueError, match=rf"must be numbered 0, 1, 2, .* once, got {told}$"):
            require_numbered(nn.Sequential(*(linear(layer=number) for number in numbers)))

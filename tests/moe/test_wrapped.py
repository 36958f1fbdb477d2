"""A layer of somebody else's as an MoE layer: each expert is a copy of it, computed by its own forward."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.moe import route
from advmoe.moe.wrapped import MoEWrapped


class Standardised(nn.Conv2d):
    """A convolution whose filters have mean 0."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return MoEWrapped(Standardised(3, 4, 3), 3, num_experts=2, layer=0).eval()


def test_every_expert_begins_as_a_copy():
    torch.manual_seed(0)
    inner = Standardised(3, 4, 3)
    layer, x = MoEWrapped(copy.deepcopy(inner), 3, num_experts=2, layer=0).eval(), torch.rand(5, 3, 6, 6)
    with torch.no_grad():
        for mode in ("hard", "masked", "soft"):
            with route(mode):
                torch.testing.assert_close(layer(x), inner(x))
    assert sorted(dict(layer.named_parameters(recurse=False))) == ["bank_bias", "bank_weight"]
    assert layer.bank_weight.shape == (8, 3, 3, 3) and layer.idle_parameters() == 4 * 27 + 4


def test_experts_that_have_parted_compute_their_own(layer):
    with torch.no_grad():
        layer.bank_weight[4:] *= 2
        layer.bank_bias[4:] += 1
    x, forced, outputs = torch.rand(4, 3, 6, 6), torch.tensor([[0], [1], [1], [0]]), []
    for expert in (0, 1):
        own = Standardised(3, 4, 3)
        rows = slice(4 * expert, 4 * expert + 4)
        own.load_state_dict({"weight": layer.bank_weight[rows], "bias": layer.bank_bias[rows]})
        outputs.append(own(x))
    with torch.no_grad(), route(forced=forced):
        y = layer(x)
    torch.testing.assert_close(y, torch.where(forced.view(4, 1, 1, 1) == 0, *outputs))


def test_what_is_known_of_one_expert(layer):
    assert layer.weight.shape == (4, 3, 3, 3) and layer.bias.shape == (4,)
    assert MoEWrapped(Standardised(3, 4, 3, bias=False), 3, num_experts=2, layer=0).bias is None


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (nn.ReLU(), "inner must have parameters, all with as many rows, got {}"),
        (nn.Bilinear(2, 2, 3).requires_grad_(False), None),
        (nn.RNNCell(2, 3), None),
        (nn.MultiheadAttention(4, 2), "inner must have no buffers, and no parameters but its own, got a MultiheadAtt"),
        (nn.BatchNorm1d(3), "inner must have no buffers, and no parameters but its own, got a BatchNorm1d"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_can_be_shared_out(inner, message):
    if message is None:
        assert MoEWrapped(inner, 2, num_experts=2, layer=0).bank_rows == 2 * len(next(inner.parameters()))
        return
    with pytest.raises(ValueError, match=message):
        MoEWrapped(inner, 3, num_experts=2, layer=0)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (nn.ReLU(), r"inner must have parameters, all with as many rows, got {}"),
        (nn.MultiheadAttention(4, 2).out_proj, None),
        (nn.BatchNorm2d(4), "inner must have no buffers, and no parameters but its own, got a BatchNorm2d"),
        (
            nn.LSTM(2, 3, proj_size=1),
            r"inner must have parameters, all with as many rows, got {'weight_ih_l0': \(12, 2",
        ),
    ],
)
def test_what_can_be_wrapped(inner, message):
    if message is None:
        assert [tuple(bank.shape) for bank in MoEWrapped(inner, 4, num_experts=2, layer=0).banks()] == [(8, 4), (8,)]
        return
    with pytest.raises(ValueError, match=message):
        MoEWrapped(inner, 3, num_experts=2, layer=0)

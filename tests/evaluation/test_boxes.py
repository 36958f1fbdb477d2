"""Boxes: worked by hand; whatever lies inside stays inside; of width 0 they are the function; the rest is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.evaluation.boxes import Box, Unbounded, through


def box(*shape, width=1.0):
    low = torch.randn(shape, dtype=torch.double)
    return Box(low, low + width * torch.rand(shape, dtype=torch.double))


def drawn(bounds, corner=False):
    part = torch.rand_like(bounds.low).round() if corner else torch.rand_like(bounds.low)
    return bounds.low + part * (bounds.high - bounds.low)


def test_a_linear_map_by_hand():
    x = Box(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    y = through(F.linear, x, torch.tensor([[1.0, -2.0], [0.0, 1.0]]), torch.tensor([0.0, 0.5]))
    assert y.low.tolist() == [[-6, 2.5]] and y.high.tolist() == [[-3, 3.5]]
    assert (y.shape, y.dim(), len(y)) == ((1, 2), 2, 1)


def test_a_factor_below_zero_swaps_the_ends():
    x = Box(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]))
    y = torch.tensor([-1.0, 2.0]) + x * torch.tensor([-2.0, 1.0]) - 1
    assert y.low.tolist() == [-6, 2] and y.high.tolist() == [-4, 4]
    z = x / torch.tensor([-1.0, 2.0])
    assert z.low.tolist() == [-2, 0.5] and z.high.tolist() == [-1, 1.5]


def test_a_dip_is_least_inside():
    x = Box(torch.tensor([-3.0, -3.0, 0.5]), torch.tensor([3.0, -2.0, 1.0]))
    y = F.gelu(x)
    low, high = F.gelu(x.low).tolist(), F.gelu(x.high).tolist()
    assert y.low.tolist() == pytest.approx([-0.1699712, high[1], low[2]], abs=1e-6)
    assert y.high.tolist() == pytest.approx([high[0], low[1], high[2]])
    assert F.silu(x).low[0].item() == pytest.approx(-0.2784645, abs=1e-6)


NORM = nn.BatchNorm2d(3)
with torch.no_grad():
    NORM.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    NORM.running_var.uniform_(0.1, 2)
    NORM.running_mean.normal_()


@pytest.mark.parametrize(
    "network",
    [
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3, bias=False),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), nn.Linear(6, 5), NORM, nn.ReLU(), nn.ReLU6(),
        nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2), nn.Dropout(), nn.Flatten(), lambda x: torch.cat((x, x * -2), 1),
        lambda x: x.mean((2, 3)).relu(), lambda x: (0.5 * x - 1) / -3 + x, lambda x: 1 + x[:, 1:, ::2],
        lambda x: x.flatten(1).view(-1, 3, 36).transpose(1, 2).sum(1),
    ],
    ids=lambda network: str(network) if isinstance(network, nn.Module) else None,
)  # fmt: skip
def test_what_is_inside_stays_inside(network):
    if isinstance(network, nn.Module):
        network = network.double().eval()
    x = box(2, 3, 6, 6)
    with torch.no_grad():
        y = network(x)
        for corner in (True, False) * 10:
            inside = network(drawn(x, corner))
            assert (inside >= y.low - 1e-12).all() and (inside <= y.high + 1e-12).all()
        point = network(Box(x.low, x.low.clone()))
        assert torch.allclose(point.low, network(x.low)) and torch.allclose(point.high, network(x.low))


def test_in_place_functions_overwrite_what_shares_memory():
    x = box(1, 2, 2, 2)
    whole, part = x, x[:, :1]
    part += 10
    assert (whole.low[:, :1] > 5).all() and part.low.equal(whole.low[:, :1])
    F.relu(whole[:, 1:], inplace=True)
    assert (x.low[:, 1:] >= 0).all()


@pytest.mark.parametrize(
    ("ask", "of"),
    [
        (lambda x: F.layer_norm(x, (3,)), "layer_norm"), (lambda x: x.softmax(1), "softmax"),
        (lambda x: x * x, "mul of two activations"), (lambda x: F.conv2d(torch.ones(1, 2, 3, 3), x), "conv2d of two"),
        (lambda x: x / x, "div of two"), (lambda x: torch.ones(3) / x, "div"), (lambda x: x.max().item(), "max"),
        (lambda x: bool(x), "truth"), (lambda x: x == 0, "comparison"), (lambda x: x.data, "data"),
        (lambda x: x.relu_(), "relu_"), (lambda x: F.dropout(x, 0.5, training=True), "dropout"),
        (lambda x: nn.BatchNorm1d(3)(x), "batch_norm"), (lambda x: F.gelu(x, approximate="tanh"), "gelu by tanh"),
        (lambda x: torch.add(x, x, alpha=-1), "."), (lambda x: x > 0, "."), (lambda x: 1 - x, "."),
    ],
)  # fmt: skip
def test_the_rest_is_refused(ask, of):
    with pytest.raises((Unbounded, TypeError), match=of):
        ask(box(2, 3))

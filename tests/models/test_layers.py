"""The factory of layers: how many channels a scale leaves, and how much a model may weigh."""

import pytest
import torch

from advmoe.config import ModelConfig
from advmoe.models.layers import LayerFactory, Projection, TooLarge, TooNarrow, narrowed


@pytest.mark.parametrize(
    ("channels", "scale", "left"), [(64, 0.5, 32), (7, 0.5, 3), (9, 0.5, 4), (10, 0.25, 2), (11, 0.25, 3), (3, 1.0, 3)]
)
def test_halves_are_rounded_down(channels, scale, left):
    assert narrowed(channels, scale) == left


def test_less_than_one_channel_is_too_narrow():
    assert narrowed(4, 0.25) == 1
    with pytest.raises(TooNarrow, match=r"model\.scale must leave every layer a whole channel .*, got 0\.2 of the 4$"):
        narrowed(4, 0.2)


def test_a_model_of_too_many_weights_is_refused_before_it_is_made():
    layers = LayerFactory(ModelConfig(kind="dense"), most=100)
    layers.plain_conv(3, 3, 3)  # 81
    with pytest.raises(TooLarge):
        layers.plain_conv(3, 3, 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_projection_is_a_strided_1x1_convolution(stride):
    torch.manual_seed(0)
    projection = Projection(3, 5, 1, stride, bias=False).double()
    x = torch.rand(2, 3, 7, 6, dtype=torch.double, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, projection.weight, stride=stride)
    torch.testing.assert_close(projection(x), expected)
    c = torch.rand_like(expected)
    gradients = (torch.autograd.grad((y * c).sum(), (x, projection.weight)) for y in (projection(x), expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)

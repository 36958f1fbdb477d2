"""How a network begins: 3x3 at full resolution, or at a quarter of it where images are large."""

import pytest
import torch
from torch import nn

from advmoe.config import ModelConfig
from advmoe.models.layers import LayerFactory
from advmoe.models.stem import stem, stem_stride


@pytest.mark.parametrize(("size", "stride"), [(8, 1), (127, 1), (128, 4), (224, 4)])
def test_large_images_are_quartered(size, stride):
    layers = LayerFactory(ModelConfig(kind="s-dense", scale=0.5))
    made = stem(layers, 3, 16, size)
    assert stem_stride(size) == stride
    with torch.no_grad():
        assert made(torch.rand(1, 3, size, size)).shape == (1, 8, size // stride, size // stride)


@pytest.mark.parametrize(
    ("size", "kinds"), [(32, [nn.Conv2d]), (128, [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d])]
)
def test_without_an_activation_a_small_stem_is_its_convolution(size, kinds):
    made = stem(LayerFactory(ModelConfig(kind="dense")), 3, 16, size, activate=False)
    assert [next(kind for kind in kinds if isinstance(step, kind)) for step in made] == kinds

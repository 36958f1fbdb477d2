"""VGG-16: its stages, what its classifier reads, and its parameters counted layer by layer."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from advmoe.config import ModelConfig
from advmoe.models import create_model
from advmoe.models.layers import LayerFactory
from advmoe.models.vgg import VGG


def vgg(depths, kind="dense", **kwargs):
    sizes = {"width": 4, "in_channels": 3, "num_classes": 5, "input_size": 16, **kwargs}
    return VGG(LayerFactory(ModelConfig(kind=kind)), depths=depths, **sizes).eval()


def test_stages_by_hand():
    # 1, 2, 4, 8 and 8 times the width, with a pooling before every stage but the first.
    steps = vgg((2, 1, 1, 1, 2)).features
    channels = [step.out_channels for step in steps if isinstance(step, nn.Conv2d)]
    assert channels == [4, 4, 8, 16, 32, 32, 32]
    kinds = [{nn.Conv2d: "c", nn.MaxPool2d: "p"}.get(type(step), "") for step in steps]
    assert "".join(kinds) == "ccpcpcpcpcc"


def test_it_is_pytorch_s_own_steps_in_turn():
    torch.manual_seed(0)
    net, x = vgg((1, 2)), torch.rand(2, 3, 16, 16)
    convolutions = [step for step in net.features if isinstance(step, nn.Conv2d)]
    norms = [step for step in net.features if isinstance(step, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_()
            norm.weight.normal_()
        y = x
        for at, (conv, norm) in enumerate(zip(convolutions, norms, strict=True)):
            y = F.max_pool2d(y, 2) if at == 1 else y
            y = F.conv2d(y, conv.weight, padding=1)
            y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).relu()
        first, second, last = (layer for layer in net.classifier if isinstance(layer, nn.Linear))
        y = F.adaptive_avg_pool2d(y, 2).flatten(1)
        torch.testing.assert_close(net(x), last(second(first(y).relu()).relu()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_its_classifier_reads_four_pixels_whatever_the_side(size):
    net = vgg((1, 1, 1, 1, 1), input_size=size)
    assert net.classifier[0].in_features == 4 * 32
    with torch.no_grad():
        assert net.features(torch.rand(1, 3, size, size)).shape == (1, 4 * 32)


def test_hidden_layers_are_as_narrow_as_the_rest():
    for kind, hidden in (("dense", 16), ("s-dense", 8), ("moe", 8)):
        layers = [layer for layer in vgg((1, 1), kind).classifier if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in layers] == [hidden, hidden, 5]


@pytest.mark.parametrize(("kind", "w"), [("dense", 64), ("s-dense", 32)])
def test_parameters_by_hand(kind, w):
    with FakeTensorMode():
        model = create_model("vgg16", kind=kind, num_classes=10)
    # 13 convolutions with norms, and 2x2 pixels of 8 w channels into two hidden layers of 4 w and ten classes.
    c = [3, *(m * w for m in (1, 1, 2, 2, 4, 4, 4, *[8] * 6))]
    total = sum(9 * a * b + 2 * b for a, b in pairwise(c))
    hidden = 4 * w
    total += (4 * 8 * w + 1) * hidden + (hidden + 1) * (hidden + 10)
    assert sum(each.numel() for each in model.parameters()) == total

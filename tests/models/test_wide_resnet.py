"""Wide ResNets: their block by hand, how deep and wide a name is, and parameters counted layer by layer."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from advmoe.config import ModelConfig
from advmoe.models import create_model
from advmoe.models.layers import LayerFactory
from advmoe.models.wide_resnet import PreActivationBlock, WideResNet

DENSE = ModelConfig(kind="dense")


def block_of(*sizes):
    """A block in eval mode whose norms change nothing: unit variance, and no epsilon. Its filters are 0."""
    block = PreActivationBlock(LayerFactory(DENSE), *sizes).eval()
    block.norm1.eps = block.norm2.eps = 0.0
    nn.init.zeros_(block.conv1.weight)
    nn.init.zeros_(block.conv2.weight)
    return block


def test_a_block_by_hand():
    block = block_of(1, 1, 1)
    with torch.no_grad():
        block.conv1.weight[0, 0, 1, 1], block.conv2.weight[0, 0, 1, 1] = 2.0, 3.0
        x = torch.tensor([-3.0, 1.0]).view(1, 1, 1, 2)
        # ReLU -> 0, 1; twice that, thrice that: 0, 6; and x as it came: -3, 7, to which no ReLU is applied.
        assert block(x).flatten().tolist() == [-3.0, 7.0]
        assert x.flatten().tolist() == [-3.0, 1.0]  # nothing is overwritten that the shortcut needs


def test_a_projection_sees_the_activated_input():
    assert block_of(4, 4, 1).projection is None
    for sizes in ((1, 2, 1), (2, 2, 2)):
        assert block_of(*sizes).projection is not None
    block = block_of(1, 2, 1)
    with torch.no_grad():
        block.projection.weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        x = torch.tensor([-3.0, 1.0]).view(1, 1, 1, 2)
        assert block(x).flatten(2).tolist() == [[[0.0, 1.0], [0.0, -2.0]]]  # of 0 and 1, not of -3 and 1


@pytest.mark.parametrize(("depth", "blocks"), [(10, 1), (16, 2), (28, 4)])
def test_depth_and_widening_by_hand(depth, blocks):
    net = WideResNet(LayerFactory(DENSE), depth=depth, widening=2, width=8, in_channels=3, num_classes=5, input_size=16)
    assert net.stem[0].out_channels == 8 // 2
    channels = [8] * blocks + [16] * blocks + [32] * blocks
    assert [block.conv1.out_channels for block in net.blocks] == channels
    strides = [block.conv1.stride[0] for block in net.blocks]
    assert [at for at, stride in enumerate(strides) if stride == 2] == [blocks, 2 * blocks]
    # Convolutions and the classifier: the stem, two a block; less the projections, that makes the name's depth.
    convolutions = 1 + 2 * len(net.blocks)
    assert convolutions + 3 == depth  # published depths count the three projections


def test_width_is_at_least_the_widening():
    sizes = {"depth": 10, "in_channels": 3, "num_classes": 5, "input_size": 16}
    with pytest.raises(ValueError, match=r"^model.width must be >= 4 for a Wide ResNet of that widening, got 3$"):
        WideResNet(LayerFactory(DENSE), widening=4, width=3, **sizes)
    assert WideResNet(LayerFactory(DENSE), widening=4, width=4, **sizes).stem[0].out_channels == 1


@pytest.mark.parametrize(("kind", "w"), [("dense", 16), ("s-dense", 8)])
def test_parameters_by_hand(kind, w):
    with FakeTensorMode():
        model = create_model("wrn-28-10", kind=kind, num_classes=10)
    # A stage's eight convolutions with the norms before them, and a projection.
    total, c_in = 27 * w, w
    for c in (10 * w, 20 * w, 40 * w):
        total += 9 * c * (c_in + 7 * c) + 2 * (c_in + 7 * c) + c_in * c
        c_in = c
    assert sum(each.numel() for each in model.parameters()) == total + 2 * 40 * w + (40 * w + 1) * 10

"""DenseNets: their layers by hand, how they grow, and their parameters counted layer by layer."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from advmoe.config import ModelConfig
from advmoe.models import create_model
from advmoe.models.densenet import DenseLayer, DenseNet, Transition
from advmoe.models.layers import LayerFactory
from advmoe.moe import MoEConv2d


def plain(module, *sizes):
    """A module of the Dense kind, in eval mode, whose norms change nothing: unit variance, and no epsilon."""
    made = module(LayerFactory(ModelConfig(kind="dense")), *sizes).eval()
    for each in made.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eps = 0.0
    return made


def test_a_layer_by_hand():
    layer = plain(DenseLayer, 2, 1)
    x = torch.tensor([[-1.0, 2.0], [3.0, -5.0]]).view(1, 2, 1, 2)
    with torch.no_grad():
        # To four times the growth: the sum of both channels, its negative, and nothing twice.
        layer.conv1.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]).view(4, 2, 1, 1))
        layer.conv2.weight.zero_()
        layer.conv2.weight[0, :, 1, 1] = torch.tensor([10.0, 100.0, 1.0, 1.0])
        # ReLU of x: 0 and 3, 2 and 0; sums 3 and 2, ReLU of their negatives 0; ten times the sums, after x itself.
        assert layer(x.clone()).flatten(2).tolist() == [[[-1.0, 2.0], [3.0, -5.0], [30.0, 20.0]]]


def test_a_transition_by_hand():
    transition = plain(Transition, 2, 1)
    x = torch.tensor([[[-8.0, 2.0], [4.0, 6.0]], [[1.0, -1.0], [1.0, 2.0]]]).view(1, 2, 2, 2)
    with torch.no_grad():
        transition.conv.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
        # The mean of 0, 2, 4, 6 less that of 1, 0, 1, 2.
        assert transition(x).flatten().tolist() == [2.0]


def test_channels_grow_by_half_the_width_and_are_halved_between_blocks():
    sizes = {"in_channels": 3, "num_classes": 5, "input_size": 16}
    net = DenseNet(LayerFactory(ModelConfig(kind="dense")), depths=(2, 1), width=8, **sizes)
    # The stem's 8, and 4 from each of two layers: 16, halved to 8; 4 more from the third.
    assert [step.norm1.num_features for step in net.blocks if isinstance(step, DenseLayer)] == [8, 12, 8]
    (transition,) = (step for step in net.blocks if isinstance(step, Transition))
    assert (transition.conv.in_channels, transition.conv.out_channels) == (16, 8)
    assert net.norm.num_features == net.classifier.in_features == 12
    with torch.no_grad():
        assert net.blocks(net.stem(torch.rand(2, 3, 16, 16))).shape == (2, 12, 8, 8)
    with pytest.raises(
        ValueError, match=r"^model.width must be >= 2 for a DenseNet \(it grows by half of it\), got 1$"
    ):
        DenseNet(LayerFactory(ModelConfig(kind="dense")), depths=(1,), width=1, **sizes)


def test_narrow_channels_are_a_sum_of_rounded_parts():
    # At r = 1/2 a width of 6 is 3, and a growth of 3 is 1 (halves go down): 3, 4 and 5, where half of 12 would be 6.
    net = DenseNet(
        LayerFactory(ModelConfig(kind="s-dense")), depths=(2,), width=6, in_channels=3, num_classes=5, input_size=16
    )
    assert [layer.norm1.num_features for layer in net.blocks] == [3, 4] and net.norm.num_features == 5


def test_experts_of_half_an_odd_width_share_no_channel():
    # Growth 3: one channel an expert, which may be copies.
    model = create_model("densenet40", num_classes=3, width=7, input_size=16, experts_init="shared")
    layer = next(m for m in model.modules() if isinstance(m, MoEConv2d) and m.bank_rows == 3)
    assert layer.rows == [[0], [1]]
    assert torch.equal(layer.bank[0], layer.bank[1])


@pytest.mark.parametrize(("kind", "c"), [("dense", 24), ("s-dense", 12)])
def test_parameters_by_hand(kind, c):
    with FakeTensorMode():
        model = create_model("densenet40", kind=kind, num_classes=10)
    # A layer's norm and 1x1 of all that is there, norm and 3x3 of four times the growth.
    growth = c // 2
    total = 27 * c
    for block in range(3):
        total += (2 * c + c * c // 2) * (block > 0)
        c = c // 2 if block else c
        for _ in range(6):
            total += 2 * c + 4 * c * growth + 8 * growth + 36 * growth**2
            c += growth
    assert sum(each.numel() for each in model.parameters()) == total + 2 * c + (c + 1) * 10

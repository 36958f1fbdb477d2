"""ResNets: their blocks by hand, where shapes change, and their parameters counted layer by layer."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from advmoe.config import ModelConfig
from advmoe.models import create_model
from advmoe.models.layers import LayerFactory
from advmoe.models.resnet import BasicBlock, Bottleneck


def dense(block, *sizes):
    """A block of the Dense kind, in eval mode, whose norms change nothing: unit variance, and no epsilon."""
    made = block(LayerFactory(ModelConfig(kind="dense")), *sizes).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return made


def set_centre(conv, *rows):
    """Give a convolution filters that see the centre alone: `rows` of C_in numbers, one for each channel."""
    with torch.no_grad():
        conv.weight.zero_()
        centre = conv.kernel_size[0] // 2
        conv.weight[:, :, centre, centre] = torch.tensor(rows)


def test_a_basic_block_by_hand():
    block = dense(BasicBlock, 1, 1, 1)
    set_centre(block.conv1, [2.0])
    set_centre(block.conv2, [-1.0])
    x = torch.tensor([-3.0, 1.0, 4.0]).view(1, 1, 1, 3)
    with torch.no_grad():
        # 2x -> -6, 2, 8; ReLU -> 0, 2, 8; times -1, and x again: -3, -1, -4; ReLU.
        assert block(x.clone()).flatten().tolist() == [0.0, 0.0, 0.0]
        set_centre(block.conv2, [0.5])
        # 0, 1, 4 and x again: -3, 2, 8.
        assert block(x.clone()).flatten().tolist() == [0.0, 2.0, 8.0]


def test_a_bottleneck_by_hand():
    block = dense(Bottleneck, 4, 1, 1)
    set_centre(block.conv1, [1.0, 1.0, 0.0, 0.0])
    set_centre(block.conv2, [3.0])
    set_centre(block.conv3, [1.0], [-1.0], [0.5], [0.0])
    x = torch.tensor([1.0, 1.0, -1.0, 5.0]).view(1, 4, 1, 1)
    with torch.no_grad():
        # 1 + 1 = 2, times 3 is 6; to four channels 6, -6, 3, 0, and x again: 7, -5, 2, 5.
        assert block(x).flatten().tolist() == [7.0, 0.0, 2.0, 5.0]


def test_a_shortcut_is_projected_where_the_shape_changes():
    for block, sizes, projected in (
        (BasicBlock, (4, 4, 1), False),
        (BasicBlock, (4, 8, 1), True),
        (BasicBlock, (4, 4, 2), True),
        (Bottleneck, (4, 4, 1), True),  # to 16 channels
        (Bottleneck, (16, 4, 1), False),
    ):
        assert isinstance(dense(block, *sizes).shortcut, nn.Identity) != projected
    block = dense(BasicBlock, 1, 2, 2)
    set_centre(block.conv2, [0.0, 0.0], [0.0, 0.0])
    set_centre(block.shortcut[0], [1.0], [-2.0])
    x = torch.tensor([[1.0, 2.0], [3.0, -4.0]]).view(1, 1, 2, 2)
    with torch.no_grad():
        assert block(x).flatten().tolist() == [1.0, 0.0]  # of the pixel that stride 2 keeps: 1 and -2, ReLU


def test_a_bottleneck_s_second_convolution_takes_the_stride():
    block = dense(Bottleneck, 8, 4, 2)
    assert [conv.stride[0] for conv in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
    with torch.no_grad():
        assert block(torch.rand(2, 8, 6, 6)).shape == (2, 16, 3, 3)


def test_stages_double_their_channels_and_halve_their_sides():
    seen = []
    model = create_model("resnet18", kind="dense", num_classes=3, width=4, input_size=16)
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    with torch.no_grad():
        model(torch.rand(1, 3, 16, 16))
    assert seen == [shape for shape in ((4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)) for _ in range(2)]


def test_logits_are_of_the_mean_over_pixels():
    torch.manual_seed(0)
    backbone = create_model("resnet18", kind="dense", num_classes=3, width=4, input_size=16).backbone.eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        features = backbone.blocks(backbone.stem(x))
        expected = features.sum((2, 3)) / 4 @ backbone.classifier.weight.T + backbone.classifier.bias
        torch.testing.assert_close(backbone(x), expected)


@pytest.mark.parametrize(("kind", "w"), [("dense", 64), ("s-dense", 32)])
def test_parameters_by_hand(kind, w):
    with FakeTensorMode():
        model = create_model("resnet18", kind=kind, num_classes=10)
    # Convolutions with their norms, four a stage, and the projection where the channels change.
    total, c_in = 27 * w + 2 * w, w
    for c in (w, 2 * w, 4 * w, 8 * w):
        total += 9 * c * (c_in + 3 * c) + 4 * 2 * c + (c != c_in) * (c_in * c + 2 * c)
        c_in = c
    assert sum(each.numel() for each in model.parameters()) == total + (8 * w + 1) * 10

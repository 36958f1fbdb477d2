"""MoE layers in the place of plain ones: what they keep of these, and what a pass through them demands."""

import pytest
import torch
from own_networks import Plain, StaticSamePadding, TimmStyle, Watched, images, make, net_with
from torch import nn
from torch.nn import functional as F

from advmoe.models.convert import Conversion, to_moe
from advmoe.models.convert.replacing import convert, normalizer
from advmoe.models.normalize import Normalize
from advmoe.moe import MoEConv2d, MoELinear
from advmoe.moe.wrapped import MoEWrapped

SETTINGS = {
    "num_experts": 3, "router": "layer", "mean": None, "std": None, "num_classes": 5, "input_size": 12,
    "in_channels": 3,
}  # fmt: skip


def test_a_conversion_is_a_line_and_one_for_each_plain_layer():
    conversion = Conversion(("a", "b"), {"c": "depthwise", "d.0": "named in skip"})
    assert str(conversion).splitlines() == [
        "2 of 4 layers are MoE layers", "  plain  c: depthwise", "  plain  d.0: named in skip",
    ]  # fmt: skip


def test_layers_are_replaced_by_copies_in_the_order_of_the_pathway():
    net = make(Plain)
    kept = {name: net.get_submodule(name).weight.detach().clone() for name in ("down", "conv1")}
    model = convert(net, Conversion(("down", "conv1"), {"block.a": "named in skip"}), SETTINGS)
    assert model.backbone is net and model.spec["layers"] == ["down", "conv1"]
    for index, (name, weight) in enumerate(kept.items()):
        layer = net.get_submodule(name)
        assert (layer.layer, layer.title) == (index, f"MoE layer {index} ({name})")
        assert torch.equal(layer.bank, weight.repeat(3, 1, 1, 1))
    assert type(net.block["a"]) is nn.Conv2d


def test_a_layer_by_itself_is_a_network_too():
    layer = nn.Conv2d(3, 5, 1)
    model = convert(layer, Conversion(("",), {}), SETTINGS)
    assert isinstance(model.backbone, MoEConv2d) and model.backbone.title == "MoE layer 0"
    torch.testing.assert_close(model(images()), layer(images()))


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (Conversion((), {"a": "depthwise"}), "module must have a Conv2d to convert, got Plain with a (depthwise)"),
        (Conversion((), {}), "module must have a Conv2d to convert, got Plain with none"),
        (Conversion(("absent",), {}), "module must have the layers that were converted, got Plain without absent"),
        (Conversion(("norm",), {}), "module must have the layers that were converted, got Plain without norm"),
    ],
    ids=["all plain", "none", "absent", "another kind"],
)
def test_what_cannot_be_replaced_is_named(conversion, message):
    with pytest.raises(ValueError) as error:
        convert(make(Plain), conversion, SETTINGS)
    assert str(error.value) == message


def test_pixels_are_normalised_by_both_statistics_or_not_at_all():
    assert isinstance(normalizer(None, None), nn.Identity)
    normalize = normalizer([0.5], [0.25])
    assert isinstance(normalize, Normalize)
    assert normalize(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)).flatten().tolist() == [-2, 0, 2]
    for mean, std in (([0.5], None), (None, [0.5]), ([0.5], [0.5, 0.5]), ([0.5], [0.0]), ([0.5], [float("nan")])):
        with pytest.raises(ValueError, match=r"^mean and std must both have one entry per channel, std > 0, got "):
            normalizer(mean, std)


def test_subclasses_keep_their_forward_and_named_linear_layers_are_converted():
    model = to_moe(make(TimmStyle), linear=["mlp"], example=images(3))
    kinds = {name: type(model.backbone.get_submodule(name)) for name in model.conversion.converted}
    assert kinds == {
        "conv_stem": MoEWrapped, "blocks.0": MoEWrapped, "se.0": MoEConv2d, "se.2": MoEConv2d, "mlp.0": MoELinear,
        "mlp.2": MoELinear,
    }  # fmt: skip
    assert list(kinds) == list(model.conversion.converted) and model.conversion.skipped == {}
    own = dict(model.backbone.blocks[0].named_parameters(recurse=False))
    assert {name: tuple(each.shape) for name, each in own.items()} == {
        "bank_weight": (16, 8, 3, 3), "bank_bias": (16,), "bank_gain": (16, 1, 1, 1),
    }  # fmt: skip
    assert "blocks.0.inner" not in str(list(model.state_dict()))


def test_a_convolution_that_pads_by_a_module_is_converted():
    net = net_with(lambda net: setattr(net, "b", StaticSamePadding(4, 4, 3, stride=2))).eval()
    model = to_moe(net, example=images(3))
    assert model.conversion.skipped == {} and type(model.backbone.b) is MoEWrapped
    torch.testing.assert_close(model(images()), net(images()))
    assert (model.backbone.b.flavour, model.backbone.b.stride) == ("same", (2, 2))


ATTRIBUTES = {
    "type": lambda layer, x: x.to(layer.weight.dtype),
    "place": lambda layer, x: x + torch.ones(1, device=layer.weight.device),
    "both": lambda layer, x: x.to(layer.weight) + torch.zeros_like(layer.weight).sum().to(x),
    "width": lambda layer, x: x * layer.out_channels / layer.in_channels,
    "kernel": lambda layer, x: F.pad(x, [layer.kernel_size[0] // 2 - layer.padding[0]] * 4),
    "shape": lambda layer, x: x * layer.weight.shape[1] + layer.weight.size(0) + layer.weight.ndim + len(layer.weight),
    "settings": lambda layer, x: x * sum(layer.stride) + layer.groups + layer.dilation[0] + sum(layer.output_padding),
    "bias": lambda layer, x: x if layer.bias is not None and not layer.transposed else x * 2,
    "mode": lambda layer, x: x * len(layer.padding_mode) + layer.weight.requires_grad,
    "own": lambda layer, x: x * layer.factor,
}


@pytest.mark.parametrize("kind", [nn.Conv2d, StaticSamePadding])
@pytest.mark.parametrize("read", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_a_network_may_read_the_attributes_of_a_layer(read, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), kind(4, 4, 3), nn.Linear(4, 5)
            self.b.factor = 3

        def forward(self, x):
            return self.fc(self.b(read(self.b, self.a(x))).mean((2, 3)))

    net = make(Net).eval()
    for example in (None, images(3)):
        model = to_moe(net, example=example).eval()
        assert model.conversion.skipped == {}
        torch.testing.assert_close(model(images()), net(images()))


def test_without_an_example_a_pass_says_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"MoE layer 0 \(folded\) must get one row for each of the 12 images, got shape \(24, 3"
    ):
        to_moe(make(Watched), router="image").eval()(images())
    rule = "every MoE layer must make one choice per image .* got of 12 images"
    with pytest.raises(ValueError, match=f"{rule} folded with 24, idle with 0"):
        to_moe(make(Watched)).eval()(images())
    with pytest.raises(ValueError, match=f"{rule} idle with 0"):
        to_moe(make(Watched), skip=["folded"]).eval()(images())
    assert to_moe(make(Watched), skip=["folded", "idle"]).conversion.converted == ("late", "again", "first")


def test_precision_frozen_layers_modes_and_the_copy():
    net = make(Plain).double().eval()
    net.block["a"].weight.requires_grad_(False)
    model = to_moe(net, example=images(3))
    assert not model.training
    assert model.backbone.conv1.bank.dtype == model.backbone.conv1.router.hidden.weight.dtype == torch.double
    assert not model.backbone.block["a"].bank.requires_grad and model.backbone.block["a"].bias.requires_grad
    torch.testing.assert_close(model(images().double()), net(images().double()))
    half = to_moe(make(Plain).bfloat16().eval())
    assert half.backbone.conv1.bank.dtype == torch.bfloat16
    assert half.backbone.conv1.router.hidden.weight.dtype == torch.float32
    assert half(images().bfloat16()).dtype == torch.bfloat16
    assert to_moe(net, inplace=True).backbone is net and isinstance(net.conv1, MoEConv2d)


def test_normalisation_goes_inside():
    net = make(Plain).eval()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 1.0]
    model = to_moe(net, mean=mean, std=std, example=images(3))
    x = images()
    expected = net((x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))
    torch.testing.assert_close(model(x), expected)

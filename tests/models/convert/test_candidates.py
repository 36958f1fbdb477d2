"""Which layers can become MoE layers, in which order, and why each of the others cannot."""

import pytest
import torch
from own_networks import Counting, Plain, TimmStyle, Watched, images, make, net_with, shared_weight
from torch import nn
from torch.nn import functional as F

import advmoe
from advmoe.models.convert import to_moe
from advmoe.models.convert.candidates import candidates, watch
from advmoe.moe import MoEConv2d, route


def told(layers):
    """Of each candidate its name, its turn and why it stays plain."""
    return [(each.name, each.turn, each.reason) for each in layers]


def test_candidates_are_convolutions_and_the_linear_layers_that_were_named():
    net = make(Plain)
    convolutions = ["conv1", "block.a", "block.b", "block.depth", "down"]
    layers = candidates(net, (), (), depthwise=False)
    assert told(layers) == [(name, turn, "depthwise" if "depth" in name else None) for turn, name in
                            enumerate(convolutions)]  # fmt: skip
    layers = candidates(net, ("block",), ("head",), depthwise=True)
    assert told(layers) == [(name, turn, "named in skip" if "block" in name else None) for turn, name in
                            enumerate([*convolutions, "head.1"])]  # fmt: skip


def test_watching_notes_turns_and_leaves_no_hook():
    net = make(Plain)
    layers = candidates(net, (), (), depthwise=True)
    watch(layers, net, images(3))
    assert [each.name for each in sorted(layers, key=lambda each: each.turn)] == [
        "conv1", "block.a", "block.b", "down", "block.depth",
    ]  # fmt: skip
    assert not any(each.reason for each in layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_what_is_converted_and_what_is_not():
    model = to_moe(make(Plain), example=images(3))
    # In the order in which they run; without an example in that of `named_modules`.
    assert model.conversion.converted == ("conv1", "block.a", "block.b", "down")
    assert model.conversion.skipped == {"block.depth": "depthwise"}
    assert [m.layer for m in model.modules() if isinstance(m, MoEConv2d)] == [0, 1, 2, 3]
    assert "4 of 5 layers are MoE layers\n  plain  block.depth: depthwise" in str(model.conversion)
    bank = model.backbone.block["a"].bank
    assert bank.shape == (32, 2, 3, 3) and torch.equal(bank[:16], bank[16:])
    assert isinstance(model.backbone.head[1], nn.Linear) and type(model.backbone.block["depth"]) is nn.Conv2d
    assert to_moe(make(Plain), depthwise=True).conversion.skipped == {}


def shared_module(net):
    net.c = net.b


def replaced(net):
    net.b.forward = lambda x: nn.Conv2d.forward(net.b, x)


OBSTACLES = {
    "two names": (shared_module, {"b": "shared with c"}),
    "one weight": (shared_weight, {"b": "shared with c", "c": "shared with b"}),
    "parametrised": (lambda net: nn.utils.parametrizations.weight_norm(net.b), {"b": "parametrised"}),
    "hooked": (lambda net: net.b.register_forward_hook(lambda *_: None), {"b": "it has hooks"}),
    "spectral norm": (lambda net: nn.utils.spectral_norm(net.b), {"b": "it has hooks"}),
    "forward replaced": (replaced, {"b": "its forward was replaced"}),
    "state of its own": (
        lambda net: setattr(net, "b", Counting(4, 4, 3, padding=1)),
        {"b": "a Counting with buffers, or parameters of modules inside"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "skipped"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_cannot_be_copied_stays_plain_and_says_why(change, skipped):
    net = net_with(change).eval()
    model = to_moe(net, example=images(3))
    assert model.conversion.skipped == skipped
    assert set(model.conversion.converted) == {"a", "b", "c"} - set(skipped) - ({"c"} if net.c is net.b else set())
    torch.testing.assert_close(model(images()), net(images()))


COMPUTES = {
    "function": lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1),
    "product": lambda layer, x: x * layer.weight.sum(),
    "operator": lambda layer, x: x + (2 * layer.weight)[0, 0, 0, 0],
    "data": lambda layer, x: x + layer.weight.data.mean(),
    "list": lambda layer, x: x + torch.stack([layer.weight, layer.weight]).mean(),
}


@pytest.mark.parametrize("computed", COMPUTES.values(), ids=COMPUTES)
def test_a_layer_whose_weight_the_network_computes_with_stays_plain(computed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            x = self.a(x)
            return self.fc((self.b(x) + computed(self.b, x)).mean((2, 3)))

    net = make(Net).eval()
    model = to_moe(net, example=images(3))
    assert model.conversion.skipped == {"b": "the network reads its weight"}
    torch.testing.assert_close(model(images()), net(images()))
    with pytest.raises((ValueError, AttributeError), match=r"the weight of MoE layer 1 \(b\) must not be read"):
        to_moe(net)(images())


def test_layers_are_skipped_by_name_pattern_or_the_module_around_them():
    def plain(**kwargs):
        return set(to_moe(make(Plain), **kwargs).conversion.skipped) - {"block.depth"}

    assert plain(skip=["conv1"]) == {"conv1"}
    assert plain(skip="block") == {"block.a", "block.b"}
    assert plain(skip=("*.b", "down")) == {"block.b", "down"}
    assert to_moe(make(Plain), skip=["conv1"]).conversion.skipped["conv1"] == "named in skip"
    assert to_moe(make(TimmStyle), linear=["mlp.*"], skip="mlp.2").conversion.skipped == {"mlp.2": "named in skip"}


def test_an_example_shows_the_order_and_what_does_not_run():
    net = make(Watched).eval()
    model = to_moe(net, example=images(3))
    assert model.conversion.converted == ("again", "first", "late")
    assert model.conversion.skipped == {
        "idle": "it does not run", "folded": "it does not run on one row per image (of 3, on (6, 3, 12, 12))"
    }  # fmt: skip
    with route() as routing:
        torch.testing.assert_close(model(images()), net(images()))
    assert torch.equal(routing.pathway(), advmoe.pathway(model, images())) and routing.pathway().shape == (12, 3)
    model.train()(images())  # the layer that now runs is plain

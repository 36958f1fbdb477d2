"""Any network as a mixture of experts: the same function, what is converted, what is not and why, order of layers."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import advmoe
from advmoe.models import create_model, load_model, save_model, split_parameters
from advmoe.models.classifier import Classifier
from advmoe.models.convert import SAME, to_moe
from advmoe.moe import MoEConv2d, MoELayer, MoELinear, route, routers_of
from advmoe.moe.wrapped import MoEWrapped

ROUTERS = ["layer", "embedding", "image"]


class Plain(nn.Module):
    """A stem, grouped, dilated and biased convolutions without norms, in-place activations, a shortcut, dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {
                "a": nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=4),
                "b": nn.Conv2d(16, 8, (1, 3), padding="same", padding_mode="circular"),
                "depth": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            }
        )
        self.down = nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 5))

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu_()
        y = F.relu(self.block["a"](x), inplace=True)
        y = self.block["b"](y)
        y += self.down(x)
        return self.head(self.block["depth"](y).mean((2, 3)))


class SameConv(nn.Conv2d):
    """As TensorFlow pads: by the image's size, more below and to the right."""

    def forward(self, x):
        sides = []
        for length, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-length // s) - 1) * s + k - length, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    """Standardises its weights per filter, times a learnt gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Counting(nn.Conv2d):
    """Keeps a number of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros(()))


class TimmStyle(nn.Module):
    """Squeeze-and-excite between subclasses of `Conv2d`, and an MLP on channels-last tokens."""

    def __init__(self):
        super().__init__()
        self.conv_stem = SameConv(3, 8, 3, stride=2, bias=False)
        self.blocks = nn.Sequential(StandardisedConv(8, 8, 3, padding=1), nn.SiLU(inplace=True))
        self.se = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.blocks(self.conv_stem(x))
        x = x * self.se(x.mean((2, 3), keepdim=True))
        return self.fc(x.flatten(2).transpose(1, 2).mean(1) + self.mlp(x.permute(0, 2, 3, 1)).mean((1, 2)))


class Attention(nn.Module):
    """A transformer on patches, whose fused attention reads weights itself."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head((x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))).mean(1))


NETS = {"plain": (Plain, ()), "timm style": (TimmStyle, ("mlp",)), "attention": (Attention, ("mlp",))}


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def images(n=12, size=12, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def spread(model):
    """Scores centred over images in every layer, in eval mode, so that all experts are in use."""
    model.train()
    with torch.no_grad():
        for seed in range(8):
            model(images(16, seed=seed))
    model.eval()
    with torch.no_grad(), route() as routing:
        model(images(16))
    for layer, router in enumerate(routers_of(model)):
        router.scores.bias.data -= routing.scores[layer].mean(0)
    return model


@pytest.mark.parametrize("by_example", [True, False], ids=["example", "structure alone"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("kind", "linear"), NETS.values(), ids=NETS)
def test_the_converted_network_computes_the_same(kind, linear, router, by_example):
    net = make(kind)
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(1)
    model = to_moe(net, 3, router, linear=linear, example=images(3) if by_example else None)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert model.routed and model.training and len(model.conversion.converted) >= 3
    x = images()
    for training in (True, False):
        net.train(training)
        model.train(training)
        torch.manual_seed(2)
        expected = net(x)
        torch.manual_seed(2)
        with route() as routing:
            logits = model(x)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        # In training too, with what is changed in place between layers.
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(logits.sum(), list(split_parameters(model)[0])))
        assert routing.pathway().shape == (12, len(model.conversion.converted))
        for mode in ("soft", "masked"):
            torch.manual_seed(2)
            with route(mode):
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        if training:
            net.load_state_dict(state)  # statistics that the passes have moved
            names = [n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
            for name in names:
                model.backbone.get_submodule(name).load_state_dict(net.get_submodule(name).state_dict())


@pytest.mark.parametrize(("kind", "linear"), NETS.values(), ids=NETS)
def test_experts_learn_apart_and_hard_agrees_with_masked(kind, linear):
    model = spread(to_moe(make(kind), linear=linear, example=images(3)))
    generator = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for bank in layer.banks():
                bank.data += 0.1 * torch.randn(bank.shape, generator=generator)
    model.double()
    x = images().double().requires_grad_()
    passes = []
    for mode in ("hard", "masked"):
        with route(mode) as routing:
            logits = model(x)
        gradients = torch.autograd.grad(F.cross_entropy(logits, torch.arange(12) % 5), [x, *model.parameters()])
        passes.append((logits.detach(), gradients, routing.pathway()))
    assert torch.equal(passes[0][2], passes[1][2]) and len(passes[0][2].unique(dim=0)) > 1
    torch.testing.assert_close(passes[0][0], passes[1][0])
    for name, hard, masked in zip(["x", *dict(model.named_parameters())], passes[0][1], passes[1][1], strict=True):
        torch.testing.assert_close(hard, masked, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_converted_and_what_is_not():
    model = to_moe(make(Plain), example=images(3))
    # In the order in which they run; without an example in that of `named_modules`.
    assert model.conversion.converted == ("conv1", "block.a", "block.b", "down")
    assert model.conversion.skipped == {"block.depth": "depthwise"}
    # The activation after `a` and the sum after `b` write into their outputs; batch norm does not.
    assert model.conversion.in_place == ("block.a", "block.b")
    assert [m.layer for m in model.modules() if isinstance(m, MoEConv2d)] == [0, 1, 2, 3]
    assert "4 of 5 layers are MoE layers\n  plain  block.depth: depthwise" in str(model.conversion)
    bank = model.backbone.block["a"].bank
    assert bank.shape == (32, 2, 3, 3) and torch.equal(bank[:16], bank[16:])
    assert isinstance(model.backbone.head[1], nn.Linear) and type(model.backbone.block["depth"]) is nn.Conv2d
    assert to_moe(make(Plain), depthwise=True).conversion.skipped == {}


def test_subclasses_keep_their_forward_and_named_linear_layers_are_converted():
    model = to_moe(make(TimmStyle), linear=["mlp"], example=images(3))
    kinds = {name: type(model.backbone.get_submodule(name)) for name in model.conversion.converted}
    assert kinds == {
        "conv_stem": MoEWrapped, "blocks.0": MoEWrapped, "se.0": MoEConv2d, "se.2": MoEConv2d, "mlp.0": MoELinear,
        "mlp.2": MoELinear,
    }  # fmt: skip
    assert list(kinds) == list(model.conversion.converted) and model.conversion.skipped == {}
    assert set(model.conversion.in_place) == {"blocks.0", "se.0"}
    own = dict(model.backbone.blocks[0].named_parameters(recurse=False))
    assert {name: tuple(each.shape) for name, each in own.items()} == {
        "bank_weight": (16, 8, 3, 3), "bank_bias": (16,), "bank_gain": (16, 1, 1, 1),
    }  # fmt: skip
    assert "blocks.0.inner" not in str(list(model.state_dict()))


def net_with(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.c = nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 5)
            change(self)

        def forward(self, x):
            return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))

    return make(Net)


def shared_module(net):
    net.c = net.b


def shared_weight(net):
    net.c.weight = net.b.weight


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


class StaticSamePadding(nn.Conv2d):
    """A convolution that pads by a module, as of EfficientNets that follow TensorFlow's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))
        self.flavour = "same"

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


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


def test_a_method_that_no_moe_layer_has_is_an_error_that_names_the_layer():
    class Doubling(nn.Conv2d):
        def doubled(self, x):
            return 2 * self(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = Doubling(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.a.doubled(x).mean((2, 3)))

    with pytest.raises(ValueError, match=r"'doubled' \(asked of MoE layer 0 \(a\)\)"):
        to_moe(make(Net).eval(), example=images(3))


def test_layers_are_skipped_by_name_pattern_or_the_module_around_them():
    def plain(**kwargs):
        return set(to_moe(make(Plain), **kwargs).conversion.skipped) - {"block.depth"}

    assert plain(skip=["conv1"]) == {"conv1"}
    assert plain(skip="block") == {"block.a", "block.b"}
    assert plain(skip=("*.b", "down")) == {"block.b", "down"}
    assert to_moe(make(Plain), skip=["conv1"]).conversion.skipped["conv1"] == "named in skip"
    assert to_moe(make(TimmStyle), linear=["mlp.*"], skip="mlp.2").conversion.skipped == {"mlp.2": "named in skip"}


class Watched(nn.Module):
    """`late` is defined early; `idle` runs in train mode alone; `folded` sees 2 rows per image; `again` runs twice."""

    def __init__(self):
        super().__init__()
        self.folded, self.late, self.idle = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Conv2d(3, 5, 1)
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.folded(x.repeat(2, 1, 1, 1))[: len(x)]
        y = self.late(self.first(self.again(self.again(x).relu()))).mean((2, 3))
        return y + self.idle(x).mean((2, 3)) if self.training else y


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


def test_a_layer_that_runs_again_keeps_its_choice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

        def forward(self, x):
            return self.fc(self.conv(-4 * self.conv(x)).mean((2, 3)))

    model = spread(to_moe(make(Twice), example=images(3)))
    conv = model.backbone.conv
    conv.bank.data += torch.randn(conv.bank.shape, generator=torch.Generator().manual_seed(0))
    asked = []
    conv.router.register_forward_hook(lambda *_: asked.append(1))
    with torch.no_grad(), route() as routing:
        logits = model(images())
    choice = routing.pathway()
    assert len(asked) == 1 and choice.shape == (12, 1) and len(choice.unique()) == 2
    with torch.no_grad(), route(forced=choice):
        assert torch.equal(model(images()), logits)
    with torch.no_grad(), route(forced=1 - choice):
        assert not torch.allclose(model(images()), logits)
    # Another pass under the same `route` chooses anew.
    with torch.no_grad(), route() as routing:
        model(images())
        model(images(seed=7))
    assert torch.equal(routing.pathway(), advmoe.pathway(model, images(seed=7)))


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


def test_a_classifier_of_ours_is_upcycled():
    torch.manual_seed(0)
    dense = create_model("resnet18", kind="dense", width=4, num_classes=5, input_size=12).eval()
    model = to_moe(dense, example=images(3))
    assert len(model.conversion.converted) == 20 and type(model.backbone) is type(dense.backbone)
    torch.testing.assert_close(model(images()), dense(images()))
    assert model.spec["mean"] == dense.spec["mean"]


def test_a_lazy_network_takes_its_shape_from_the_example(tmp_path):
    def lazy():
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))

    model = to_moe(lazy(), example=images(3))
    assert model.conversion.converted == ("0",) and model.backbone[0].bank.shape == (8, 3, 3, 3)
    save_model(model, tmp_path)
    torch.testing.assert_close(load_model(tmp_path, lazy())(images()), model.eval()(images()))
    with pytest.raises(ValueError, match="its shape is not known before it has run"):
        to_moe(lazy())


# Files


@pytest.mark.parametrize("router", ROUTERS)
def test_a_saved_model_is_rebuilt_from_the_same_make(tmp_path, router):
    model = to_moe(make(TimmStyle), 3, router, linear=["mlp"], example=images(3), mean=[0.5] * 3, std=[0.2] * 3)
    model(images())
    model.eval()
    save_model(model, tmp_path)
    again = make(TimmStyle, seed=5)
    before = torch.get_rng_state()
    loaded = load_model(tmp_path, again)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.spec == model.spec and loaded.conversion == model.conversion
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(advmoe.pathway(loaded, images()), advmoe.pathway(model, images()))


def test_tied_weights_are_saved_and_loaded(tmp_path):
    model = to_moe(net_with(shared_weight), example=images(3))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, net_with(shared_weight))
    assert loaded.backbone.b.weight is loaded.backbone.c.weight
    torch.testing.assert_close(loaded(images()), model.eval()(images()))


def test_a_saved_model_is_not_opened_without_its_network_or_with_another(tmp_path):
    model = to_moe(make(Plain), example=images(3))
    model.spec["source"] = "their/model.py:net"
    save_model(model, tmp_path)

    def message(*args):
        with pytest.raises(ValueError) as error:
            load_model(tmp_path, *args)
        assert "\n" not in str(error.value)
        return str(error.value)

    text = message()
    assert "holds a network of somebody's own (their/model.py:net), whose code is never run unasked" in text
    assert "--model FILE.py:FACTORY" in text
    got = "got module must have the layers that were converted"
    assert f"of a model made of this TimmStyle, {got}" in message(make(TimmStyle))
    wider = make(Plain)
    wider.down = nn.Conv2d(8, 9, 1)
    assert "model.safetensors must hold the weights that model.json describes" in message(wider)
    spec = json.loads((tmp_path / "model.json").read_text())
    del spec["layers"], spec["num_classes"]
    (tmp_path / "model.json").write_text(json.dumps(spec))
    assert str(tmp_path) in message(make(Plain))
    save_model(create_model("resnet18", width=4, num_classes=5), tmp_path)
    assert "must be opened without --model or source=..." in message(make(Plain))


# Mistakes


class Reads(nn.Module):
    """Reads a layer's weight as well as calling it."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 5, 1), 1.0

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return y if isinstance(self.conv, nn.Conv2d) else y + self.scale


class Wrong(nn.Module):
    """Gives what `make` makes of the image."""

    def __init__(self, make):
        super().__init__()
        self.make, self.conv = make, nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.make(self.conv(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: to_moe(make(Plain), 0), "num_experts must be a whole number >= 1 and <= 1024, got 0"),
        (lambda: to_moe(make(Plain), True), "num_experts must be a whole number >= 1 and <= 1024, got True"),
        (lambda: to_moe(make(Plain), router="none"), "router must be one of layer, embedding, image, got 'none'"),
        (lambda: to_moe(make(Plain), skip=["conv2"]), "skip must name layers to convert of the network (did you mean "
         "conv1?), got 'conv2'"),
        (lambda: to_moe(make(Plain), linear=["mlp"]), "linear must name Linear layers of the network (there are head.1"
         "), got 'mlp'"),
        (lambda: to_moe(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))), "module must have a Conv2d to convert, got "
         "Sequential with 0 (depthwise)"),
        (lambda: to_moe(nn.Linear(3, 4)), "module must have a Conv2d to convert, got Linear with none"),
        (lambda: to_moe(to_moe(make(Plain))), "module must have no MoE layers yet, got one with a MoEConv2d"),
        (lambda: to_moe(make(Plain), mean=[0.5]), "mean and std must both have one entry per channel, std > 0"),
        (lambda: to_moe(make(Plain), mean=[0.5], std=[0.0]), "mean and std must both have one entry per channel"),
        (lambda: to_moe(make(Plain), example=images(1)), "example must be floating-point images (N, C, H, W) with N >="
         " 2, got torch.float32 of shape (1, 3, 12, 12)"),
        (lambda: to_moe(make(Plain), example=3), "got a int"),
        (lambda: to_moe(make(Plain), example=torch.rand(3, 1, 12, 12)), "module must take images (3, 1, 12, 12) without"
         " an error, got RuntimeError: "),
        (lambda: to_moe(Wrong(lambda y: y), example=images(3)), "module must make logits (N, K) of images (3, 3, 12, 12"
         "), got torch.float32 of shape (3, 5, 12, 12)"),
        (lambda: to_moe(Wrong(lambda y: [y]), example=images(3)), "got a list"),
        (lambda: to_moe(make(Reads), example=images(3)), "module must compute the same when its layers are replaced "
         "(deterministic, layers called as they are), got logits 1 apart"),
        (lambda: to_moe(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), router="image", linear="1"), "router must be "
         "layer for a network without Conv2d, got 'image'"),
    ],
)  # fmt: skip
def test_mistakes_name_argument_rule_and_value(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_small_roundings_are_no_mistake_and_real_differences_are():
    net = make(Reads)
    net.scale = 0.5 * SAME
    assert to_moe(net, example=images(3)).routed
    net.scale = 2 * SAME
    with pytest.raises(ValueError, match="module must compute the same"):
        to_moe(net, example=images(3))


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


def test_the_public_name():
    assert advmoe.to_moe is to_moe and "to_moe" in dir(advmoe) and "to_moe" in advmoe.__all__
    assert issubclass(type(advmoe.to_moe(make(Plain))), Classifier)

"""Any network as a mixture of experts: the same function, experts that learn apart, files, mistakes."""

import copy
import json
import math

import pytest
import torch
from own_networks import NETS, Plain, Reads, TimmStyle, images, make, net_with, shared_weight
from torch import nn
from torch.nn import functional as F

import advmoe
from advmoe.models import create_model, load_model, save_model, split_parameters
from advmoe.models.classifier import Classifier
from advmoe.models.convert import to_moe
from advmoe.moe import MoELayer, route, routers_of

ROUTERS = ["layer", "embedding", "image"]


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


class Wrong(nn.Module):
    """Gives what `make` makes of the image."""

    def __init__(self, make):
        super().__init__()
        self.make, self.conv = make, nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.make(self.conv(x))


class Uncopied(Plain):
    def __deepcopy__(self, memo):
        raise RuntimeError("not this one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: to_moe(make(Plain), 0), "num_experts must be a whole number >= 1 and <= 1024, got 0"),
        (lambda: to_moe(make(Plain), True), "num_experts must be a whole number >= 1 and <= 1024, got True"),
        (lambda: to_moe(make(Plain), router="none"), "router must be one of layer, embedding, image, "
            "fixed-top, fixed-top-bottom, fixed-mean, fixed-late, linear, linear-2, got 'none'"),
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
        (lambda: to_moe(make(Plain), mean=0.5, std=0.5), "mean and std must both have one entry per channel"),
        (lambda: to_moe(make(Plain), mean=[0.5], std=[math.nan]), "mean and std must both have one entry per channel"),
        (lambda: to_moe(make(Plain), mean=[0.5], std=[0.5]), "mean and std must have one number per channel (3), got"),
        (lambda: to_moe(make), "module must be a torch.nn.Module, got <function make"),
        (lambda: to_moe(torch.compile(make(Plain))), "module must be the network before torch.compile, got an Optimi"),
        (lambda: to_moe(make(Uncopied)), "module must be one that copy.deepcopy takes, or inplace must be true, got Run"
         "timeError: "),
        (lambda: to_moe(make(Plain), skip=None), "skip must be names or patterns of layers, got None"),
        (lambda: to_moe(make(Plain), linear=[1]), "linear must be names or patterns of layers, got [1]"),
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


def test_the_public_name():
    assert advmoe.to_moe is to_moe and "to_moe" in dir(advmoe) and "to_moe" in advmoe.__all__
    assert issubclass(type(advmoe.to_moe(make(Plain))), Classifier)


def test_what_a_model_of_ours_knows_of_its_images_stays():
    model = create_model("resnet18", num_classes=3, width=4, input_size=12, kind="dense", classes=["a", "b", "c"],
                         cut="central-crop").eval()  # fmt: skip
    for example in (None, images(3)):
        spec = to_moe(model, example=example).spec
        assert {name: spec[name] for name in ("num_classes", "classes", "cut", "input_size", "in_channels")} == {
            "num_classes": 3, "classes": ["a", "b", "c"], "cut": "central-crop", "input_size": 12, "in_channels": 3,
        }  # fmt: skip


def test_a_network_that_is_refused_stays_as_it_was():
    net = make(Reads)
    before = {name: type(part) for name, part in net.named_modules()}
    with pytest.raises(ValueError, match="module must compute the same"):
        to_moe(net, example=images(3), inplace=True)
    assert {name: type(part) for name, part in net.named_modules()} == before
    with pytest.raises(ValueError, match="example must be finite images"):
        to_moe(net, example=images(3) * math.nan)
    sparse = create_model("resnet18", num_classes=3, width=4, input_size=12, kind="sparse")
    with pytest.raises(ValueError, match=r"module must be a network without masks \(advmoe.models.compact\)"):
        to_moe(sparse)

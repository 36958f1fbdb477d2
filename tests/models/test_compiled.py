"""Compiled models compute what they computed, in outputs and gradients, with several experts at work; where every
expert is computed, a pass is one graph, made once for all batches of an epoch.
"""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from advmoe.errors import InputError
from advmoe.models import BACKBONES, create_model
from advmoe.models.compiled import WholePasses, compile_model, compiled
from advmoe.models.compute import set_compute
from advmoe.models.modes import frozen
from advmoe.moe import pathway, route
from advmoe.tables import KINDS, ROUTERS

NAMES = [*(name for name in BACKBONES if name != "resnet34"), "wrn-10-1"]
EVERY = [
    (name, {"kind": kind, "router": router})
    for name in NAMES
    for kind in KINDS
    for router in (ROUTERS if kind == "moe" else ["layer"])
    if not (name == "deit-tiny" and kind == "sparse")
]
MORE = [
    ("deit-tiny", {"route_per": "token"}),
    ("wrn-10-1", {"num_experts": 3, "experts": "independent"}),
    ("wrn-10-1", {"num_experts": 3, "scale": 0.5}),  # windows of rows that overlap and wrap around
]


def masked(name, images, **settings):
    """A small model whose hard passes compute every expert, and send `images` several ways."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=5, width=8, input_size=16, **settings)
        model = model.to(images.dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for _ in range(4):
                model(images)
        if not model.routed or len(pathway(model, images).unique(dim=0)) > 1:
            set_compute(model, "masked", images.device)
            return model
    raise AssertionError("no model that sends the images several ways")


def graphs_of(model, backend="aot_eager"):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    network = compiled(model, backend=counter)
    assert isinstance(network, WholePasses)
    return network, counter


def passed(network, model, x, **settings):
    """Logits, scores, choices, gradients of inputs and weights, buffers: all that a pass and its backward pass make."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with route(**settings) as routing:
        logits = network(x)
    (logits.square().sum() + sum(scores.sin().sum() for scores in routing.scores.values())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return logits.detach(), x.grad, gradients, buffers, dict(routing.scores), dict(routing.choices), routing.shared


def assert_graph_agrees(name, images, backend="aot_eager", **settings):
    images = images.double()  # in fp32 a rectifier's kink, or a close choice, would be decided by rounding
    model = masked(name, images, **settings)
    other = copy.deepcopy(model)
    network, counter = graphs_of(model, backend)
    for number, training in enumerate((True, False), 1):
        model.train(training)
        other.train(training)
        expected = passed(other, other, images)
        torch.testing.assert_close(passed(network, model, images), expected, rtol=1e-6, atol=1e-9)
        assert counter.frame_count in (
            {number} if name != "deit-tiny" else {1, number}
        )  # without batch norms, one for both
        assert bool(expected[4]) == model.routed


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.slow
def test_a_masked_pass_is_one_graph(router, make_images):
    assert_graph_agrees("vgg16", make_images(), router=router)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(("name", "settings"), [*EVERY, *MORE], ids=str)
def test_every_backbone_of_every_kind_is_one_graph(name, settings, make_images):
    assert_graph_agrees(name, make_images(), **settings)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("name", ["wrn-10-1", "deit-tiny"])
def test_the_usual_compiler_makes_the_same_of_it(name, make_images):
    # Of fewer images it fuses other operations.
    assert_graph_agrees(name, make_images(144), "inductor")


@pytest.mark.usefixtures("shallow_backbones")
def test_each_use_makes_its_graph_once_and_a_second_batch_size_one_for_any(make_images):
    model = masked("vgg16", make_images()).eval()
    network, counter = graphs_of(model)
    counts = []
    with frozen(model):
        for size in (8, 8, 6, 5, 12):
            network(make_images(size))
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2]
    with frozen(model), route("soft", temperature=0.5):
        soft = network(make_images(8))
        torch.testing.assert_close(soft, model(make_images(8)), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 3


@pytest.mark.usefixtures("shallow_backbones")
def test_a_forced_pathway_is_an_argument_of_the_graph(make_images):
    model = masked("vgg16", make_images()).eval()
    network, counter = graphs_of(model)
    images = make_images()
    other = 1 - pathway(model, images)
    with torch.no_grad():
        for forced in (other, other.roll(1, 0)):
            with route(forced=forced) as routing:
                logits = network(images)
            with route(forced=forced):
                torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
            assert torch.equal(routing.pathway(), forced)
    assert counter.frame_count == 1
    for forced, message in (
        (other + 1, r"forced must hold experts from 0 to 1, got 1 to 2"),
        (other[:5], rf"forced must be \(N, L\) with N = 12, got shape \(5, {other.shape[1]}\)"),
    ):
        with route(forced=forced), pytest.raises(InputError, match=message), torch.no_grad():
            network(images)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbones")
def test_what_cannot_be_traced_is_compiled_in_pieces(make_images, capfd, monkeypatch):
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", "text")

    class Told(nn.Module):
        def forward(self, x):
            print("a pass")
            return x

    model = masked("vgg16", make_images()).eval()
    images = make_images()
    expected = model(images)
    model.normalize = nn.Sequential(Told(), model.normalize)
    network, counter = graphs_of(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 0
    assert capfd.readouterr().err.count("note  the model is compiled in pieces: PyTorch cannot trace it whole") == 1


def test_a_model_that_groups_its_images_is_compiled_in_pieces(make_routed):
    model = make_routed()
    names = list(model.state_dict())
    assert compiled(model) is model
    model = make_routed()
    for layer in model.modules():
        layer.kernels = True
    assert compiled(model) is model  # Triton's kernels run between the pieces
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_gives_the_same_logits(name, make_images):
    images = make_images(24)
    for seed in range(20):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=5, width=8, input_size=16)
        with torch.no_grad():
            for _ in range(8):
                model(images)
        model.eval().requires_grad_(False)
        if len(pathway(model, images).unique(dim=0)) > 1:
            break
    expected, taken = model(images), pathway(model, images)
    assert len(taken.unique(dim=0)) > 1
    names = list(model.state_dict())
    torch.compiler.reset()
    made = compile_model(copy.deepcopy(model))
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    with torch.no_grad():
        torch.testing.assert_close(made(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] > before  # something was compiled
    assert torch.equal(pathway(made, images), taken)
    assert list(made.state_dict()) == names

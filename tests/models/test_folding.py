"""A batch norm folded into the convolution ahead of it computes what the two compute, and never what they once were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.models import create_model
from advmoe.models.folding import folding
from advmoe.models.fused import Steps, conv_norm
from advmoe.models.layers import Projection
from advmoe.models.modes import frozen
from advmoe.models.norm import BatchNorm2d
from advmoe.moe import MoEConv2d, route

NETWORKS = [
    ("resnet18", {}),
    ("resnet18", {"router": "image", "experts": "independent", "num_experts": 3}),
    ("resnet18", {"num_experts": 3}),  # windows that overlap: MoE layers are not folded, all else is
    ("resnet50", {}),  # 1x1 experts, as batched products
    ("resnet50", {"kind": "s-dense"}),
    ("wrn-28-10", {"width": 20}),
    ("vgg16", {}),
    ("densenet40", {}),
]


def different(norm):
    """Statistics and parameters of no particular kind, near those of a network in training."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)


def network(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, input_size=16, **{"width": 8, **kwargs})
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            different(module)
    return model.eval().requires_grad_(False)


def passed(model, x, mode="hard", forced=None):
    """Logits, the input's gradient, and the pathway."""
    x = x.detach().requires_grad_()
    with route(mode, forced=forced) as routing:
        logits = model(x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(len(x)) % 5, reduction="sum"), x)
    return logits.detach(), gradient, routing.pathway() if routing.choices else None


@pytest.fixture
def normed(monkeypatch):
    """Batch norms that run as themselves, in order."""
    seen, forward = [], BatchNorm2d.forward
    monkeypatch.setattr(BatchNorm2d, "forward", lambda self, x: seen.append(self) or forward(self, x))
    return seen


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_folded_and_unfolded_agree_in_outputs_and_input_gradients(name, kwargs, memory_format, make_images, normed):
    model = network(name, **kwargs).double().to(memory_format=memory_format)
    x = make_images(10).double().contiguous(memory_format=memory_format)
    layers = sum(isinstance(module, MoEConv2d) for module in model.modules())
    forced = torch.arange(10)[:, None].expand(-1, layers) % 2 if layers else None
    for mode, given in (("hard", forced), ("soft", None)):
        normed.clear()
        expected = passed(model, x, mode, given)
        unfolded = len(normed)
        with frozen(model):
            normed.clear()
            fused = passed(model, x, mode, given)
            with torch.no_grad(), route(mode, forced=given):
                torch.testing.assert_close(model(x), expected[0])
        assert len(normed) < 2 * unfolded
        torch.testing.assert_close(fused[0], expected[0])
        torch.testing.assert_close(fused[1], expected[1])
        assert fused[1].abs().max() > 0


def test_the_routers_feel_the_same_gradient(make_routed, make_images):
    model, x = make_routed().double().requires_grad_(False), make_images(16).double()
    with frozen(model):
        fused = passed(model, x)
    expected = passed(model, x)
    reference = passed(model, x, "masked")
    assert len(fused[2].unique()) > 1
    for ours, plain, masked in zip(fused, expected, reference, strict=True):
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(ours, masked)


def test_no_norm_is_left_in_a_frozen_resnet_but_in_the_reference(make_routed, make_images, normed):
    model, x = make_routed(), make_images(4)
    norms = sum(isinstance(module, BatchNorm2d) for module in model.modules())
    with frozen(model):
        passed(model, x)
        assert normed == []
        passed(model, x, "masked")
        assert len(normed) == norms
    normed.clear()
    model(x)
    assert len(normed) == norms  # nothing outlives the context


def pair(kind, **kwargs):
    torch.manual_seed(0)
    conv = {
        "moe": lambda: MoEConv2d(4, 6, 3, 1, 1, bank_rows=12, num_experts=2, layer=0, **kwargs),
        "plain": lambda: nn.Conv2d(4, 6, 3, 1, 1, bias=False, **kwargs),
        "projection": lambda: Projection(4, 6, 1, 2, bias=False),
    }[kind]()
    norm = BatchNorm2d(6)
    different(norm)
    return conv.eval().requires_grad_(False), norm.eval().requires_grad_(False)


def steps_of(conv, norm):
    """One expert for each half of the images, whatever the router says."""

    def run(x):
        forced = torch.arange(len(x))[:, None] % 2
        with route(forced=forced):
            return conv_norm(conv, norm, x)

    return run


CHANGES = {
    "filters": lambda conv, norm: next(conv.parameters()).mul_(2),
    "weight": lambda conv, norm: norm.weight.mul_(2),
    "bias": lambda conv, norm: norm.bias.add_(1),
    "mean": lambda conv, norm: norm.running_mean.add_(1),
    "variance": lambda conv, norm: norm.running_var.mul_(2),
    "eps": lambda conv, norm: setattr(norm, "eps", 0.5),
    "all, loaded": lambda *both: [m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}) for m in both],
    "all, replaced": lambda *both: [each.half().float() for each in both],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["moe", "plain", "projection"])
def test_a_change_is_seen_at_once(kind, change):
    conv, norm = pair(kind)
    run, x = steps_of(conv, norm), torch.rand(4, 4, 6, 6)
    with folding():
        before = run(x)
        with torch.no_grad():
            CHANGES[change](conv, norm)
        after = run(x)
    torch.testing.assert_close(after, run(x), atol=1e-5, rtol=1e-5)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["moe", "plain", "projection"])
def test_weights_of_one_call_are_its_own(kind):
    # Their memory may be that of another call's, which is gone.
    conv, norm = pair(kind)
    name = "bank" if kind == "moe" else "weight"
    net, x = nn.ModuleList([conv, norm]), torch.rand(4, 4, 6, 6)
    scaled, run = conv.get_parameter(name).detach(), steps_of(conv, norm)
    net.forward = lambda x: run(x)

    def call(scale):
        return torch.func.functional_call(net, {f"0.{name}": scaled * scale}, (x,))

    with torch.no_grad():
        expected = [call(scale) for scale in (1.0, 2.0, 3.0)]
        with folding():
            for scale, each in zip((1.0, 2.0, 3.0), expected, strict=True):
                torch.testing.assert_close(call(scale), each, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["moe", "plain"])
def test_what_learns_or_is_watched_stays_as_written(kind, normed):
    conv, norm = pair(kind)
    run, x = steps_of(conv, norm), torch.rand(4, 4, 6, 6)
    with folding():
        run(x)
        assert normed == []
        for parameter in (next(conv.parameters()), norm.weight, norm.bias):
            parameter.requires_grad_()
            (gradient,) = torch.autograd.grad(run(x).square().sum(), parameter)
            assert gradient.abs().max() > 0
            parameter.requires_grad_(False)
        norm.train()
        run(x)
        norm.eval()
        assert len(normed) == 4
        for module in (conv, norm):
            seen = []
            handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            run(x)
            handle.remove()
            assert seen == [1]


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [("plain", {"padding_mode": "reflect"}), ("moe", {"bias": True}), ("moe", {"padding_mode": "circular"})],
    ids=str,
)
def test_unusual_convolutions_are_computed_right(kind, kwargs):
    conv, norm = pair(kind, **kwargs)
    if kwargs.get("bias"):
        nn.init.normal_(conv.bias)
    run, x = steps_of(conv, norm), torch.rand(4, 4, 6, 6)
    with folding():
        logits = run(x)
    torch.testing.assert_close(logits, run(x), atol=1e-5, rtol=1e-5)


def test_steps_are_a_sequence():
    conv, norm = pair("plain")
    parts = (nn.ReLU(), conv, norm, nn.ReLU(), nn.MaxPool2d(2), BatchNorm2d(6).eval().requires_grad_(False))
    steps, plain, x = Steps(*parts), nn.Sequential(*parts), torch.randn(4, 4, 6, 6)
    assert list(steps.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(steps(x), plain(x), atol=0, rtol=0)
    with folding():
        torch.testing.assert_close(steps(x), plain(x), atol=1e-5, rtol=1e-5)


def test_an_inference_pass_leaves_nothing_that_a_gradient_stumbles_over():
    conv, norm = pair("moe")
    run, x = steps_of(conv, norm), torch.rand(4, 4, 6, 6)
    with folding():
        with torch.inference_mode():
            first = run(x)
        (gradient,) = torch.autograd.grad(run(x.requires_grad_()).sum(), x)
    torch.testing.assert_close(run(x), first, atol=1e-5, rtol=1e-5)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("kind", ["moe", "plain", "projection"])
def test_under_autocast_the_folded_convolution_runs_in_low_precision(kind):
    conv, norm = pair(kind)
    run, x = steps_of(conv, norm), torch.rand(4, 4, 6, 6)
    exact = run(x)
    with folding():
        with torch.autocast("cpu", torch.bfloat16):
            low = run(x)
        torch.testing.assert_close(run(x), exact, atol=1e-5, rtol=1e-5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, atol=0.05, rtol=0.02)


def test_a_folded_pathway_and_its_logits_depend_on_the_image_alone(make_routed, make_images):
    model, x = make_routed(), make_images(8)
    with frozen(model), torch.no_grad():
        with route() as routing:
            together = model(x)
        paths = routing.pathway()
        for image, logits, path in zip(x.split(1), together, paths, strict=True):
            with route() as routing:
                torch.testing.assert_close(model(image)[0], logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(routing.pathway()[0], path)

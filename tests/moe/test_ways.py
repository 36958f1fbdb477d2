"""The ways to compute a layer agree with the reference (every expert computed, the chosen one kept).

They do in outputs and all gradients; `gathered`, which is exported, is for one image and has none.
"""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.models.compute import set_compute
from advmoe.models.folding import Folds, folding
from advmoe.moe import LayerRouter, MoEConv2d, MoELinear, MoEMLP, route
from advmoe.moe.wrapped import MoEWrapped


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer"},
        {"router": "embedding", "experts": "independent"},
        {"router": "image", "num_experts": 3, "scale": 0.5},  # windows that overlap and wrap around
        {"router": "layer", "num_experts": 4, "scale": 0.25},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_hard_and_masked_agree_in_outputs_and_gradients(make_routed, make_images, kwargs, memory_format, training):
    model = make_routed(**kwargs).double().to(memory_format=memory_format).train(training)
    torch.manual_seed(1)
    x = make_images(16).double().contiguous(memory_format=memory_format).requires_grad_()
    y = torch.randint(0, 5, (16,))
    results = []
    for mode, compute in (("masked", "dispatch"), ("hard", "dispatch"), ("hard", "masked")):
        set_compute(model, compute, x.device)
        model.zero_grad()
        x.grad = None
        with route(mode) as routing:
            logits = model(x)
        F.cross_entropy(logits, y).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits.detach(), x.grad, gradients, routing.pathway()))
    reference, *others = results
    assert len(reference[3].unique()) > 1
    assert any("router" in name and g.abs().sum() > 0 for name, g in reference[2].items())
    for other in others:
        assert torch.equal(other[3], reference[3])
        torch.testing.assert_close(other[0], reference[0])
        torch.testing.assert_close(other[1], reference[1])
        for name, gradient in reference[2].items():
            torch.testing.assert_close(other[2][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


SINGLE = 1e-3
"""What float32 may differ by, as a share of a tensor's largest entry."""


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=SINGLE * expected.abs().max().item())


@pytest.mark.parametrize("frozen", [False, True], ids=["learnt", "frozen"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hard_and_masked_agree_in_single_precision(make_routed, make_images, monkeypatch, training, frozen):
    model = make_routed(router="layer").train(training).requires_grad_(not frozen)
    x, y = make_images(16).requires_grad_(), torch.arange(16) % 5
    fold, folds = Folds.of, []
    monkeypatch.setattr(Folds, "of", lambda *args: folds.append(args) or fold(*args))
    results = {}
    for mode in ("hard", "masked"):
        model.zero_grad()
        x.grad = None
        folds.clear()
        with route(mode) as routing, folding():
            logits = model(x)
            F.cross_entropy(logits, y).backward()
        # As under an attack, fixed norms are folded into their convolutions; the reference never folds.
        assert bool(folds) == (mode == "hard" and frozen and not training)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == (0 if frozen else len(list(model.parameters())))
        results[mode] = logits.detach(), {"x": x.grad, **gradients}, routing.pathway()
    hard, masked = results["hard"], results["masked"]
    assert torch.equal(hard[2], masked[2]) and len(hard[2].unique()) > 1
    assert_close(hard[0], masked[0])
    for name, gradient in masked[1].items():
        assert gradient.abs().max() > 0, name
        assert_close(hard[1][name], gradient)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer"},
        {"router": "embedding", "experts": "independent", "num_experts": 3},
        {"router": "image", "num_experts": 3, "scale": 0.5},  # windows that overlap and wrap around
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_gathered_and_masked_agree_with_hard(make_routed, make_images, kwargs):
    model, images = make_routed(**kwargs), make_images()
    with torch.no_grad():
        with route() as hard:
            expected = model(images)
        assert len(hard.pathway().unique(dim=0)) > 1
        with route("masked") as masked:
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(masked.pathway(), hard.pathway())
        for image, taken, logits in zip(images.split(1), hard.pathway(), expected, strict=True):
            with route("gathered") as gathered:
                torch.testing.assert_close(model(image)[0], logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(gathered.pathway()[0], taken)


def test_gathered_takes_the_forced_expert(make_routed, make_images):
    model, image = make_routed(), make_images()[:1]
    layers = len(set(model.state_dict()) & {f"{name}.bank" for name, _ in model.named_modules()})
    outputs = []
    for expert in (0, 1):
        forced = torch.full((1, layers), expert)
        with torch.no_grad(), route("gathered", forced=forced):
            outputs.append(model(image))
        with torch.no_grad(), route(forced=forced):
            torch.testing.assert_close(outputs[-1], model(image), rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_gathered_is_for_one_image(make_routed, make_images):
    model = make_routed()
    with pytest.raises(ValueError, match=r"mode gathered must be for 1 image .*, got 2 choices"), route("gathered"):
        model(make_images(2))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


MADE = {
    "3x3": lambda e: MoEConv2d(4, 8, 3, padding=1, bank_rows=8 * e, num_experts=e, layer=0),
    "1x1": lambda e: MoEConv2d(4, 8, 1, bank_rows=8 * e, num_experts=e, layer=0),
    "biased": lambda e: MoEConv2d(4, 8, 3, bias=True, bank_rows=8 * e, num_experts=e, layer=0),
    "grouped": lambda e: MoEConv2d(4, 8, 3, groups=2, bank_rows=8 * e, num_experts=e, layer=0),
    "overlapping": lambda e: MoEConv2d(4, 8, 3, bank_rows=4 * e + 4, num_experts=e, layer=0),
    "linear": lambda e: MoELinear(4, 8, bank_rows=8 * e, num_experts=e, layer=0),
    "MLP": lambda e: MoEMLP(4, 8, bank_rows=8 * e, num_experts=e, layer=0),
    "wrapped": lambda e: MoEWrapped(Doubled(4, 8, 3), 4, num_experts=e, layer=0, make_router=LayerRouter),
}


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("kind", MADE)
def test_a_network_may_change_any_output_in_place(kind, experts):
    torch.manual_seed(0)
    layer, shape = MADE[kind](experts), {"linear": (6, 4), "MLP": (6, 3, 4)}.get(kind, (6, 4, 5, 5))

    def gradients(x, mode, *, inplace):
        with route(mode):
            y = F.relu(layer(x), inplace=inplace)
        leaves = [each for each in (x, *layer.parameters()) if each.requires_grad]
        return y.detach().clone(), torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) if leaves else ()

    for layer.masks, learns, attacked, mode in product((False, True), (False, True), (False, True), ("hard", "soft")):
        layer.train(learns).requires_grad_(learns)
        x = torch.rand(shape).requires_grad_(attacked)
        expected, found = (gradients(x, mode, inplace=inplace) for inplace in (False, True))
        assert torch.equal(expected[0], found[0])
        for a, b in zip(expected[1], found[1], strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, 1e-4, 1e-5))


def test_what_kernels_do_not_take_is_computed_as_by_masks(monkeypatch):
    torch.manual_seed(0)
    layer = MoEConv2d(4, 4, 3, 1, 1, groups=2, bank_rows=8, num_experts=2, layer=0)
    x, forced = torch.randn(3, 4, 5, 5), torch.tensor([[1], [0], [1]])
    with route(forced=forced):
        expected = layer(x)
    layer.kernels, calls = True, []
    every = layer.compute_all
    monkeypatch.setattr(layer, "compute_all", lambda *arguments: calls.append(1) or every(*arguments))
    for images, chosen in ((x, forced), (x[:1], forced[:1])):
        with route(forced=chosen):
            torch.testing.assert_close(layer.eval()(images), expected[: len(images)])
    assert calls == [1, 1]

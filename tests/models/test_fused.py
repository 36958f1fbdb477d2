"""Whole networks computed with kernels and by PyTorch alone agree: outputs, gradients, what batch norms remember."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from advmoe.models import create_model, fused
from advmoe.models.folding import folding
from advmoe.models.modes import frozen
from advmoe.models.norm import BatchNorm2d
from advmoe.models.rectifier import Rectifier
from advmoe.moe import route
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.dispatch import Plan
from advmoe.moe.routers import routers_of
from advmoe.moe.routing import active_routing, forward_scope
from advmoe.moe.ways import Weights
from advmoe.ops import Convolved, Grouped, norm_act, raw
from advmoe.ops.rectifier import _convolution_rectify

needs_kernels = pytest.mark.skipif(not raw.available(), reason=f"no kernels: {raw.missing()}")
LAST = torch.channels_last
NETWORKS = [
    ("resnet18", {"kind": "moe"}),
    ("resnet18", {"kind": "moe", "router": "embedding", "num_experts": 3}),
    ("resnet18", {"kind": "moe", "experts": "independent"}),
    ("resnet18", {"kind": "s-dense"}),
    ("resnet50", {"kind": "moe"}),
    ("vgg16", {"kind": "moe"}),
    ("densenet40", {"kind": "moe"}),
    ("wrn-10-2", {"kind": "moe"}),
]


def finished(rectifier, y, norm=None, shortcut=None):
    """What becomes of a layer's output."""
    return fused.registered(norm_act(y, norm, rectifier, shortcut, pool=rectifier.pools))


def pooled_before(x):
    return active_routing().pooled(x)


def network(name, kwargs):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, input_size=16, **{"width": 16, **kwargs}).to(memory_format=LAST)
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    return model


def passed(model, x, choices):
    """Logits, the gradients that each pass ends in, and what norms remember."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with route(forced=choices):
        logits = model(x)
    F.cross_entropy(logits.float(), torch.arange(len(x)) % 5).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "x": x.grad, **gradients, **dict(model.named_buffers())}


def assert_alike(fused, expected, rounding):
    assert fused.keys() == expected.keys()
    for name, wanted in expected.items():
        # Some gradients are the differences of far larger sums, as those of what a norm takes out again.
        scale = wanted.double().square().mean().sqrt().item() + 1e-4
        error = (fused[name].double() - wanted.double()).square().mean().sqrt().item()
        assert error <= rounding * scale, f"{name}: {error:g} of {scale:g}"


@needs_kernels
@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_kernels_and_pytorch_agree(name, kwargs, mode, make_images, monkeypatch):
    model, x = network(name, kwargs).train(mode == "train"), make_images(20)
    layers = sum(hasattr(module, "num_experts") for module in model.modules())
    choices = torch.arange(20)[:, None].expand(-1, layers) % 2 if layers else None
    called = []
    for kernel in ("rectify", "norm_rectify"):
        run = getattr(raw, kernel)
        monkeypatch.setattr(raw, kernel, lambda *a, run=run, **k: called.append(run) or run(*a, **k))
    results = []
    for kernels in (True, False):
        called.clear()
        with frozen(model) if mode == "frozen" else torch.enable_grad():
            if kernels:
                results.append(passed(model, x, choices))
                assert called
            else:
                with raw.without_kernels():
                    results.append(passed(model, x, choices))
                assert not called
    assert_alike(*results, 1e-2)


@needs_kernels
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_without_gradients_they_choose_and_compute_the_same(name, kwargs, make_images, monkeypatch):
    model, x = network(name, kwargs), make_images(20)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(x)  # the routers' norms have seen their features
    whole = []
    layer = raw.whole_layer
    monkeypatch.setattr(raw, "whole_layer", lambda *a, **k: whole.append(a) or layer(*a, **k))
    with frozen(model), torch.no_grad():
        with route() as routing:
            logits = model(x)
        ours = routing.pathway() if routing.choices else None
        # One router for all layers, or none, leaves nothing to put into one kernel.
        assert bool(whole) == (kwargs["kind"] == "moe" and "router" not in kwargs)
        with raw.without_kernels(), route() as routing:
            expected = model(x)
        if ours is not None:
            assert torch.equal(ours, routing.pathway()) and len(ours.unique()) > 1
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@needs_kernels
@pytest.mark.parametrize(("name", "kwargs"), [each for each in NETWORKS if each[1]["kind"] == "moe"], ids=str)
def test_experts_are_mixed_alike(name, kwargs, make_images, monkeypatch):
    model, images = network(name, kwargs), make_images(12)
    model.train()(images)
    results, mixed = [], []
    mix = raw.mixed
    monkeypatch.setattr(raw, "mixed", lambda every, weights: mixed.append(every.shape) or mix(every, weights))
    for kernels in (True, False):
        x = images.clone().requires_grad_()
        with contextlib.nullcontext() if kernels else raw.without_kernels(), frozen(model), route("soft"):
            logits = model(x)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(12) % 5), x)
        results.append({"logits": logits.detach(), "x": gradient})
    assert mixed
    assert_alike(*results, 5e-3)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_in_bf16_they_are_as_far_from_fp32_as_pytorch_is(mode, make_images):
    model = network("resnet18", {"kind": "moe", "width": 16 if mode == "train" else 64})
    for _ in range(3):
        model.train()(make_images(20, seed=9))
    if mode == "frozen":  # but for the routers, so that there are gradients to compare
        model.eval().requires_grad_(False)
        for router in routers_of(model):
            router.requires_grad_(True)
    errors = {(who, what): 0.0 for who in ("kernels", "pytorch") for what in ("routers", "others")}
    for seed in range(4):
        x = make_images(20, seed=seed)
        choices = torch.randint(2, (20, 16), generator=torch.Generator().manual_seed(seed))
        with folding():
            exact = passed(model, x, choices)
        with torch.autocast("cpu", torch.bfloat16), folding():
            results = {"kernels": passed(model, x, choices)}
        with torch.autocast("cpu", torch.bfloat16), folding(), raw.without_kernels():
            results["pytorch"] = passed(model, x, choices)
        for who, result in results.items():
            for name, wanted in exact.items():
                error = (result[name].double() - wanted.double()).norm().item()
                errors[who, "routers" if "router" in name else "others"] += error
    for what in ("routers", "others"):
        assert 0 < errors["kernels", what] <= 1.2 * errors["pytorch", what], errors


@needs_kernels
@pytest.mark.parametrize("parts", [1, 2])
def test_both_uses_and_the_mean_bring_their_gradients_back(parts):
    torch.manual_seed(0)
    y, shortcut = (torch.randn(6, 8, 4, 4).contiguous(memory_format=LAST).requires_grad_() for _ in range(2))
    norm, rectifier = BatchNorm2d(8), Rectifier(pools=True)
    plan = Plan.of(torch.tensor([0, 1, 1, 0, 1, 0]), 2) if parts == 2 else None
    rows = tuple(y[index].contiguous(memory_format=LAST) for index in plan.members) if plan else (y * 1,)
    with forward_scope(shares=True):
        x = finished(rectifier, Grouped(rows, plan.members if plan else ()), norm, shortcut)
        twice, pooled = fused.fork(x), pooled_before(x)
    assert twice is not x and twice.data_ptr() == x.data_ptr()
    assert fused.fork(x) is x and pooled_before(x) is None  # outside of the pass
    weights = torch.randn(3, 6, 8, 4, 4)
    sums = (x * weights[0]).sum() + (twice * weights[1]).sum() + (pooled * weights[2, :, :, 0, 0]).sum()
    gradients = torch.autograd.grad(sums, (y, shortcut, norm.weight, norm.bias))
    plain = (F.batch_norm(y, None, None, norm.weight, norm.bias, training=True) + shortcut).relu()
    sums = (plain * (weights[0] + weights[1])).sum() + (plain.mean((2, 3)) * weights[2, :, :, 0, 0]).sum()
    for ours, wanted in zip(gradients, torch.autograd.grad(sums, (y, shortcut, norm.weight, norm.bias)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    mean, var = y.detach().mean((0, 2, 3)), y.detach().var((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var)
    assert norm.num_batches_tracked.item() == 1


@needs_kernels
def test_a_norm_that_does_not_record_stays_as_it_is():
    norm = BatchNorm2d(8)
    before = copy.deepcopy(norm.state_dict())
    norm.track_running_stats = False
    fused.norm_act(norm, Rectifier(), torch.randn(6, 8, 4, 4).contiguous(memory_format=LAST))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("hooked", ["conv1", "norm1", "relu"])
@pytest.mark.parametrize("training", [False, True])
def test_who_listens_to_a_module_hears_it(make_routed, make_images, hooked, training):
    model, heard = copy.deepcopy(make_routed()).train(training), []
    block = model.backbone.blocks[0]
    getattr(block, hooked).register_forward_hook(lambda module, inputs, output: heard.append(tuple(output.shape)))
    with frozen(model) if not training else torch.enable_grad():
        model(make_images(4))
    assert heard == [(4, 4, 16, 16)] * (2 if hooked == "relu" else 1)


@pytest.mark.parametrize("backward", [False, True])
def test_activations_are_freed_without_the_garbage_collector(backward):
    y = torch.randn(4, 8, 4, 4).contiguous(memory_format=LAST).requires_grad_()
    gc.disable()
    try:
        with forward_scope(shares=True):
            x = fused.norm_act(BatchNorm2d(8), Rectifier(pools=True), y * 1)
            total = (x + fused.fork(x)).sum()
        if backward:
            total.backward()
        left = weakref.ref(x)
        del x, total
        assert left() is None
    finally:
        gc.enable()


def resnet(kind="dense"):
    torch.manual_seed(0)
    return create_model("resnet18", num_classes=5, width=16, input_size=16, kind=kind).to(memory_format=LAST)


def gradients(run, x):
    """Of what `run` makes of `x`, for `x`, with kernels and without."""
    gradients = []
    for kernels in (True, False):
        with contextlib.nullcontext() if kernels else raw.without_kernels():
            leaf = x.clone().requires_grad_()
            run(leaf).backward()
            gradients.append(leaf.grad)
    return gradients


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_block_that_is_run_again_for_its_gradient_has_all_of_it(kind, make_images):
    model, x = resnet(kind).train(), make_images(6)
    blocks, stem = list(model.backbone.blocks), model.backbone.stem

    def checkpointed(leaf):
        y = stem(leaf)
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=True)
        return y.square().sum()

    ours, wanted = gradients(checkpointed, x)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def assert_nearly(ours, wanted):
    """Equal but for the few entries that rounding put on the other side of a rectifier's zero."""
    assert (ours - wanted).norm() <= 0.01 * wanted.norm(), ((ours - wanted).norm() / wanted.norm()).item()


def heard_of(module, way):
    """What a hook on `module` will get hold of, once the model has run."""
    seen = []
    if way == "input":
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    elif way == "output":
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    elif way == "retained":
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) or inputs[0].retain_grad())
    return seen


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(
    ("part", "way"),
    [
        ("blocks.0", "output"), ("blocks.1", "input"), ("blocks.1", "retained"), ("blocks.0.relu", "output"),
        ("blocks.1.shortcut", "input"), ("blocks.1.conv1", "input"), ("blocks", "input"), ("stem", "output"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_who_asks_for_a_feature_s_gradient_gets_all_of_it(kind, mode, part, way, make_images):
    gradients = []
    for kernels in (True, False):
        model, x = resnet(kind).train(), make_images(20).requires_grad_()
        for _ in range(3):
            model(x)
        seen = heard_of(model.backbone.get_submodule(part), way)
        with (
            contextlib.nullcontext() if kernels else raw.without_kernels(),
            frozen(model) if mode == "frozen" else contextlib.nullcontext(),
        ):
            logits = model(x)
            gradients.append(torch.autograd.grad(logits.square().sum(), seen[0])[0])
    assert_nearly(*gradients)


class Keeps(nn.Module):
    """A part that keeps its output, as for Grad-CAM, without a hook."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        self.seen = self.part(x)
        return self.seen


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_what_a_part_of_one_s_own_keeps_has_all_of_its_gradient(mode, make_images):
    gradients = []
    for kernels in (True, False):
        model, x = resnet("moe").train(), make_images(20).requires_grad_()
        model.backbone.blocks[0] = kept = Keeps(model.backbone.blocks[0])
        with (
            contextlib.nullcontext() if kernels else raw.without_kernels(),
            frozen(model) if mode == "frozen" else contextlib.nullcontext(),
        ):
            gradients.append(torch.autograd.grad(model(x).square().sum(), kept.seen)[0])
    assert_nearly(*gradients)


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_blocks_called_by_hand_share_nothing(kind, make_images):
    gradients = []
    for kernels in (True, False):
        model, x = resnet(kind).train(), make_images(6)
        first, *rest = model.backbone.blocks
        with contextlib.nullcontext() if kernels else raw.without_kernels():
            y = feature = first(model.backbone.stem(x))
            for block in rest:
                y = block(y)
            logits = model.backbone.classifier(y.mean((2, 3)))
            gradients.append(torch.autograd.grad(logits.square().sum(), feature)[0])
    assert_nearly(*gradients)


def fixed_layer(channels=8):
    """A convolution of two experts' fixed filters, and what it convolves: x, choice."""
    torch.manual_seed(0)
    filters = torch.randn(2, channels, channels, 3, 3)
    x = torch.randn(20, channels, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    return raw.Packed.of(filters, None, (1, 1), (1, 1)), x, torch.arange(20) % 2


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
def test_a_frozen_network_s_convolutions_are_rectified_as_they_are_made(bf16, make_images, monkeypatch):
    if bf16 and not raw.Packed.suits(torch.ones(32, 32, 1, 1, dtype=torch.bfloat16), 1):
        pytest.skip("a CPU without tiles")
    model, x = network("resnet18", {"kind": "moe", "width": 64}), make_images(20).requires_grad_()
    dtypes = []
    for name in ("rectified", "unrectified"):
        run = getattr(raw.Packed, name)
        monkeypatch.setattr(
            raw.Packed, name, lambda self, *a, run=run, **k: dtypes.append(self.dtype) or run(self, *a, **k)
        )
    with frozen(model), folding(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model(x).sum().backward()
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32] * len(dtypes)
    assert len(dtypes) == 2 * 16 if bf16 else len(dtypes) >= 2 * 11  # fp32 ones may be too large


@needs_kernels
def test_a_shortcut_that_kernels_cannot_read_is_added_by_pytorch():
    filters, x, choice = fixed_layer()
    shortcut, y = torch.randn(20, 8, 6, 6).contiguous(memory_format=LAST), Convolved(x, None, choice, filters)
    assert _convolution_rectify(y, shortcut, pool=False) is not None
    others = [shortcut.double(), shortcut.bfloat16(), shortcut.contiguous(), shortcut[:1], shortcut[:, :, :1, :1]]
    for other in (*others, shortcut[:, :, :5]):
        assert _convolution_rectify(y, other, pool=False) is None
    assert _convolution_rectify(y._replace(x=x.contiguous()), None, pool=False) is None
    narrow = raw.Packed.of(torch.ones(2, 4, 8, 3, 3), None, (1, 1), (1, 1))
    assert _convolution_rectify(y._replace(filters=narrow), None, pool=False) is None
    rectifier, seen = Rectifier(), []
    rectifier.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(finished(rectifier, y, None, shortcut), (y.merged() + shortcut).relu())
    assert seen == [1]


@needs_kernels
def test_filters_of_another_precision_are_not_used():
    layer = MoEConv2d(8, 8, 3, padding=1, bank_rows=16, num_experts=2, layer=0, make_router=None)
    x, filters = torch.randn(20, 8, 6, 6).bfloat16().contiguous(memory_format=LAST), layer.bank.detach()
    shifts, outputs = torch.randn(16), []
    fixed = layer.packed(filters, shifts)
    assert fixed is not None and fixed.dtype == torch.float32
    for packed in (fixed, None):
        with torch.no_grad(), route() as routing:
            routing.shared = [torch.arange(40.0).view(20, 2).sin()]
            weights = Weights((filters.bfloat16(), shifts.bfloat16()), affine=True, filters=packed)
            outputs.append(layer.output(x, weights).merged())
    assert torch.equal(*outputs)


@needs_kernels
@pytest.mark.parametrize("rectified", [False, True])
def test_filters_that_change_before_the_gradient_are_noticed(rectified):
    filters, x, choice = fixed_layer()
    y = Convolved(x, None, choice, filters)
    y = finished(Rectifier(), y) if rectified else y.merged()
    filters.filters.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_kernels
@pytest.mark.parametrize("rectified", [False, True])
def test_what_was_kept_in_another_layout_gives_the_same_gradient(rectified):
    gradients = []
    for layout in (lambda t: t, lambda t: t.contiguous()):
        filters, x, choice = fixed_layer()
        gate = torch.ones(20, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, layout):
            y = Convolved(x, gate, choice, filters)
            y = finished(Rectifier(), y) if rectified else y.merged()
            gradients.append(torch.autograd.grad(y.square().sum(), (x, gate)))
    for ours, wanted in zip(*gradients, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8), nn.Identity()], ids=str)
def test_another_norm_is_computed_as_it_is(norm, make_images):
    y = torch.randn(4, 8, 4, 4).contiguous(memory_format=LAST)
    torch.testing.assert_close(fused.norm_act(norm, Rectifier(), y.clone()), norm(y).relu())


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("training", [False, True])
def test_inference_mode_and_other_defaults(kind, training, make_images):
    model, x = resnet(kind).train(training), make_images(6)
    with torch.no_grad(), raw.without_kernels():
        expected = copy.deepcopy(model)(x)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-3, atol=1e-3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=1e-3, atol=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.filterwarnings("ignore")
def test_a_traced_graph_computes_what_the_model_does(make_images):
    model, x = resnet().eval(), make_images(4)
    with torch.no_grad():
        traced = torch.jit.trace(model.backbone, x, check_trace=False)
        again = make_images(4, seed=7)
        torch.testing.assert_close(traced(again), model.backbone(again), rtol=1e-3, atol=1e-4)


def test_an_empty_batch_and_experts_of_any_integer_type():
    torch.manual_seed(0)
    layer = MoEConv2d(8, 8, 3, 1, 1, bank_rows=16, num_experts=2, layer=0).eval().requires_grad_(False)
    assert layer(torch.rand(0, 8, 4, 4).contiguous(memory_format=LAST)).shape == (0, 8, 4, 4)
    x, forced = torch.rand(20, 8, 4, 4).contiguous(memory_format=LAST), torch.arange(20)[:, None] % 2
    for needed in (False, True):
        each = []
        for choices in (forced, forced.int(), forced.to(torch.uint8)):
            with route(forced=choices), torch.set_grad_enabled(needed):
                each.append(layer(x.clone().requires_grad_(needed)))
        assert torch.equal(each[0], each[1]) and torch.equal(each[0], each[2])

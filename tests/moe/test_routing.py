"""Routing of whole models: what it depends on, how it is recorded, and the context that carries it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from advmoe.models import create_model
from advmoe.moe import dispatch, pathway, route, routing, soft_routing
from advmoe.moe.routing import active_routing

ROUTERS = ["layer", "embedding", "image"]
LAYERS = 16  # ResNet-18: 8 blocks of two


@pytest.mark.parametrize("kwargs", [{"router": r} for r in ROUTERS] + [{"num_experts": 4, "scale": 0.25}], ids=str)
def test_a_pathway_depends_on_the_image_alone(make_routed, make_images, kwargs):
    model, x = make_routed(**kwargs), make_images()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    paths = pathway(model, x)
    assert paths.shape == (12, LAYERS)
    assert len(paths.unique(dim=0)) > 1

    def passed(x):
        with torch.no_grad(), route() as routing:
            return model(x), routing.pathway()

    logits, _ = passed(x)
    alone = [torch.cat(results) for results in zip(*(passed(each[None]) for each in x), strict=True)]
    among = passed(torch.cat([make_images(5, seed=3), x, make_images(2, seed=4)]))
    shuffled = [result[order.argsort()] for result in passed(x[order])]
    for other_logits, other_paths in (alone, [result[5:17] for result in among], shuffled):
        assert torch.equal(other_paths, paths)
        torch.testing.assert_close(other_logits, logits, atol=1e-4, rtol=0)


def test_image_router_chooses_one_expert_for_all_layers(make_routed, make_images):
    paths = pathway(make_routed(router="image"), make_images())
    assert torch.equal(paths, paths[:, :1].expand(-1, LAYERS))
    assert len(paths[:, 0].unique()) == 2


@pytest.mark.parametrize("router", ["layer", "embedding"])
def test_other_routers_choose_layer_by_layer(make_routed, make_images, router):
    model = make_routed(router=router)
    paths = pathway(model, make_images())
    assert (paths != paths[:, :1]).any()
    with torch.no_grad(), route() as routing:
        model(make_images())
    assert list(routing.scores) == list(range(LAYERS))
    assert not torch.equal(routing.scores[0], routing.scores[1])
    for layer in range(LAYERS):
        assert torch.equal(routing.scores[layer].argmax(1), paths[:, layer])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_forced_pathway_is_taken(make_routed, make_images, router):
    model, x = make_routed(router=router), make_images()
    paths = pathway(model, x)
    flipped = 1 - paths
    with torch.no_grad():
        logits = model(x)
        with route(forced=paths):
            torch.testing.assert_close(model(x), logits)
        with route(forced=flipped) as routing:
            hard = model(x)
        with route("masked", forced=flipped):
            torch.testing.assert_close(model(x), hard)
    assert torch.equal(routing.pathway(), flipped)
    assert (hard - logits).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("router", ROUTERS)
def test_soft_routing_approaches_hard_routing_as_it_cools(make_routed, make_images, router):
    model, x = make_routed(router=router), make_images()
    with torch.no_grad():
        hard = model(x)
        warm, cool, cold = (soft_routing(model, t)(x) for t in (1.0, 0.1, 1e-6))
    torch.testing.assert_close(cold, hard, atol=1e-4, rtol=0)
    assert (warm - hard).abs().mean() > (cool - hard).abs().mean() > 1e-3


@pytest.mark.parametrize("router", ROUTERS)
def test_the_input_feels_the_routers(make_routed, make_images, router):
    # The gradient by an image differs from that of its pathway alone by what passes through the scores.
    model, x = make_routed(router=router), make_images().requires_grad_()
    labels = torch.arange(12) % 5
    (routed,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    for router_parameters in (p for name, p in model.named_parameters() if "router" in name and "scores" in name):
        router_parameters.data.zero_()
    for head in (p for name, p in model.named_parameters() if "heads" in name):
        head.data.zero_()
    with route(forced=pathway(make_routed(router=router), make_images())):
        (fixed,) = torch.autograd.grad(F.cross_entropy(model(x), labels), x)
    assert (routed - fixed).abs().max() > 1e-2 * fixed.abs().max()


def test_contexts_nest_and_close_after_an_exception(make_routed, make_images):
    model, x = make_routed(), make_images(4)
    assert active_routing().mode == "hard" and active_routing() is not active_routing()
    with route("soft", temperature=0.5) as outer:
        with pytest.raises(RuntimeError, match="planned"), route("masked") as inner:
            assert active_routing() is inner
            raise RuntimeError("planned")
        assert active_routing() is outer and (outer.mode, outer.temperature) == ("soft", 0.5)
        with torch.no_grad():
            soft = model(x)
        recorded = outer.pathway()
        pathway(model, make_images(7))  # has its own
        assert torch.equal(outer.pathway(), recorded) and active_routing() is outer
    assert active_routing().mode == "hard"
    with torch.no_grad():
        torch.testing.assert_close(soft_routing(model, 0.5)(x), soft)
    with pytest.raises(ValueError, match="images must be"):
        model(torch.rand(4, 2, 16, 16))  # a failing pass leaves nothing open either
    assert active_routing() is not active_routing()


def test_a_routing_holds_the_last_pass(make_routed, make_images):
    model = make_routed(router="image")
    with torch.no_grad(), route() as routing:
        for n in (12, 7):
            model(make_images(n))
            assert routing.pathway().shape == (n, LAYERS)
            assert torch.equal(routing.pathway(), pathway(model, make_images(n)))


@pytest.mark.parametrize("training", [True, False])
def test_pathway_leaves_the_model_as_it_was(make_routed, make_images, training):
    model, x = make_routed().train(training), make_images()
    model.backbone.stem.train(not training)
    modes = [m.training for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    paths = pathway(model, x)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(paths, pathway(model.eval(), x))


def test_plain_models_have_an_empty_pathway(make_images):
    model = create_model("resnet18", kind="dense", num_classes=3, width=4)
    assert pathway(model, make_images(5)).shape == (5, 0)
    with torch.no_grad():
        torch.testing.assert_close(soft_routing(model.eval())(make_images(5)), model(make_images(5)))


@pytest.mark.parametrize("router", ROUTERS)
def test_scores_are_fp32_under_bf16(make_routed, make_images, router):
    model, x = make_routed(router=router), make_images()
    with torch.no_grad():
        with route() as exact:
            logits = model(x)
        with torch.autocast("cpu", torch.bfloat16), route() as rounded:
            model(x)
        with torch.autocast("cpu", torch.bfloat16), route(forced=exact.pathway()):
            close = model(x)
    assert close.dtype == torch.bfloat16
    assert {scores.dtype for scores in rounded.scores.values()} == {torch.float32}
    # 8 bits of mantissa through 20 layers; the pathway is forced, as a near tie in fp32 may be decided otherwise.
    assert (close.float() - logits).abs().max() < 0.05 * logits.abs().max()
    if router != "layer":  # these see the image itself: not one bit differs
        assert torch.equal(rounded.scores[0], exact.scores[0])


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_training_pass_gives_fp32_gradients_to_all(make_routed, make_images, router):
    model = make_routed(router=router).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(make_images()).float(), torch.arange(12) % 5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    phi = [p.grad.abs().sum() for name, p in model.named_parameters() if "router" in name]
    assert sum(phi) > 0


def test_the_coldest_mixture_is_hard_routing(make_routed, make_images):
    model, x = make_routed().eval(), make_images().requires_grad_()
    with route("soft", temperature=np.float32(1e-5)):
        cold = model(x)
    torch.testing.assert_close(cold, model(x), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(cold.sum(), x)
    assert gradient.isfinite().all()


def test_errors_name_what_is_wrong(make_routed, make_images):
    for wrong in (0, 1e-40, float("nan"), "1", True):
        with (
            pytest.raises(ValueError, match="temperature must be a number >= 1e-06, got "),
            route("soft", temperature=wrong),
        ):
            pass
    with (
        pytest.raises(ValueError, match="forced must be left out with mode soft"),
        route("soft", forced=torch.zeros(4, 4)),
    ):
        pass
    with pytest.raises(ValueError, match=r"forced must be a tensor \(N, L\), .*, got \[\[0\]\]"), route(forced=[[0]]):
        pass
    with pytest.raises(ValueError, match="mode must be one of hard, soft, masked, gathered, got 'sfot'"), route("sfot"):
        pass
    model, forced = make_routed(), torch.zeros(6, LAYERS, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"forced must be \(N, L\) with N = 4, got shape \(6, 16\)"),
        route(forced=forced),
    ):
        model(make_images(4))
    for wrong in (2, -1):
        rule = rf"forced must hold experts from 0 to 1, got \[{min(0, wrong)}, {max(0, wrong)}\]"
        forced = torch.zeros(4, LAYERS, dtype=torch.long)
        forced[1, 3] = wrong
        with pytest.raises(ValueError, match=rule), route(forced=forced):
            model(make_images(4))


@pytest.mark.parametrize("mode", ["hard", "masked"])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("router", ["layer", "image"])
def test_experts_that_there_are_not_are_refused(make_routed, make_images, monkeypatch, router, elsewhere, mode):
    """On an accelerator, too, whose tensors nobody looks at but where it is waited for anyway."""
    model, x = make_routed(router=router), make_images(4)
    if elsewhere:
        for module in (dispatch, routing):
            monkeypatch.setattr(module, "on_host", lambda tensor: False)
    paths = pathway(model, x)
    with torch.no_grad(), route(mode, forced=1 - paths) as given:
        model(x)
    assert torch.equal(given.pathway(), 1 - paths)
    for layer in (0, LAYERS - 1):
        for wrong in (2, -1):
            forced = paths.clone()
            forced[1, layer] = wrong
            with (
                pytest.raises(ValueError, match="forced must hold experts from 0 to 1, got"),
                route(mode, forced=forced),
            ):
                model(x)
    with pytest.raises(ValueError, match=r"L > 3, as MoE layer 3 runs, got shape \(4, 3\)"), route(forced=paths[:, :3]):
        model(x)
    with (
        pytest.raises(ValueError, match="forced must hold whole numbers"),
        route(forced=paths.float()),
    ):
        model(x)


def test_an_accelerator_is_waited_for_once_a_layer(monkeypatch):
    """What comes beside the counts comes in their transfer."""
    choice, waits = torch.tensor([1, 0, 1]), []
    monkeypatch.setattr(dispatch, "on_host", lambda tensor: False)
    look = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(1) or look(tensor))
    plan = dispatch.Plan.of(choice, 2, torch.tensor([0, 5]))
    assert plan.beside == (0, 5) and plan.experts == (0, 1) and len(waits) == 1
    assert [look(each) for each in plan.members] == [[1], [0, 2]]

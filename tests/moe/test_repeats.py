"""Layers that a backward pass runs again (activation checkpointing): with the routing of the pass that they repeat."""

import copy
import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from advmoe import ThreatModel, pgd, to_moe
from advmoe.moe import LayerRouter, MoEConv2d, route, soft_routing

WAYS = [None, False, True]
"""No checkpoints; those of the newer and of the older kind, which is reentrant."""
MODES = [("hard", False), ("soft", False), ("hard", True), ("masked", True), ("soft", True)]


class Net(nn.Module):
    """Two blocks, each of which may be checkpointed, between two layers that are not."""

    def __init__(self, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Tanh())
        self.head = nn.Linear(8, 4)
        self.how = how

    def forward(self, x):
        x = self.stem(x)
        for block in (self.first, self.second):
            x = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
        return self.head(x.mean((2, 3)))


class Around(nn.Module):
    """A network that is one checkpoint."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        return self.inner(x) if self.how is None else checkpoint(self.inner, x, use_reentrant=self.how)


def converted(net, router="layer"):
    """`net` converted, whose experts and routers are apart, so that another routing has other gradients."""
    torch.manual_seed(0)
    model = to_moe(net, 2, router)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bank" in name or "router" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model(torch.rand(32, 3, 6, 6, generator=generator))  # for the norms' statistics, which center the scores
    return model.eval()


@pytest.fixture
def x():
    return torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(2))


FORCED = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]])


def routed(mode, forced, temperature=0.5):
    return route(mode, temperature=temperature, forced=FORCED if forced else None)


def gradients(model, loss, x):
    """Of the images and of the parameters."""
    model.zero_grad()
    x.grad = None
    loss.backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {"x": x.grad.clone(), **{name: grad for name, grad in grads.items() if grad is not None}}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("how", WAYS[1:])
@pytest.mark.parametrize("router", ["layer", "image", "embedding"])
@pytest.mark.parametrize(("mode", "forced"), MODES[:4])
def test_gradients_are_those_without_checkpoints(mode, forced, router, how, x):
    found = []
    for way in (None, how):
        model, images = converted(Net(), router), x.clone().requires_grad_()
        model.backbone.how = way
        with routed(mode, forced):
            logits = model(images)
        found.append(gradients(model, logits.square().sum(), images))
    assert_same(found[1], found[0])
    assert any(".router." in name or name.startswith("router.") for name in found[0])


@contextmanager
def nothing():
    yield


@pytest.mark.parametrize("how", WAYS[1:])
@pytest.mark.parametrize("around", [nothing, lambda: route("soft", temperature=9.0), lambda: route(forced=1 - FORCED)])
@pytest.mark.parametrize("thread", [False, True])
def test_whatever_is_open_and_in_whatever_thread_it_runs(thread, around, how, x):
    """A thread of its own sees no context, as autograd's threads of accelerators do not."""

    def found(way):
        model, images = converted(Net()), x.clone().requires_grad_()
        model.backbone.how = way
        with route("soft", temperature=3.0), route("soft", temperature=0.5):
            soft = model(images)
        with route("soft", temperature=2.0):
            other = model(images)
            with route(forced=FORCED):
                forced = model(images)
        hard = model(images)  # all four are alive at once
        loss = soft.square().sum() + 2 * forced.square().sum() + 3 * hard.square().sum() + 4 * other.square().sum()
        results = []

        def back():
            with around():
                results.append(gradients(model, loss, images))

        if thread:
            worker = threading.Thread(target=back)
            worker.start()
            worker.join()
        else:
            back()
        return results[0]

    assert_same(found(how), found(None))


@pytest.mark.parametrize(("how", "inner"), [(False, None), (True, None), (False, False), (True, True)])
@pytest.mark.parametrize(("mode", "forced"), MODES[:3])
def test_a_checkpointed_model_and_checkpoints_within_checkpoints(mode, forced, inner, how, x):
    def found(outside, inside):
        model, images = Around(converted(Net()), outside), x.clone().requires_grad_()
        model.inner.backbone.how = inside
        with routed(mode, forced):
            logits = model(images)
        with route("soft", temperature=7.0):
            return gradients(model, logits.square().sum(), images)

    assert_same(found(how, inner), found(None, None))


@pytest.mark.parametrize("how", WAYS[1:])
def test_checkpoints_within_checkpoints_of_one_network(how, x):
    def found(way):
        net = Net()
        net.first = nn.Sequential(Around(net.first, way), nn.ReLU())
        model, images = converted(net), x.clone().requires_grad_()
        model.backbone.how = way
        with route("soft", temperature=0.5):
            logits = model(images)
        return gradients(model, logits.square().sum(), images)

    assert_same(found(how), found(None))


@pytest.mark.parametrize("how", WAYS[1:])
def test_layers_in_a_network_of_ones_own(how, x):
    """No model of ours is around them: the context alone says how they are routed."""

    def found(way):
        torch.manual_seed(0)
        layers = [MoEConv2d(c, 8, 3, padding=1, bank_rows=16, num_experts=2, layer=i) for i, c in enumerate((3, 8, 8))]
        net = nn.Sequential(layers[0], nn.Tanh(), *layers[1:]).eval()
        images, logits = x.clone().requires_grad_(), []
        for context in (route("soft", temperature=0.5), route(forced=FORCED[:, :3]), route()):
            with context:
                y = net(images) if way is None else checkpoint_sequential(net, 2, images, use_reentrant=way)
                logits.append(y.mean((2, 3)))
        return gradients(net, sum(i * each.square().sum() for i, each in enumerate(logits, 1)), images)

    assert_same(found(how), found(None))


@pytest.mark.parametrize("how", WAYS[1:])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_layer_that_runs_several_times_in_a_pass(mode, how, x):
    class Again(Net):
        def __init__(self):
            super().__init__()
            del self.second

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = self.first(x) if self.how is None else checkpoint(self.first, x, use_reentrant=self.how)
            return self.head(x.mean((2, 3)))

    def found(way):
        model, images = converted(Again()), x.clone().requires_grad_()
        model.backbone.how = way
        with route(mode):
            logits = model(images)
        return gradients(model, logits.square().sum(), images)

    expected = found(None)
    if not how:
        assert_same(found(how), expected)
    else:  # there the first run leaves no graph that later runs could bring the routers' gradient back by
        torch.testing.assert_close(found(how)["backbone.head.weight"], expected["backbone.head.weight"])


@pytest.mark.parametrize("how", WAYS[1:])
def test_nothing_is_recorded_twice(how, x):
    model = converted(Net())
    model.backbone.how = how
    model.train()
    plain = copy.deepcopy(model)
    plain.backbone.how = None
    for each in (model, plain):
        images = x.clone().requires_grad_()
        with route() as routing:
            logits = each(images)
            scores, choices = dict(routing.scores), dict(routing.choices)
            logits.sum().backward()
        assert all(routing.scores[i] is scores[i] and routing.choices[i] is choices[i] for i in range(4))
    routers = [[m.norm for m in each.modules() if isinstance(m, LayerRouter)] for each in (model, plain)]
    for ours, theirs in zip(*routers, strict=True):
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("how", WAYS[1:])
def test_the_choices_of_the_pass_are_kept_though_the_routers_have_changed(how, x):
    """As where the pass that is repeated was computed in another way, and rounded otherwise."""

    def turned(model):
        for block in (model.backbone.first, model.backbone.second):
            for module in block.modules():
                if isinstance(module, LayerRouter):
                    module.scores.weight.data.neg_()
                    module.scores.bias.data.neg_()

    model, images = converted(Net()), x.clone().requires_grad_()
    model.backbone.how = how
    with route() as routing:
        logits = model(images)
    chosen = routing.pathway()
    turned(model)
    found = gradients(model, logits.square().sum(), images)
    with route(forced=chosen) as routing:
        model.backbone.how = None
        expected = gradients(model, model(images).square().sum(), images)
    own = torch.stack([routing.scores[layer].argmax(1) for layer in range(4)], 1)
    assert (own != chosen).any()
    assert_same(found, expected)


def test_an_attack_through_soft_routing(x):
    results = []
    for how in WAYS[:2]:
        model = converted(Net())
        model.backbone.how = how
        labels, generator = torch.zeros(6, dtype=torch.long), torch.Generator().manual_seed(0)
        results.append(
            pgd(model, x, labels, threat=ThreatModel(), steps=3, surrogate=soft_routing(model), generator=generator)
        )
    torch.testing.assert_close(results[1], results[0])


def test_a_pass_is_forgotten_with_its_graph(x):
    model, images = converted(Net(), "embedding"), x.clone().requires_grad_()
    model.backbone.how = False
    gc.disable()
    try:
        with route() as routing:
            logits = model(images)
        routing.shared[0].grad_fn.metadata["kept"] = kept = Net()
        kept = weakref.ref(kept)
        logits.sum().backward()
        assert kept() is not None
        del logits, routing
        assert kept() is None
    finally:
        gc.enable()

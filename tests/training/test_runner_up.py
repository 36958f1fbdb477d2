"""Experts that forgive a flip: which pathway, by hand; the loss by hand; what a step changes, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.attacks import trades_attack
from advmoe.attacks.routed import Halfspaces
from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.models import create_model
from advmoe.moe.routers import routers_of
from advmoe.moe.routing import Routing, active_routing, route
from advmoe.threat import ThreatModel
from advmoe.training.methods import learning
from advmoe.training.run import train
from advmoe.training.runner_up import OtherWay, along, runner_up, worst_reachable

TINY = {
    "model": {"name": "wrn-10-1", "width": 4, "experts_init": "independent"},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.2, "train_examples": 80},
    "threat": {"eps": "0.1"},
    "training": {
        "epochs": 1, "batch_size": 20, "step_size": 0.06, "val_attack_steps": 1, "attack_steps": 1,
        "alternation": "both", "runner_up": 0.5,
    },
}  # fmt: skip
THREADS = {"accelerator": "cpu", "threads": 1}


def tiny(model=None, **training):
    groups = {**TINY, "model": {**TINY["model"], **(model or {})}, "training": {**TINY["training"], **training}}
    return Config.from_dict(groups)


def scored(*layers):
    """A finished pass whose layers scored (N, E) like this."""
    routing = Routing()
    for layer, scores in enumerate(layers):
        routing.choose(layer, torch.tensor(scores))
    return routing


def test_the_closest_choice_goes_the_other_way():
    # Leads: (2, ln 3) and (0.5, 3); the second layer of the first image, the first of the second.
    flips = runner_up(scored([[2.0, 0.0], [0.0, 0.5]], [[0.0, math.log(3)], [3.0, 0.0]]))
    assert flips.pathways.tolist() == [[0, 0], [0, 0]]
    assert flips.weights.tolist() == pytest.approx([2 * 0.25, 2 / (1 + math.exp(0.5))])


def test_of_three_experts_it_is_the_second_and_layers_that_share_scores_go_together():
    flips = runner_up(scored([[1.0, 3.0, 2.0]], [[1.0, 3.0, 2.0]], [[9.0, 0.0, 0.0]]))
    assert flips.pathways.tolist() == [[2, 2, 0]]
    assert runner_up(scored([[1.0, 1.0]])).weights.item() == 1


def test_layers_that_do_not_run_and_layers_of_other_sizes_have_their_column():
    routing = Routing()
    routing.choose(0, torch.tensor([[1.0, 0.0]]))
    routing.choose(2, torch.tensor([[0.0, 3.0, 2.5]]))
    assert runner_up(routing).pathways.tolist() == [[0, 0, 2]]


def test_tokens_and_single_experts_have_no_runner_up():
    for scores in (torch.zeros(2, 3, 2), torch.zeros(2, 1)):
        routing = Routing()
        routing.choose(0, scores)
        with pytest.raises(InputError, match=r"training\.runner_up must be 0"):
            runner_up(routing)


def halves(*thresholds):
    """Half-spaces of images of 8x8 pixels over four layers: a bit for the mean of each half, upper and lower."""
    weights = torch.zeros(len(thresholds), 1, 8, 8, dtype=torch.double)
    for bit in range(len(thresholds)):
        weights[bit, :, 4 * bit : 4 * bit + 4] = 1 / 32
    layers = torch.arange(4) * len(thresholds) // 4
    return Halfspaces(weights, torch.tensor(thresholds).double(), layers, torch.zeros(len(thresholds)).double())


def test_only_what_can_be_reached_matters_and_of_that_the_worst():
    space = halves(0.5, 0.5)
    upper, lower = torch.tensor([0.55, 0.55, 0.9, 0.9]), torch.tensor([0.55, 0.9, 0.55, 0.9])
    x = torch.stack([upper, lower], 1).view(4, 1, 2, 1).repeat_interleave(4, 2).expand(4, 1, 8, 8).contiguous()
    pathway = torch.ones(4, 4, dtype=torch.long)
    # What a pathway says: class 1 the more, the more layers took expert 0 in the lower half; class 0 in the upper.
    says = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 3.0]])

    def told(images):
        return ((1 - active_routing().forced).float() @ says).to(images.dtype)

    flips = worst_reachable(told, x, pathway, torch.zeros(4, 2), space=space, threat=ThreatModel("linf", 0.1))
    # Flipped alone the lower bit is worst (class 1 by 6), with the upper one class 1 leads by 2 alone.
    assert flips.pathways.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert flips.weights.tolist() == [1, 1, 1, 0]
    assert flips.near.tolist() == pytest.approx([-0.05, -0.05, -0.05, -0.4], abs=1e-6)


def test_pixels_that_cannot_go_further_do_not_count():
    """Half of the upper pixels are black: they cannot get darker, so that the others must by twice as much."""
    x = torch.zeros(1, 1, 8, 8)
    x[..., :4] = 1.0
    for eps, weight in ((0.15, 0.0), (0.25, 1.0)):
        flips = worst_reachable(
            lambda z: torch.zeros(len(z), 2), x, torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 2),
            space=halves(0.4), threat=ThreatModel("linf", eps),
        )  # fmt: skip
        assert flips.weights.item() == weight  # the mean of 1/2 comes down by eps / 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = create_model("wrn-10-1", num_classes=3, kind="moe", width=4, scale=0.5, router="layer", num_experts=2)
    made(torch.rand(16, 3, 8, 8))
    return made.eval()


def test_the_attack_is_on_the_other_pathway_and_the_loss_is_its_divergence(model):
    x, threat = torch.rand(8, 3, 8, 8), ThreatModel("linf", 0.1)
    seen = []

    def search(predict, images, *, target):
        seen.append((predict(images), target))
        start = torch.Generator().manual_seed(0)
        return trades_attack(predict, images, threat=threat, steps=3, step_size=0.05, generator=start, target=target)

    with route() as routing:
        clean = model(x)
    other = OtherWay.of(model, x, 0.5, search)
    flips = runner_up(routing)
    assert sorted(other.index.tolist()) == sorted(flips.weights.topk(4).indices.tolist())
    assert other.pathways.tolist() == flips.pathways[other.index].tolist()
    assert not torch.equal(other.pathways, routing.pathway()[other.index])
    with torch.no_grad():
        ((there, target),) = seen
        assert torch.allclose(there, along(model, other.pathways)(x[other.index]), atol=1e-6)
        assert torch.allclose(target, clean[other.index], atol=1e-6)
        p, q = (F.softmax(each, 1) for each in (clean[other.index], along(model, other.pathways)(other.x_adv)))
        by_hand = 6 * (other.weights * (p * (p / q).log()).sum(1)).sum() / 8
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    logits = clean.detach().requires_grad_()
    with learning(model, "all"):
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)):
            norm.eval()  # by the statistics, as the attack was made
        model.train = lambda: model
        loss = other.loss(model, model, logits, 6.0)
        del model.train
    loss.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is None for router in routers_of(model) for parameter in router.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters()) and logits.grad.abs().sum() > 0
    assert (other.x_adv - x[other.index]).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({}, {"method": "advmoe"}),
        ({"router": "image"}, {"method": "advmoe", "alternation": "shared-attack", "awp": 0.005}),
        ({"router": "fixed-top-bottom"}, {"method": "at"}),
        ({"router": "linear"}, {"method": "at", "radius": 1.0, "ema": 0.9}),
        ({}, {"method": "advmoe", "runner_up": 0.01, "precision": "bf16-mixed"}),  # two images
    ],
)
def test_runs_learn_by_it_and_repeat_bit_for_bit(tmp_path, model, training):
    whole = train(tiny(model, epochs=2, **training), run_dir=tmp_path / "whole", **THREADS)
    text = (whole / "metrics.jsonl").read_text()
    assert '"runner_up"' in text
    half = train(tiny(model, epochs=2, **training), run_dir=tmp_path / "again", **THREADS)
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    without = train(tiny(model, epochs=2, **{**training, "runner_up": 0.0}), run_dir=tmp_path / "without", **THREADS)
    assert '"runner_up"' not in (without / "metrics.jsonl").read_text()
    assert (without / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        (
            {"model": {"kind": "s-dense"}, "training": {"method": "at"}},
            "model.kind must be moe when training.runner_up",
        ),
        ({"training": {"method": "standard"}}, "training.method must be one that trains experts against attacks"),
        ({"training": {"objective": "pgd-at"}}, "training.objective must be trades when training.runner_up is > 0"),
        ({"model": {"num_experts": 1}}, "model.num_experts must be >= 2 when training.runner_up is > 0"),
        (
            {"model": {"name": "deit-tiny", "width": 32, "route_per": "token"}},
            "model.route_per must be image when training.runner_up is > 0",
        ),
        ({"training": {"runner_up": 1.5}}, "training.runner_up must be"),
    ],
)
def test_what_it_cannot_be_is_refused(groups, told):
    with pytest.raises(ValueError, match=told):
        tiny(groups.get("model"), **groups.get("training", {}))

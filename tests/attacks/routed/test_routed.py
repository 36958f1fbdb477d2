"""The attack on routed models as a whole: its parts in order, their proposals, and models planted to hide gradients."""

from dataclasses import replace

import pytest
import torch
from planted import L2, LINF, SMALL, WIDE, Planted, Toy, against_zero, opened, planted_images
from torch import nn

import advmoe
from advmoe.attacks.routed import (
    Budget,
    Combination,
    RoutedPlan,
    RoutedTarget,
    along_pathway,
    combined,
    routed_attack,
)
from advmoe.config import AttackConfig, Pixels
from advmoe.evaluation.accuracy import assess
from advmoe.evaluation.outcomes import Measurement
from advmoe.evaluation.scoring import OpenRouting, run_attack
from advmoe.moe.routing import pathway
from advmoe.threat import ThreatModel


def assessed(model, data, *, threat=LINF, attacks=("pgd-20", "routed"), allow=(), steps=8, queries=0, **kwargs):
    attack = AttackConfig(steps=steps, step_size=Pixels("2/255"), queries=queries, pathways=2)
    measurement = Measurement(threat=threat, attack=attack, attacks=attacks, **kwargs)
    return assess(lambda _: model, data, measurement, allow=allow).result


def counts(result):
    return {name: (each["attempted"], each["broken"]) for name, each in result["attacks"]["routed"]["parts"].items()}


def test_pathways_in_order():
    # Two layers of three experts; images 0 and 1 take (1, 0) and (2, 2). Nothing ever fools.
    scores = torch.tensor([[[0, 2, 1], [3, 0, 0]], [[0, 1, 2], [0, 1, 2]]]).float()
    x, y = torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.long)
    toy = Toy(lambda z: against_zero(0 * z[:, 0, 0, 0] - 1), lambda z: scores + 0 * z.view(-1, 1, 1))
    plan = RoutedPlan(Combination(), (), 0, 3, ((0, 1), (2, 2)))
    target = RoutedTarget(toy, lambda z: toy(z).logits, WIDE)
    attack = routed_attack(target, plan, Budget(pathway_steps=2, queries=0))
    next(part for part in attack.parts if part.name == "pathways").run(x, y, 0)
    expected = [
        [[0, 1], [0, 1]],  # reached
        [[2, 2], [2, 2]],
        [[2, 0], [0, 2]],  # the first layer's choice changed, to the next and the one after
        [[0, 0], [1, 2]],
        [[1, 1], [2, 0]],  # the second's
        [[1, 2], [2, 1]],
    ]
    assert toy.forced[::2] == toy.forced[1::2] == expected  # 2 steps along each
    assert len(expected) == len(plan.pathways) + 2 * (3 - 1)


# Proposals

NAMES = ["soft T=0.3", "soft T=3", "routers w=0.1", "routers w=10", "pathways", "strongest"]


def attack_on(model, *, threat, budget=SMALL):
    best = Combination(weight=1.0, schedule="cosine")
    plan = RoutedPlan(best, (), 0, 2, ((0,), (1,)))
    return routed_attack(opened(model, threat), plan, budget)


def test_parts_in_order():
    attack = attack_on(Planted(), threat=LINF)
    assert [part.name for part in attack.parts] == NAMES
    assert attack.flags == ("the black-box part is left out (0 queries)",)
    attack = attack_on(Planted(), threat=LINF, budget=replace(SMALL, queries=10))
    assert [part.name for part in attack.parts] == [*NAMES, "square"] and attack.flags == ()


@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel("l2", 2.0)], ids=str)
def test_proposals_are_in_the_threat_model_and_follow_from_the_seed(threat):
    torch.manual_seed(0)
    model = Planted(looks_at=1, threshold=0.6, steepness=3.0)
    nn.init.normal_(model.layer.bank)
    model.requires_grad_(False)
    model.layer.bank[:, 2] = 0  # sign steps end in the same corner from any start, but here there is nothing to climb
    x = torch.rand(6, 3, 8, 8).round(decimals=1).contiguous(memory_format=torch.channels_last)  # some at 0 and 1
    y = model(x).argmax(1)
    for part in attack_on(model, threat=threat).parts:
        first, again, other = (part.run(x, y, seed).x_adv for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        inside(first, x, threat)
    outcome = run_attack(attack_on(model, threat=threat), model, x, y, threat=threat, purpose=(0,))
    inside(outcome.x_adv, x, threat)
    assert torch.equal(model(outcome.x_adv).argmax(1), outcome.predicted)
    assert torch.equal(outcome.predicted == y, outcome.robust)


def inside(x_adv, x, threat):
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    assert size.max() <= threat.eps * (1 + 1e-5) and size.max() > 0.5 * threat.eps
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_what_one_pathway_breaks_the_next_leaves_alone(no_straight_through):
    model, (x, y) = Planted(steepness=1e5).requires_grad_(False), planted_images()
    plan = RoutedPlan(Combination(), (), 0, 2, ((1,), (0,)))  # the first leads to the wrong class, the second does not
    open_routing, tried = OpenRouting(model), []

    def recorded(x, *, temperature=None, forced=None):
        tried.extend([] if forced is None else forced[:, 0].tolist())
        return open_routing(x, temperature=temperature, forced=forced)

    attack = routed_attack(RoutedTarget(recorded, model, LINF), plan, SMALL)
    proposals = next(part for part in attack.parts if part.name == "pathways").run(x, y, 0)
    assert torch.equal(model(proposals.x_adv).argmax(1), 1 - y)
    assert tried == [1] * 12 * SMALL.pathway_steps


def test_every_part_gets_what_the_ones_before_left(no_straight_through):
    # The routers' score is 4000 x (channel 0 - 1/2); below about -104 x T the softmax underflows, and soft routing has
    # no gradient. So from 0.498 (-8) T=0.3 moves it, from 0.485 (-60) T=1, from 0.4705 (-118) T=3, and 0.45 is too far.
    x, y = planted_images()
    x[:, 0] = torch.tensor([0.498] * 3 + [0.485] * 3 + [0.4705] * 2 + [0.45] * 2 + [0.498] * 2)[:, None, None]
    y[10:] = 1 - y[10:]  # misclassified from the start, and never attacked
    result = assessed(Planted(steepness=4000.0), (x, y), batch_size=5)
    assert counts(result) == {
        "soft T=0.3": (10, 3),
        "soft T=1": (7, 3),
        "soft T=3": (4, 2),
        "routers w=0.01": (2, 0),
        "routers w=0.1": (2, 0),
        "routers w=1": (2, 0),
        "pathways": (2, 0),
        "strongest": (2, 0),
    }
    assert result["clean_accuracy"] == pytest.approx(10 / 12)
    assert result["robust_accuracy"] == {"pgd-20": pytest.approx(10 / 12), "routed": pytest.approx(2 / 12)}
    assert result["masking_gap"] == pytest.approx(8 / 12)
    report = result["attacks"]["routed"]
    assert report["flags"] == {"the black-box part is left out (0 queries)": 3}  # of 3 batches
    assert report["settings"]["search"]["examples"] == 10


def test_no_image_right_is_none_attacked(no_straight_through):
    x, y = planted_images()
    result = assessed(Planted(), (x, 1 - y))
    assert result["clean_accuracy"] == result["worst_case"] == 0
    assert set(counts(result).values()) == {(0, 0)}
    assert result["attacks"]["routed"]["settings"]["search"]["examples"] == 0


# Planted masking


def test_masked_gradients_are_found(no_straight_through):
    # Hard routing without a gradient; router scores that saturate; logits whose cross-entropy underflows.
    model, data = Planted(steepness=1e5, scale=1e4), planted_images()
    with pytest.raises(ValueError, match="gradients: 12 of 12 images have a gradient of exactly 0"):
        advmoe.evaluate(model, data, attacks=["pgd-20", "routed"])
    result = advmoe.evaluate(model, data, attacks=["pgd-20", "routed"], steps=8, allow=("gradients",))
    assert result["clean_accuracy"] == result["robust_accuracy"]["pgd-20"] == 1
    assert result["robust_accuracy"]["routed"] == result["worst_case"] == 0 and result["masking_gap"] == 1
    assert counts(result)["square"] == (0, 0)  # gradients found them all, of the routers at the latest
    assert counts(result)["soft T=1"] == (12, 0) and counts(result)["routers w=0.01"] == (12, 12)


def test_masked_gradients_of_a_network_are_found(make_routed, make_images, no_straight_through):
    class Saturated(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 1e4 * self.model(x)

    model, x = Saturated(make_routed(router="embedding")).eval(), make_images(10, seed=7)
    with torch.no_grad():
        y = model(x).argmax(1)
    result = assessed(model, (x, y), steps=5, allow=("gradients",))
    assert result["robust_accuracy"]["pgd-20"] >= 0.9
    assert result["robust_accuracy"]["routed"] <= 0.5 and result["masking_gap"] > 0.3
    assert len(pathway(model, x).unique(dim=0)) > 1
    failed = [each["name"] for each in result["checks"] if not each["passed"]]
    assert failed == ["gradients"]


@pytest.mark.parametrize("steepness", [1.0, 1e5], ids=["soft", "saturated"])
def test_masked_routing_is_found(no_straight_through, steepness):
    # The classifier has a gradient, so every check passes; along its pathway it holds, along the other it is wrong.
    x, y = planted_images()
    model = Planted(steepness=steepness).requires_grad_(False)
    result = assessed(model, (x, y), attacks=("pgd-20", "pgd-20-margin", "routed"))
    assert all(each["passed"] for each in result["checks"])
    assert result["robust_accuracy"] == {"pgd-20": 1, "pgd-20-margin": 1, "routed": 0}
    own, other = (torch.full((12, 1), expert) for expert in (0, 1))
    assert pathway(model, x).tolist() == own.tolist()
    # Each kind of part does it alone: the routers' margins, and the pathway that no clean image takes.
    arguments, sizes = (opened(model), x, y), [2 / 255] * 20
    assert combined(*arguments, Combination(weight=1.0), sizes)[1].all()
    assert along_pathway(*arguments, other, sizes)[1].all()
    assert not along_pathway(*arguments, own, sizes)[1].any()
    soft = combined(*arguments, Combination(temperature=1.0), sizes)[1]
    assert soft.all() if steepness == 1 else not soft.any()


class Steps(nn.Module):
    """A router without any gradient: expert 1 where the mean of channel 0 exceeds 0.49."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0].mean((1, 2)) > 0.49).long(), 2).float()


def test_square_finds_what_has_no_gradient():
    model = Planted()
    model.layer.router = Steps()
    result = assessed(model, planted_images(), queries=300)
    broken = counts(result)
    assert list(broken)[-1] == "square" and broken["square"] == (12, 12)
    assert all(each == (12, 0) for name, each in broken.items() if name != "square")
    assert result["robust_accuracy"] == {"pgd-20": 1, "routed": 0}
    assert result["attacks"]["routed"]["flags"] == {}


def test_a_plain_model_gains_nothing_from_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(10, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    result = advmoe.evaluate(model, (x, y), attacks=["pgd-5", "routed"], steps=5)
    assert result["attacks"]["routed"] == {"skipped": "the model has no MoE layers, so routed adds nothing"}
    assert list(result["robust_accuracy"]) == ["pgd-5"]
    assert result["worst_case"] == result["robust_accuracy"]["pgd-5"] < 1 and result["masking_gap"] == 0

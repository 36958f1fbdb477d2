"""The attacks on routed models: values worked by hand, and models planted to hide their gradients."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import advmoe
from advmoe.attacks.routed import (
    Budget,
    Combination,
    Pass,
    RoutedPlan,
    RoutedTarget,
    along_pathway,
    combined,
    plan_attack,
    routed_attack,
    router_margins,
    search,
    step_sizes,
    stride,
)
from advmoe.config import AttackConfig, Pixels
from advmoe.evaluation.accuracy import assess
from advmoe.evaluation.outcomes import Measurement
from advmoe.evaluation.scoring import OpenRouting, run_attack
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routing import forward_scope, pathway
from advmoe.threat import ThreatModel

LINF, L2 = ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.3)
WIDE = ThreatModel("linf", 0.1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(*columns):
    """One image of a single pixel for each entry, a channel for each column."""
    return torch.stack([torch.tensor(column) for column in columns], 1)[:, :, None, None]


class Toy:
    """A routed model of two functions of the pixels, (N, K) logits and (N, L, E) scores, that notes what was forced."""

    def __init__(self, logits, scores):
        self.logits, self.scores, self.forced = logits, scores, []

    def __call__(self, x, *, temperature=None, forced=None):
        scores = tuple(self.scores(x).unbind(1))
        if forced is not None:
            self.forced.append(forced.tolist())
        chosen = torch.stack([each.argmax(1) for each in scores], 1)
        return Pass(self.logits(x), scores, chosen if forced is None else forced)


def against_zero(margin):
    """The logits (0, margin), or for scores the same of one layer."""
    return torch.stack([torch.zeros_like(margin), margin], -1)


class Planted(nn.Module):
    """One MoE layer of two experts; logits are `scale` x the mean of its output.

    The router's score for expert 1 is `steepness` x (mean of channel `looks_at` - `threshold`), and 0 for expert 0.
    """

    def __init__(self, *, looks_at=0, threshold=0.5, steepness=1.0, scale=1.0):
        super().__init__()
        self.scale = scale
        self.layer = MoEConv2d(3, 2, 1, bank_rows=4, num_experts=2, layer=0)
        # Expert 0 says class 1 where channel 1 exceeds channel 2 (1/2 throughout), expert 1 the opposite.
        rows = [[0, -1, 1], [0, 1, -1], [0, 1, -1], [0, -1, 1]]
        router = self.layer.router
        with torch.no_grad():
            self.layer.bank.copy_(torch.tensor(rows).float().view(4, 3, 1, 1))
            for parameter in router.parameters():
                parameter.zero_()
            router.norm.weight.fill_(1)
            router.hidden.weight[0, looks_at] = 1
            router.scores.weight[1, 0] = steepness
            router.scores.bias[1] = -steepness * threshold
        self.eval()

    def forward(self, x):
        with forward_scope():
            return self.scale * self.layer(x).mean((2, 3))


def planted_images(n=12):
    """Channel 0 a little below 1/2, channel 1 far above it for class 1 and far below for class 0, channel 2 at 1/2."""
    x, y = torch.full((n, 3, 8, 8), 0.5), torch.arange(n) % 2
    x[:, 0], x[:, 1] = 0.48, torch.where(y == 1, 0.8, 0.2)[:, None, None]
    x += 0.02 * torch.rand(x.shape, generator=seeded(1)) - 0.01
    return x.contiguous(memory_format=torch.channels_last), y


@pytest.fixture
def no_straight_through(monkeypatch):
    """Hard routing without any gradient to the gate."""
    monkeypatch.setattr("advmoe.ops.straight_through", lambda y, gate: y)


def opened(model, threat=LINF):
    """The model as its attacker sees it."""
    return RoutedTarget(OpenRouting(model), model, threat)


def assessed(model, data, *, threat=LINF, attacks=("pgd-20", "routed"), allow=(), steps=8, queries=0, **kwargs):
    attack = AttackConfig(steps=steps, step_size=Pixels("2/255"), queries=queries, pathways=2)
    measurement = Measurement(threat=threat, attack=attack, attacks=attacks, **kwargs)
    return assess(lambda _: model, data, measurement, allow=allow).result


def counts(result):
    return {name: (each["attempted"], each["broken"]) for name, each in result["attacks"]["routed"]["parts"].items()}


# By hand


def test_router_margins_by_hand():
    scores = (torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[5.0, 1.0], [1.0, 4.0]]))
    margins = router_margins(scores, torch.tensor([[0, 1], [1, 0]]))
    assert margins.tolist() == [[3 - 1, 1 - 5], [2 - 0, 1 - 4]]
    three = (torch.tensor([[1.0, 4.0, 6.0]]),)
    assert [router_margins(three, torch.tensor([[e]])).item() for e in range(3)] == [1 - 6, 4 - 6, 6 - 4]


def test_a_lone_expert_has_no_margin():
    assert router_margins((torch.ones(2, 1),) * 3, torch.zeros(2, 3, dtype=torch.long)).tolist() == [[0] * 3] * 2


def test_step_sizes_by_hand():
    assert step_sizes("constant", 3, 0.01, 0.1) == [0.01] * 3
    half = math.sqrt(0.5)
    assert step_sizes("cosine", 4, 0.01, 0.1) == pytest.approx([0.2, 0.1 * (1 + half), 0.1, 0.1 * (1 - half)])
    for steps in (1, 2, 7, 50):
        sizes = step_sizes("cosine", steps, 0.01, 0.1)
        assert len(sizes) == steps and sizes[0] == pytest.approx(0.2) and min(sizes) > 0
        assert sum(sizes) == pytest.approx(0.1 * (steps + 1))  # the cosines other than cos(0) cancel
        assert sizes == sorted(sizes, reverse=True)


def test_steps_too_short_to_cross_the_ball_are_lengthened():
    assert stride(2 / 255, 20, 8 / 255) == 2 / 255
    assert stride(0.01, 10, 1.0) == 0.25


def test_a_budget_s_step_sizes():
    budget = Budget(step_size=0.01)
    assert budget.sizes(20, 0.02) == [0.01] * 20
    assert budget.sizes(10, 1.0) == [0.25] * 10  # 2.5 times the radius in all
    assert budget.sizes(4, 0.1, "cosine") == step_sizes("cosine", 4, 0.0625, 0.1)


BAND = (0.435, 0.465)


def in_band(x):
    """A margin that rises everywhere in pixel 0, is positive in a band, and far below 0 elsewhere."""
    p = x[:, 0, 0, 0]
    return p - 10 + 20 * ((p > BAND[0]) & (p < BAND[1]))


def iterates(x, steps):
    """What ascent in pixel 0 by steps of 0.01 visits from the random starts of `seeded()`, (steps + 1, N)."""
    start = WIDE.random_start(x, seeded())[:, 0, 0, 0]
    return torch.stack([(start + 0.01 * step).clamp_max(0.6) for step in range(steps + 1)])


@pytest.mark.parametrize(
    ("how", "seen"),
    [("hard", range(11)), ("soft", (3, 7, 10)), ("own pathway", range(11)), ("other pathway", (3, 7, 10))],
)
def test_the_first_iterate_that_fools_is_kept(how, seen):
    x, y = torch.full((40, 1, 1, 1), 0.5), torch.zeros(40, dtype=torch.long)
    toy = Toy(lambda z: against_zero(in_band(z)), lambda z: against_zero(0 * z[:, 0, 0] - 1))
    arguments, sizes = (RoutedTarget(toy, lambda z: toy(z).logits, WIDE), x, y), [0.01] * 10
    if "pathway" in how:
        forced = torch.full((40, 1), int(how == "other pathway"))
        x_adv, fooled = along_pathway(*arguments, forced, sizes, seeded())
    else:
        combination = Combination(temperature=None if how == "hard" else 1.0)
        x_adv, fooled = combined(*arguments, combination, sizes, seeded())
    path = iterates(x, 10)[list(seen)]
    hits = (path > BAND[0]) & (path < BAND[1])
    expected = torch.where(hits.any(0), path[hits.int().argmax(0), torch.arange(40)], path[-1])
    assert fooled.tolist() == hits.any(0).tolist() and 5 < fooled.sum() < 35
    torch.testing.assert_close(x_adv[:, 0, 0, 0], expected)
    assert not hits[-1].all() and hits[-1].sum() < hits.any(0).sum()  # the last iterate alone would show fewer


def test_only_the_deployed_model_decides():
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.long)
    wrong = Toy(lambda z: against_zero(1 + z[:, 0, 0, 0]), lambda z: against_zero(z[:, 0, 0]))
    target = RoutedTarget(wrong, lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2), WIDE)
    assert combined(target, x, y, Combination(), [0.01] * 3)[1].tolist() == [False] * 4
    forced = torch.zeros(4, 1, dtype=torch.long)
    assert along_pathway(target, x, y, forced, [0.01] * 3)[1].tolist() == [False] * 4


def test_a_router_is_pulled_no_further_than_it_must():
    # Channel 0 moves the router alone, which chooses expert 1 above 0.53; channel 1 the classifier alone, which holds.
    x, y = pixels([0.5] * 20, [0.5] * 20), torch.ones(20, dtype=torch.long)
    toy = Toy(lambda z: against_zero(z[:, 1, 0, 0] + 1), lambda z: against_zero(z[:, 0, 0] - 0.53))
    target = RoutedTarget(toy, lambda z: toy(z).logits, WIDE)
    x_adv, fooled = along_pathway(target, x, y, torch.ones(20, 1, dtype=torch.long), [0.02] * 12, seeded())
    start = WIDE.random_start(x, seeded())[:, 0, 0, 0]
    missing = ((0.53 - start) / 0.02).ceil().clamp_min(0)
    torch.testing.assert_close(x_adv[:, 0, 0, 0], start + 0.02 * missing)
    torch.testing.assert_close(x_adv[:, 1, 0, 0], torch.full((20,), 0.4))  # down to the edge of the ball
    assert not fooled.any() and missing.min() == 0 and missing.max() > 3


@pytest.mark.parametrize(("anchor", "ends"), [("clean", (0.6, 0.6)), ("current", (0.48, 0.54))])
def test_routers_are_pushed_off_the_anchor(anchor, ends):
    # The router chooses expert 1 above 0.51; images at 0.5 start on expert 0. Pushed off the clean choice they go on to
    # the edge, pushed off the current one they turn back at the threshold. The classifier knows nothing of pixels.
    x, y = torch.full((20, 1, 1, 1), 0.5), torch.zeros(20, dtype=torch.long)
    toy = Toy(lambda z: against_zero(0 * z[:, 0, 0, 0] - 1), lambda z: against_zero(z[:, 0, 0] - 0.51))
    target = RoutedTarget(toy, lambda z: toy(z).logits, WIDE)
    x_adv, _ = combined(target, x, y, Combination(weight=1.0, anchor=anchor), [0.02] * 11, seeded())
    assert bool(((x_adv >= ends[0] - 1e-6) & (x_adv <= ends[1] + 1e-6)).all())


@pytest.mark.parametrize("loss", ["margin", "dlr"])
def test_scales_of_logits_and_scores_change_nothing(loss):
    torch.manual_seed(0)
    w, r = torch.randn(6, 4), torch.randn(6, 2 * 3)
    x, y = torch.rand(5, 6, 1, 1), torch.arange(5) % 4

    def attacked(logits, scores):
        toy = Toy(lambda z: logits * z.flatten(1) @ w, lambda z: (scores * z.flatten(1) @ r).unflatten(1, (2, 3)))
        target, sizes, generator = RoutedTarget(toy, lambda z: toy(z).logits, WIDE), [0.03] * 5, seeded()
        forced = torch.tensor([[0, 1]]).expand(5, 2)
        mixed = combined(target, x, y, Combination(loss=loss, weight=0.3), sizes, generator)
        return torch.cat([*mixed[:1], along_pathway(target, x, y, forced, sizes, generator)[0]])

    expected = attacked(1, 1)
    for logits, scores in ((2**14, 1), (1, 2**14), (2**-10, 2**6)):  # powers of two scale without rounding
        torch.testing.assert_close(attacked(logits, scores), expected)


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


# The search and the plan

SMALL = Budget(steps=4, search_steps=4, pathway_steps=4, queries=0, temperatures=(0.3, 3.0), weights=(0.1, 10.0))


def test_the_search_is_greedy(no_straight_through):
    x, y = planted_images()
    model = Planted(steepness=1e5).requires_grad_(False)
    arguments, settings = (opened(model), x, y), {"budget": SMALL, "seed": 3}
    best, tried = search(*arguments, **settings)
    # Saturated routers leave soft routing without a gradient, and no loss of the classifier moves them. The first of
    # the router losses breaks all; what follows is tried with it. Two classes leave out dlr.
    first = Combination()
    expected = [first, *(replace(first, temperature=t) for t in (0.3, 3.0)), replace(first, loss="ce")]
    leader = max(tried[:4], key=lambda each: (each.broken, each.margin)).combination
    expected += [replace(leader, weight=w, anchor=a) for w in (0.1, 10.0) for a in ("current", "clean")]
    assert [each.combination for each in tried[:-1]] == expected
    assert [each.broken for each in tried[:4]] == [0] * 4 and all(each.broken == 12 for each in tried[4:])
    leader = max(tried[:8], key=lambda each: (each.broken, each.margin)).combination
    assert tried[-1].combination == replace(leader, schedule="cosine") and best in (leader, tried[-1].combination)
    assert search(*arguments, **settings) == (best, tried)
    # What is reported is what another pass finds.
    for each in tried:
        schedule = each.combination.schedule
        sizes = step_sizes(schedule, 4, stride(SMALL.step_size, 4, LINF.eps), LINF.eps)
        x_adv, _ = combined(*arguments, each.combination, sizes, seeded(3))
        logits = model(x_adv)
        assert each.broken == (logits.argmax(1) != y).sum()
        margin = logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])
        assert each.margin == pytest.approx(margin.mean().item(), abs=1e-6)


def test_ties_go_to_the_first_tried():
    flat = Toy(lambda z: torch.tensor([[2.0, 1.0, 0.0]]).expand(len(z), 3), lambda z: torch.zeros(len(z), 2, 2))
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.long)
    target = RoutedTarget(flat, lambda z: flat(z).logits, WIDE)
    best, tried = search(target, x, y, budget=Budget(search_steps=1), seed=0)
    assert best == Combination() and {(each.broken, each.margin) for each in tried} == {(0, -1.0)}
    # 1 + 3 temperatures + 2 other losses (three classes: with dlr) + 3 weights x 2 anchors + 1 schedule.
    assert len(tried) == 13 and "dlr" in {each.combination.loss for each in tried}


def test_the_plan_takes_the_most_frequent_pathways_and_survives_json(no_straight_through):
    model, (x, y) = Planted().requires_grad_(False), planted_images(4)
    reached = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 1]])
    budget = replace(SMALL, pathways=2)
    plan = plan_attack(opened(model), x, y, reached, budget=budget, seed=0)
    assert plan.pathways == ((1, 1), (0, 1)) and plan.reached == 3 and plan.examples == 4
    assert RoutedPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["pathways"] == {"reached": 3, "attacked": 2}
    assert told["search"]["best"] == str(plan.best) in [each["combination"] for each in told["search"]["tried"]]

    none = plan_attack(opened(model), x[:0], y[:0], reached, budget=budget, seed=0)
    assert none == RoutedPlan(Combination(), (), 0, 3, ((1, 1), (0, 1)))
    assert RoutedPlan.from_json(json.loads(json.dumps(none.to_json()))) == none


def test_a_combination_in_words():
    assert str(Combination()) == "straight-through, margin, constant steps"
    mixed = Combination(temperature=0.3, loss="ce", weight=10.0, anchor="clean", schedule="cosine")
    assert str(mixed) == "soft T=0.3, ce + 10 x router margins (clean), cosine steps"


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


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_that_pull_apart(no_straight_through, scale):
    # Class 1 loses where channel 1 falls, but expert 1, which answers the opposite, is chosen where it rises.
    x, y = planted_images(24)
    x, y = x[y == 1], y[y == 1]
    model = Planted(looks_at=1, threshold=0.815, scale=scale).requires_grad_(False)
    for weight in (0.1, 1.0, 10.0):
        _, fooled = combined(opened(model), x, y, Combination(weight=weight), [2 / 255] * 20)
        assert fooled.all()


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

"""A plain model's counterpart of `routed`: its parts, and that its budget is no smaller."""

import pytest
import torch
from torch import nn

import advmoe
from advmoe.attacks.restarts import restarts_attack
from advmoe.threat import ThreatModel

UNBREAKABLE = ThreatModel("linf", 1e-6)
"""A ball in which no random start or step changes an answer."""


class Corner(nn.Module):
    """Class 1 where the first pixel exceeds 1/2."""

    def forward(self, x):
        score = 10 * (x[:, :1, 0, 0] - 0.5)
        return torch.cat([-score, score], 1)


def test_half_the_starts_ascend_the_margin_and_half_cross_entropy():
    seen = []

    def recorded(x):
        seen.append((len(x), x.requires_grad))
        return Corner()(x)

    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([1, 1])
    x[0], x[1] = 0.9, 0.51  # the first is out of reach, the second falls to any start
    attack = restarts_attack(recorded, threat=ThreatModel("linf", 0.1), restarts=3, steps=2, step_size=0.01)
    assert attack.name == "restarts-6" and [part.name for part in attack.parts] == ["margin", "ce"]
    # A step of 0.01 is lengthened so that two of them cross the ball and come back: 2.5 * 0.1 / 2.
    assert attack.settings == {"steps": 2, "step_size": 0.125, "restarts": {"margin": 2, "ce": 1}, "queries": 0}
    margin, ce = attack.parts
    broken = recorded(margin.run(x, y, 0).x_adv).argmax(1) != y
    assert broken.tolist() == [False, True]
    steps = [images for images, gradient in seen if gradient]
    assert steps == [2, 2, 1, 1]  # two starts of two steps, the second without the image that fell
    seen.clear()
    ce.run(x[:1], y[:1], 0)
    assert [images for images, gradient in seen if gradient] == [1, 1]
    single = restarts_attack(recorded, threat=ThreatModel("linf", 0.1), restarts=1, steps=2, step_size=0.01)
    assert [part.name for part in single.parts] == ["margin"]


def test_square_is_part_of_it_where_routed_has_it():
    pytest.importorskip("pyautoattack")
    attack = restarts_attack(Corner(), threat=UNBREAKABLE, restarts=2, steps=2, step_size=0.01, queries=7)
    assert [part.name for part in attack.parts] == ["margin", "ce", "square"] and attack.settings["queries"] == 7


def test_plain_and_routed_models_are_attacked_with_equal_budgets(make_routed, make_images):
    x = make_images(6, seed=7)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).eval()
    told = {}
    for model, strong in ((plain, ["restarts"]), (make_routed(router="embedding").eval(), ["pgd-soft", "routed"])):
        with torch.no_grad():
            y = model(x).argmax(1)
        settings = {"threat": UNBREAKABLE, "steps": 3, "step_size": 1e-7, "queries": 0, "allow": ("gradients",)}
        usual = advmoe.evaluate(model, (x, y), **settings)
        most = advmoe.evaluate(model, (x, y), attacks=["pgd", *strong], **settings)
        assert usual["worst_case"] == most["worst_case"] == 1
        told[strong[-1]] = usual["gradient_passes"], most["gradient_passes"], most["attacks"]
    # What is attacked by default takes the same number of gradient steps, and so do the strongest suites, but for
    # pathways that this model's images do not reach.
    assert told["restarts"][0] == told["routed"][0] == {"straight_through": 3, "worst_case": 6}
    reached = told["routed"][2]["routed"]["settings"]["pathways"]["attacked"]
    assert 1 < reached <= 6
    assert told["routed"][1]["worst_case"] == 3 + 3 + 3 * (10 + reached + 16)  # 16 layers, whose choice can change
    assert told["restarts"][1]["worst_case"] == 3 + 3 + 3 * (10 + 32 + 16)

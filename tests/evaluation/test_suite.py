"""Attacks by name: what each name means, in full, and which a model has no use for."""

import pytest

from advmoe.config import AttackConfig, Pixels
from advmoe.evaluation.suite import ATTACKS, Setting, default_attacks, named, require_classes, stretched
from advmoe.threat import ThreatModel


def setting(routed=True, **attack):
    fields = {"steps": 7, "step_size": Pixels("0.01"), "queries": 0, **attack}
    return Setting(threat=ThreatModel("linf", 0.05), attack=AttackConfig(**fields), routed=routed)


def test_the_usual_attacks_are_pgd_and_as_many_steps_through_soft_routing_or_on_the_margin():
    assert default_attacks(setting()) == ("pgd-7", "pgd-7-soft")
    assert default_attacks(setting(routed=False)) == ("pgd-7", "pgd-7-margin")


@pytest.mark.parametrize(
    ("name", "fields", "full"),
    [
        # Of routed: 3 temperatures, 3 weights and 4 for the strongest, of 50 steps each; 32 + 16 pathways of 20 steps.
        ("restarts", {"steps": 50}, "restarts-1550"),  # 50 of pgd-soft + 500 + 960 = 1510, which is 31 starts
        ("restarts", {"steps": 50, "pathways": 4}, "restarts-950"),  # 50 + 500 + 400
        ("restarts", {"steps": 7, "restarts": 3}, "restarts-427"),  # 21 + 70 + 48 * 7
        ("restarts:16", {"steps": 50, "pathways": 4}, "restarts-950"),
        ("restarts:48", {"steps": 50, "pathways": 4}, "restarts-1600"),  # 50 + 500 + 52 * 20 = 1590
        ("restarts-100", {"steps": 50}, "restarts-100"),
        ("restarts-101", {"steps": 50}, "restarts-150"),
        ("restarts-1", {"steps": 50}, "restarts-50"),
    ],
)
def test_restarts_take_the_gradient_steps_of_routed_and_soft_routing_in_whole_starts(name, fields, full):
    plain = setting(routed=False, **fields)
    assert named([name], plain) == (full,) and named([full], plain) == (full,)
    attack = ATTACKS.find(name).build(None, plain, None)
    starts = attack.settings["restarts"]
    assert attack.name == full and sum(starts.values()) * fields["steps"] == int(full.removeprefix("restarts-"))
    assert 0 <= starts["margin"] - starts["ce"] <= 1


def test_names_are_said_in_full_and_once():
    asked = ["pgd", "pgd-7", "pgd-3-margin", "pgd-soft", "routed", "pgd-dlr-soft", "pgd-3-margin", "pgd-pma"]
    assert named(asked, setting()) == ("pgd-7", "pgd-3-margin", "pgd-7-soft", "routed", "pgd-7-dlr-soft", "pgd-7-pma")


@pytest.mark.parametrize("name", ["pgd-07", "pgd-100000", "pgd-3-ce", "pgd-soft-margin", "PGD", "", "pgd-3-"])
def test_other_spellings_are_no_attacks(name):
    with pytest.raises(ValueError, match="attacks must be one of"):
        named([name], setting())


def test_what_a_model_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="must not name soft routing for a model without MoE layers, got 'pgd-7-soft'"):
        named(["pgd-soft"], setting(routed=False))
    with pytest.raises(ValueError, match="must not use the loss dlr for less than 3 classes, got 'pgd-7-dlr' for 2"):
        require_classes(["pgd-7", "pgd-7-dlr"], 2)
    require_classes(["pgd-7", "pgd-7-dlr", "autoattack:apgd-dlr"], 3)


@pytest.mark.parametrize(
    ("name", "eps", "size"),
    [
        ("pgd-10", 0.1, 0.025),  # 2.5 * 0.1 / 10
        ("pgd-10", 0.01, 0.01),  # the configured step is more
        ("pgd", 0.14, 0.05),  # by the configured 7 steps
        ("routed", 0.14, 0.05),
        ("restarts", 0.14, 0.05),
    ],
)
def test_steps_are_stretched_to_cross_a_larger_ball(name, eps, size):
    larger = stretched(name, setting(), eps)
    assert (larger.threat.norm, larger.threat.eps) == ("linf", eps)
    assert float(larger.attack.step_size) == pytest.approx(size) and larger.attack.steps == 7


def test_an_attack_says_what_it_was_told_and_where_its_steps_fall_short():
    attack = ATTACKS.find("pgd-3-margin").build(None, setting(routed=False), None)
    assert attack.name == "pgd-3-margin"
    assert attack.settings == {"steps": 3, "step_size": 0.01, "restarts": 1, "loss": "margin"}
    assert attack.flags == ("3 steps of 0.01 cannot cross the ball from its centre to its edge, 0.05",)
    assert ATTACKS.find("pgd-5").build(None, setting(routed=False), None).flags == ()


def test_attacks_that_need_routing_are_told_apart_by_the_table():
    assert {name for name in ATTACKS if ATTACKS[name].for_routed} == {"routed"}


@pytest.mark.parametrize(("mistyped", "meant"), [("pgd-0", "pgd"), ("pgd-50-margn", "pgd-50-margin")])
def test_a_hint_is_at_a_name_that_is_taken(mistyped, meant):
    assert ATTACKS.near(mistyped) == f" (did you mean {meant}?)"
    assert ATTACKS.find(meant)

"""Training methods and alternations: which level runs when, and what that says of a method."""

import pytest

from advmoe.errors import InputError
from advmoe.tables import ALTERNATIONS, METHODS, Level, Method


def test_what_a_method_s_levels_say_of_it():
    facts = {name: (m.adversarial, m.apart, m.routers_apart, m.trains_routers) for name, m in METHODS.items()}
    assert facts == {
        "standard": (False, False, False, True),
        "at": (True, False, False, True),
        "at-routers": (True, True, True, True),
        "at-experts": (True, True, False, False),
        "sparse": (True, False, False, True),
        "advmoe": (True, True, True, True),
    }


def test_a_method_of_its_own_levels():
    warm_up = Method((Level("all", adversarial=False), Level("experts")), "Two", "both")
    assert warm_up.adversarial and warm_up.apart and warm_up.trains_routers and not warm_up.routers_apart


def test_advmoe_is_algorithm_1():
    # The routers on the first batch of an iteration, then the experts on another; each makes its own attack.
    routers, experts = METHODS["advmoe"].levels
    assert (routers.part, routers.batch, experts.part, experts.batch) == ("routers", 0, "experts", 1)
    assert ALTERNATIONS["both"].levels == METHODS["advmoe"].levels


def test_alternations_by_hand():
    def due(name, iterations=4):
        levels = ALTERNATIONS.find(name).levels
        return [
            [(level.part, level.batch) for level in levels if at % level.every == level.turn]
            for at in range(iterations)
        ]

    both, shared = [("routers", 0), ("experts", 1)], [("routers", 0), ("experts", 0)]
    assert due("both") == due("warm-start") == [both] * 4
    assert due("shared-attack") == [shared] * 4
    assert due("by-iteration") == [[("routers", 0)], [("experts", 0)]] * 2
    assert due("every-3") == [both, [("experts", 1)], [("experts", 1)], both]
    assert due("shared-every-2") == [shared, [("experts", 0)]] * 2
    assert [level.warm for name in ALTERNATIONS for level in ALTERNATIONS[name].levels].count(True) == 2


@pytest.mark.parametrize("name", ["every-1", "every-0", "every-02", "every-10001", "shared-every-1", "every-"])
def test_k_is_a_whole_number_from_2(name):
    with pytest.raises(InputError, match=r"training\.alternation must be one of both, .*every-K"):
        ALTERNATIONS.find(name)


def test_every_k_runs_the_routers_level_in_every_kth_iteration():
    assert ALTERNATIONS.find("every-4").levels == (Level("routers", every=4), Level("experts", batch=1))
    assert ALTERNATIONS.find("shared-every-3").levels == (Level("routers", every=3), Level("experts"))


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("x", {}, "a level's part must be one of all, experts, routers, scores, got 'x'"),
        ("all", {"batch": -1}, "a level's batch must be a whole number >= 0, got -1"),
        ("all", {"batch": "1"}, "a level's batch must be a whole number >= 0, got '1'"),
        ("all", {"every": 0}, "a level's every must be a whole number >= 1, got 0"),
        ("all", {"every": 2, "turn": 5}, "a level's turn must be less than its every=2, got 5"),
    ],
)
def test_what_no_level_can_be(part, options, message):
    with pytest.raises(InputError) as error:
        Level(part, **options)
    assert str(error.value) == message


@pytest.mark.parametrize("levels", [(), ("routers",), Level("all"), [Level("all")]])
def test_a_method_is_made_of_levels(levels):
    with pytest.raises(InputError, match=r"^a method's levels must be Levels in a tuple, at least one, got "):
        Method(levels, "x", "x")

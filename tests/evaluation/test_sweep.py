"""Sweeps over radii with planted outcomes: a sound attack, and three that masked gradients defeat."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.evaluation.intervals import wilson
from advmoe.evaluation.sweep import rise_by_chance, sweep, table

RADII = [0, 2 / 255, 4 / 255, 8 / 255]


def planted(counts, size=20):
    """The first `counts[eps]` examples are robust at `eps` (of 255)."""
    return lambda eps: torch.arange(size) < counts[round(255 * eps)]


def test_a_sound_attack():
    result = sweep(planted({0: 16, 2: 12, 4: 7, 8: 2, 255: 0}), RADII, norm="linf")
    assert result == {
        "norm": "linf",
        "num_examples": 20,
        "points": [
            {"eps": eps, "robust_accuracy": robust / 20, "interval": list(wilson(robust, 20)),
             "broken": 20 - robust, "regained": 0}
            for eps, robust in zip(RADII, (16, 12, 7, 2), strict=True)
        ],
        "probe": {"eps": 1, "robust_accuracy": 0, "interval": list(wilson(0, 20)), "broken": 20, "regained": 0},
        "masking": {"suspected": False, "reasons": []},
    }  # fmt: skip
    assert json.loads(json.dumps(result)) == result


def test_radii_are_sorted_and_each_is_measured_once():
    seen = []

    def robust_at(eps):
        seen.append(eps)
        return torch.arange(20) < 20 * (1 - eps)

    result = sweep(robust_at, [1.0, 0.25, 0, 0.25], norm="linf")
    assert seen == [0, 0.25, 1]
    assert [point["eps"] for point in result["points"]] == [0, 0.25, 1]
    assert result["probe"] == result["points"][-1]


def test_accuracy_that_never_reaches_zero():
    result = sweep(planted({0: 160, 2: 120, 4: 60, 8: 30, 255: 30}, 200), RADII, norm="linf")
    assert result["masking"]["suspected"]
    (reason,) = result["masking"]["reasons"]
    assert reason.startswith("gradient masking suspected: 15.0 % of the examples resist at eps 1,")


@pytest.mark.parametrize("size, left, suspected", [(20, 1, False), (20, 2, True), (300, 3, False), (300, 4, True)])
def test_the_probe_may_leave_one_example_or_1_percent(size, left, suspected):
    result = sweep(planted({8: size // 2, 255: left}, size), [8 / 255], norm="linf")
    assert result["masking"]["suspected"] is suspected


def test_accuracy_that_rises():
    result = sweep(planted({0: 160, 2: 90, 4: 70, 8: 100, 255: 0}, 200), RADII, norm="linf")
    (reason,) = result["masking"]["reasons"]
    # Of 10 pairs of radii, the least likely rise: 30 regained, none lost, 2^-30 = 9e-10.
    assert reason == (
        "gradient masking suspected: robust accuracy rises from 35.0 % at eps 4/255 to 50.0 % at eps 8/255 "
        "(30 examples regained, 0 lost; sign test p = 9e-10)"
    )
    assert [point["regained"] for point in result["points"]] == [0, 0, 0, 30]


@pytest.mark.parametrize("regained, suspected", [(5, False), (6, False), (7, True)])
def test_few_regained_examples_are_chance(regained, suspected):
    # Three pairs of radii: the smallest of (1/2)^k below 0.05 / 3 is (1/2)^6 = 0.0156, so 6 of them are too many ...
    result = sweep(planted({2: 10, 4: 10 + regained, 255: 0}), [2 / 255, 4 / 255], norm="linf")
    assert result["masking"]["suspected"] is (regained >= 6)
    # ... and with a fourth radius, six pairs, it takes 7: 0.0078 <= 0.05 / 6 = 0.0083 < 0.0156.
    result = sweep(planted({0: 20, 2: 10, 4: 10 + regained, 255: 0}), RADII[:3], norm="linf")
    assert result["masking"]["suspected"] is suspected


def test_a_creeping_rise_shows_between_distant_radii():
    # Steps of 4 are chance each, even alone: (1/2)^4 = 0.06. Together they are 12.
    result = sweep(planted({0: 4, 2: 8, 4: 12, 8: 16, 255: 0}), RADII, norm="linf")
    (reason,) = result["masking"]["reasons"]
    assert "(12 examples regained, 0 lost" in reason


def test_examples_that_trade_places_are_no_rise_but_are_counted():
    swap = {2: [1, 1, 1, 0, 0, 0, 1, 0], 4: [0, 0, 0, 1, 1, 1, 1, 1], 255: [0] * 8}
    result = sweep(lambda eps: torch.tensor(swap[round(255 * eps)]).bool(), [2 / 255, 4 / 255], norm="linf")
    assert [point["regained"] for point in result["points"]] == [0, 4]
    assert not result["masking"]["suspected"]


def test_the_sign_test_by_hand():
    assert rise_by_chance(0, 0) == 1
    assert rise_by_chance(5, 0) == 1 / 32
    assert rise_by_chance(4, 1) == 6 / 32
    assert rise_by_chance(7, 3) == (120 + 45 + 10 + 1) / 1024
    assert rise_by_chance(5000, 4500) == pytest.approx(1.5e-7, rel=0.1)  # z = (500 - 1) / sqrt(9500) = 5.12


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 30))
def test_the_sign_test_is_a_binomial_tail(regained, lost):
    total = regained + lost
    expected = sum(math.comb(total, k) for k in range(regained, total + 1)) / 2**total
    assert rise_by_chance(regained, lost) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=6), st.integers(0, 10**6))
def test_nested_outcomes_are_never_suspected(epsilons, seed):
    radius = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * 0.99
    result = sweep(lambda eps: radius > eps, epsilons, norm="linf")
    assert not result["masking"]["suspected"]
    assert all(point["regained"] == 0 for point in result["points"])


def test_l2_needs_its_probe():
    def robust_at(eps):
        return torch.arange(4) < 4 - eps

    with pytest.raises(ValueError, match="probe must be given in l2"):
        sweep(robust_at, [0.5], norm="l2")
    result = sweep(robust_at, [0.5, 2], norm="l2", probe=math.sqrt(3 * 16 * 16))
    assert result["probe"]["eps"] == pytest.approx(27.7128, abs=1e-4)
    assert not result["masking"]["suspected"]


@pytest.mark.parametrize(
    "epsilons, options, message",
    [
        ([], {}, "epsilons must list at least one radius"),
        ([-0.1], {}, "epsilons must be"),
        ([1.5], {}, "epsilons must be .* <= 1"),
        ([math.nan], {}, "epsilons must be"),
        ([0.1], {"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
        ([0.5], {"probe": 0.25}, "probe must be > 0, at least every radius.*got 0.25"),
        ([0.5], {"probe": 2}, "probe must be .* <= 1, got 2.0"),
    ],
)
def test_radii_that_cannot_be(epsilons, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(planted({}), epsilons, **{"norm": "linf", **options})


@pytest.mark.parametrize("answer", [torch.ones(4), torch.ones(2, 2).bool(), torch.ones(0).bool()])
def test_answers_that_cannot_be(answer):
    with pytest.raises(ValueError, match=r"robust_at must return \(N,\) booleans with N >= 1.* at eps 0"):
        sweep(lambda eps: answer, [0], norm="linf")


def test_every_radius_needs_the_same_examples():
    with pytest.raises(ValueError, match=r"with N = 4, got torch.bool \(3,\) at eps 1"):
        sweep(lambda eps: torch.ones(4 if eps == 0 else 3).bool(), [0], norm="linf")


def test_the_table():
    result = sweep(planted({0: 16, 8: 2, 255: 0}), [0, 8 / 255], norm="linf")
    head, _, _, *lines, _, verdict = table(result).splitlines()
    assert head == "20 images, linf" and verdict == "no sign of gradient masking in this sweep"
    assert [line.split() for line in lines] == [
        ["0", "80.0", "%", "58.4", "-", "91.9", "0"],
        ["8/255", "10.0", "%", "2.8", "-", "30.1", "0"],
        ["1", "0.0", "%", "0.0", "-", "16.1", "0"],
    ]
    masked = sweep(planted({0: 16, 255: 5}), [0], norm="linf")
    assert table(masked).split("\n\n")[-1].replace("\n  ", " ") == masked["masking"]["reasons"][0]

"""Means and exact tests, against numbers worked by hand and against counting every case."""

from itertools import product
from math import comb, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advmoe.studies.exact_tests import bonferroni, image_test, mean_std, sign_flip


def counted(differences):
    """The share of all sign patterns whose sum reaches the observed one, counted one by one."""
    patterns = list(product((1, -1), repeat=len(differences)))
    sums = [sum(sign * each for sign, each in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(total >= sum(differences) for total in sums) / len(patterns)


def test_mean_and_sample_standard_deviation():
    mean, std = mean_std([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0  # 12 / 4
    assert isclose(std, (14 / 3) ** 0.5)  # squares 4 + 1 + 0 + 9, over n - 1
    assert mean_std([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="values must hold at least one number, got none"):
        mean_std([])


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.3, 0.1, 0.2], 1 / 8),  # all positive: of the 8 patterns only the one observed
        ([-0.3, -0.1, -0.2], 1.0),
        ([0.3, -0.1, 0.2], 2 / 8),  # 0.4 is reached by itself and by 0.6
        ([0.3, 0.1, -0.2], 3 / 8),  # 0.2 by itself, 0.4 and 0.6; 0.3 - 0.1 + 0.2 = 0.4 is one of them
        ([0.1, 0.2, -0.3], 5 / 8),  # a sum of 0, which rounding makes 5e-17, by 0.6, 0.4, 0.2 and both zeros
        ([1.0] * 5, 1 / 32),
        ([0.0, 0.0], 1.0),
        ([0.2], 1 / 2),
    ],
)
def test_sign_flip_by_hand(differences, p):
    assert sign_flip(differences) == p


def test_sign_flip_on_many_seeds():
    # As many plus signs as a binomial tail of 20: 17 of 20 have the observed sign.
    assert sign_flip([1.0] * 17 + [-1.0] * 3) == sum(comb(20, k) for k in range(17, 21)) / 2**20
    for wrong in ([], [0.1] * 21):
        with pytest.raises(ValueError, match=f"differences must be 1 to 20 numbers, got {len(wrong)}"):
            sign_flip(wrong)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0, 0, 0], 1.0),
        ([1, 1, 1, 1, 1, 0, 0], 1 / 32),
        ([1, 1, 1, 1, -1], 6 / 32),  # McNemar: at least 4 of 5 discordant images, (5 + 1) / 32
        ([3, -1], 2 / 4),  # 2 is reached by 4 and 2
        ([2, 2, -1], 2 / 8),  # 3 is reached by 5 and 3
        ([-1, -1], 1.0),
    ],
)
def test_image_test_by_hand(differences, p):
    assert image_test(differences) == p


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_both_tests_count_every_pattern(differences):
    expected = counted(differences)
    assert image_test(differences) == expected
    assert sign_flip([each / 7 for each in differences]) == expected


def test_image_test_of_one_seed_is_the_binomial_tail_however_many_images():
    wins, losses = 560, 440
    tail = sum(comb(1000, k) for k in range(wins, 1001)) / 2**1000
    assert isclose(image_test([1] * wins + [-1] * losses + [0] * 9000), tail, rel_tol=1e-9)
    assert isclose(image_test([-1] * wins + [1] * losses), 1 - tail + comb(1000, wins) / 2**1000, rel_tol=1e-9)


def test_bonferroni():
    assert bonferroni([0.01, 0.5, 0.9]) == 0.03
    assert bonferroni([0.4, 0.6, 0.9]) == 1.0
    assert bonferroni([0.04]) == 0.04

"""Means and tests, against numbers worked by hand, against counting every case, and against chance itself."""

from itertools import product
from math import atan, comb, isclose, pi, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advmoe.studies.significance import bonferroni, crossed_test, image_test, mean_std, sign_flip


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


def test_crossed_test_by_hand():
    # Of 2 seeds and 3 images: the mean is 2; seeds 1 and 3, whose mean has variance 1; images 1, 2, 3, 1/3; no rest.
    table = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    # The variances add up to 4/3, with (4/3)^2 / (1 + (1/3)^2 / 2) = 32/19 degrees of freedom.
    from scipy.stats import t

    assert isclose(crossed_test(table), t.sf(2 / sqrt(4 / 3), 32 / 19), rel_tol=1e-12)
    # Seeds alone differ: Student's t of 1 degree of freedom, which is Cauchy's distribution.
    assert isclose(crossed_test(np.array([[0.0] * 4, [2.0] * 4])), 0.5 - atan(1) / pi, rel_tol=1e-12)
    assert isclose(crossed_test(-table), 1 - crossed_test(table), rel_tol=1e-12)


def test_crossed_test_without_spread_falls_back_on_signs():
    assert crossed_test(np.full((5, 7), 0.1)) == 1 / 32
    assert crossed_test(np.full((5, 3), 0.1)) == 1 / 8  # three images of one sign
    assert crossed_test(np.zeros((5, 7))) == crossed_test(np.full((5, 1), 0.1)) == 1.0


def test_models_alike_on_few_images_are_not_shown_to_be_within_a_margin():
    """Of 1,000 images that agree about one in 100 does not differ; of 100 it may."""
    assert crossed_test(np.zeros((5, 100)), 0.01) > 0.05 > crossed_test(np.zeros((5, 1000)), 0.01)
    # What differs more than that anyway is measured from the margin.
    table = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    assert isclose(crossed_test(table, -0.1), crossed_test(table - 0.1), rel_tol=1e-12)


def errors_at(margin, less, more, shared, *, images=200, draws=400):
    """How often a mean difference of just -`margin` passes, of few images that differ, a share alike for all seeds."""
    drawn = np.random.default_rng(1)

    def signs(shape):
        return drawn.choice([-1.0, 0.0, 1.0], shape, p=[less, 1 - less - more, more])

    passed = 0
    for _ in range(draws):
        alike = drawn.random(images) < shared
        passed += crossed_test(np.where(alike, signs(images), signs((5, images))), margin) < 0.05
    return passed / draws


def test_sparse_differences_pass_no_margin_by_having_no_spread():
    assert errors_at(0.01, 0.01, 0.0, 1.0) < 0.03 and errors_at(0.01, 0.01, 0.0, 0.5) < 0.06


@pytest.mark.parametrize(
    ("seed", "image", "rest"), [(0, 0.25, 0.3), (0.01, 0.12, 0.28), (0.04, 0.1, 0.28), (0, 0, 0.3)]
)
def test_crossed_test_errs_as_seldom_as_it_says(seed, image, rest):
    """Drawn where nothing differs. In the first case the signs of five seeds alone err in one of seven."""
    draws, (seeds, images) = np.random.default_rng(0), (5, 200)
    errors = sum(
        crossed_test(
            draws.normal(0, seed, (seeds, 1)) + draws.normal(0, image, images) + draws.normal(0, rest, (seeds, images))
        )
        < 0.05
        for _ in range(1500)
    )
    assert errors / 1500 < 0.07  # 5% and 3.5 standard errors of 1,500 draws


def test_bonferroni():
    assert bonferroni([0.01, 0.5, 0.9]) == 0.03
    assert bonferroni([0.4, 0.6, 0.9]) == 1.0
    assert bonferroni([0.04]) == 0.04

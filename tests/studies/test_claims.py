"""Verdicts on made-up outcomes, with the numbers worked by hand."""

import math

import pytest

from advmoe.studies.claims import MARGIN, Comparison, claim, compare, verdict
from advmoe.studies.claims import judged as again


def side(*seeds, first=0):
    """Outcomes: a string of `1` (right) and `0` for the images of each seed."""
    return {
        seed: {image: mark == "1" for image, mark in enumerate(marks, start=first)} for seed, marks in enumerate(seeds)
    }


def versus(of_more, of_less):
    return Comparison("more", "less", of_more, of_less)


def judged(*comparisons):
    result = verdict("PGD", comparisons)
    return result["verdict"], result["p_value"]


ALL, NONE = side("111111"), side("000000")


def three(marks):
    return side(marks, marks, marks)


def over_images(*comparisons):
    these = verdict("PGD", comparisons)["these_models"]
    return these["verdict"], these["p_value"]


def five(marks):
    return side(*[marks] * 5)


def numbers(seeds):
    """Ones and zeros, which are no shares of images."""
    return dict.fromkeys(range(seeds), 1.0), dict.fromkeys(range(seeds), 0.0)


def test_the_numbers_of_a_comparison():
    result = compare(versus(side("1111", "1100", "0110"), side("0011", "0000", "1000")))
    assert result["seeds"] == [0, 1, 2] and result["images"] == 4
    assert result["differences"] == {"0": 0.5, "1": 0.5, "2": 0.25}
    assert result["mean_more"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result["mean_less"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert result["p_seeds"] == 1 / 8 and result["p_seeds_opposite"] == 1.0
    # Images 0 to 3, summed over seeds: 1 + 1 - 1, 1 + 1 + 1, 0 + 0 + 1, 0: signs of 1, 3 and 1 reach 5 once in 8.
    assert result["p_images"] == 1 / 8 and result["p_images_opposite"] == 1.0
    assert not {"p_crossed", "margin", "among", "unit"} & result.keys()  # three seeds are too few to tell their spread


def test_fewer_than_five_seeds_decide_nothing_however_clear_the_images():
    """These models are told apart at once; of others the same number of seeds says nothing."""
    for seeds in (1, 3, 4):
        more, less = side(*["111111"] * seeds), side(*["000000"] * seeds)
        assert judged(versus(more, less)) == ("undecided", 0.5**seeds)
        assert over_images(versus(more, less)) == ("holds", 1 / 64)
        assert judged(versus(less, more)) == ("undecided", 1.0)
        assert over_images(versus(less, more)) == ("does not hold", 1 / 64)
    result = verdict("PGD", [versus(three("111110"), three("000000"))], "A note.")
    assert result["measure"] == "PGD" and result["note"] == "A note."
    assert result["test"] == "exact sign-flip test over 3 seeds: 5 or more can decide"
    assert result["these_models"]["test"] == "exact sign-flip test over 6 images of these models"
    assert verdict("PGD", [versus(ALL, NONE)])["test"] == "exact sign-flip test over 1 seed: 5 or more can decide"


def test_five_seeds_that_agree_on_few_images_decide_nothing():
    """Each is better on one image of two, the same: so would others be by chance."""
    more, less = five("10"), five("00")
    result = compare(versus(more, less))
    assert result["p_seeds"] == 1 / 32 and result["p_images"] == 1 / 2
    assert judged(versus(more, less)) == ("undecided", result["p_crossed"])
    # The mean is 1/2 and so is its error, that of two images' mean, of one degree of freedom: 1/2 - atan(1) / pi.
    assert result["p_crossed"] == pytest.approx(0.25) and result["p_crossed_opposite"] == pytest.approx(0.75)
    assert result["test"] == "t test over 5 seeds and 2 images, crossed"


def test_many_images_on_which_five_seeds_agree_decide():
    more, less = five("1" * 30 + "0" * 90), five("0" * 120)
    found, p = judged(versus(more, less))
    assert found == "holds" and 0 < p < 1e-6
    assert judged(versus(less, more)) == ("does not hold", p)
    # One seed that is as far the other way is a spread that five do not outweigh.
    less[4], more[4] = more[4], less[4]
    assert judged(versus(more, less))[0] == "undecided"


def test_seeds_that_count_other_images_are_compared_by_their_means():
    """As where only images count that a model is right on: the seeds' means stand, whatever their number of images."""
    more = {seed: {image: image % (2 + seed % 2) == 0 for image in range(seed, 60 + 6 * seed)} for seed in range(5)}
    less = {seed: dict.fromkeys(range(30 * (seed == 2), 90), False) for seed in range(5)}
    result = compare(versus(more, less))
    assert result["images"] == len(set().union(*(more[seed].keys() & less[seed].keys() for seed in range(5))))
    assert judged(versus(more, less))[0] == "holds" and judged(versus(less, more))[0] == "does not hold"
    assert result["p_crossed"] + result["p_crossed_opposite"] == pytest.approx(1)


def test_one_of_several_that_would_do_counts_as_often():
    numbers = {seed: 1.0 + seed for seed in range(6)}, dict.fromkeys(range(6), 0.0)
    assert judged(Comparison("a", "b", *numbers)) == ("holds", 1 / 64)
    assert judged(Comparison("a", "b", *numbers, among=3)) == ("holds", 3 / 64)
    assert judged(Comparison("a", "b", *numbers, among=4)) == ("undecided", 4 / 64)
    assert judged(Comparison("a", "b", *reversed(numbers), among=4)) == ("does not hold", 1 / 64)  # of this one alone
    assert compare(Comparison("a", "b", *numbers, among=4))["among"] == 4


def test_over_images_what_is_the_other_way_does_not_hold():
    assert over_images(versus(three("000000"), three("111110"))) == ("does not hold", 1 / 32)
    assert over_images(versus(three("000000"), three("111100"))) == ("undecided", 1.0)


def test_a_claim_is_as_sure_as_its_least_sure_comparison():
    surer = versus(three("111111"), three("000000"))
    sure = Comparison("third", "less", three("111110"), three("000000"))
    assert over_images(sure, surer) == ("holds", 1 / 32) and over_images(surer) == ("holds", 1 / 64)
    open_ = Comparison("other", "less", three("111100"), three("000000"))
    assert over_images(surer, open_) == ("undecided", 1 / 16)
    six, fewer = numbers(6), numbers(5)
    assert judged(versus(*six), Comparison("other", "less", *fewer)) == ("holds", 1 / 32)


def test_a_claim_of_several_comparisons_falls_with_one_at_the_price_of_having_looked_at_all():
    ones, zeros = numbers(6)
    sure, against = versus(ones, zeros), Comparison("low", "high", zeros, ones)
    assert judged(sure, against) == ("does not hold", 2 / 64)
    ones, zeros = numbers(5)
    assert judged(versus(ones, zeros), Comparison("low", "high", zeros, ones)) == ("undecided", 1.0)
    ones, zeros = numbers(6)
    assert judged(against) == ("does not hold", 1 / 64)


def test_non_inferiority_needs_every_seed_above_the_margin():
    """A point less is lost by nobody who loses half a point, on each of five seeds."""

    def numbers(*differences, margin):
        seeds = dict(enumerate(differences))
        return Comparison("new", "old", seeds, dict.fromkeys(seeds, 0.0), margin=margin)

    half = numbers(-0.005, -0.005, 0.0, -0.005, 0.02, margin=MARGIN)
    assert half.name == "old - 1 point < new" and judged(half) == ("holds", 1 / 32)
    assert compare(half)["margin"] == 0.01 and verdict("PGD", [half])["these_models"] is None
    two = numbers(-0.02, -0.03, -0.02, -0.02, -0.04, margin=MARGIN)
    assert judged(two) == ("does not hold", 1 / 32)
    assert judged(numbers(-0.02, 0.0, 0.0, 0.0, 0.0, margin=MARGIN))[0] == "undecided"
    # Not told apart is not the same as losing nothing: without a margin neither is shown.
    assert judged(numbers(-0.005, 0.005, 0.0, -0.005, 0.005, margin=0.0))[0] == "undecided"
    # A point more must be shown, too.
    more = numbers(0.02, 0.03, 0.02, 0.02, 0.04, margin=-MARGIN)
    assert more.name == "old + 1 point < new" and judged(more) == ("holds", 1 / 32)
    assert judged(numbers(*[0.005] * 5, margin=-MARGIN)) == ("does not hold", 1 / 32)


def test_images_are_not_tested_against_a_margin():
    result = compare(Comparison("a", "b", five("11"), five("11"), margin=MARGIN))
    assert result["p_seeds"] == 1 / 32 and "p_images" not in result
    # At the margin one image in 100 would differ, whatever these two do: a standard error of sqrt(0.0099 / 2).
    assert result["p_crossed"] == pytest.approx(0.5 - math.atan(0.01 / math.sqrt(0.0099 / 2)) / math.pi)
    assert verdict("PGD", [Comparison("a", "b", five("11"), five("11"), margin=MARGIN)])["these_models"] is None


def test_one_image_and_numbers_that_are_none_decide_nothing():
    assert judged(versus(five("1"), five("0"))) == ("undecided", 1.0)
    nan = dict.fromkeys(range(5), float("nan"))
    assert compare(versus(nan, dict.fromkeys(range(5), 0.0)))["test"] == "none: no seed has both"
    assert compare(versus({**nan, 3: 1.0}, dict.fromkeys(range(5), 0.0)))["seeds"] == [3]


def test_numbers_that_are_no_shares_keep_their_unit():
    result = compare(Comparison("a", "b", {0: 4.0, 1: 5.0}, {0: 3.0, 1: 3.0, 2: 9.0}, unit="bits"))
    assert (result["mean_more"], result["mean_less"], result["unit"]) == (4.5, 3.0, "bits")
    assert result["differences"] == {"0": 1.0, "1": 2.0} and result["p_seeds"] == 1 / 4


def test_stored_numbers_are_judged_like_fresh_ones():
    """As `study.json` has them, also those of the first form, whose own verdict was by images."""
    fresh = compare(versus(three("111110"), three("000000")))
    old = {**fresh, "p": 1 / 32, "test": "exact sign-flip test over 6 images, where all 3 seeds agree in sign"}
    result = again({"less < more": old})
    assert (result["verdict"], result["p_value"]) == ("undecided", 1 / 8)
    assert result["test"] == "exact sign-flip test over 3 seeds: 5 or more can decide"
    assert result["these_models"]["verdict"] == "holds"


def test_only_seeds_and_images_that_both_have_are_compared():
    more = {0: {1: True, 2: True, 9: False}, 1: {1: True}, 7: {1: True}}
    less = {0: {1: False, 2: True, 5: True}, 1: {1: True}, 8: {1: True}}
    result = compare(versus(more, less))
    assert result["seeds"] == [0, 1] and result["differences"] == {"0": 0.5, "1": 0.0} and result["images"] == 2
    assert (result["mean_more"], result["mean_less"]) == (1.0, 0.75)


@pytest.mark.parametrize(
    ("more", "less", "why"),
    [
        ({}, side("1"), "none: no seed has both"),
        ({0: {0: True}}, {1: {0: True}}, "none: no seed has both"),
        (side("11"), side("00", first=5), "none: no image in common"),
    ],
)
def test_where_nothing_can_be_compared_nothing_is_decided(more, less, why):
    result = verdict("PGD", [versus(more, less)])
    assert (result["verdict"], result["p_value"], result["test"]) == ("undecided", None, why)
    assert result["note"] == f"Too little data: less < more: {why}."
    assert "mean_more" not in result["numbers"]["less < more"]


def test_a_missing_comparison_leaves_the_rest_able_to_refute_but_not_to_confirm():
    missing = Comparison("a", "b", {}, {})
    ones, zeros = numbers(6)
    assert judged(versus(ones, zeros), missing) == ("undecided", 1.0)
    result = verdict("PGD", [versus(zeros, ones), missing])
    assert (result["verdict"], result["p_value"]) == ("does not hold", 2 / 64)
    assert result["note"] == "Too little data: b < a: none: no seed has both."
    assert set(result["numbers"]) == {"less < more", "b < a"} and result["these_models"] is None


def test_a_claim_s_shape():
    verdicts = [verdict("PGD", [versus(three("111110"), three("000000"))])]
    assert claim("insight-1", "It is so.", verdicts) == {
        "name": "insight-1", "statement": "It is so.", "source": "Zhang et al., ICCV 2023, sec. 4",
        "verdicts": verdicts,
    }  # fmt: skip
    assert claim("x", "y", [], "beyond the paper")["source"] == "beyond the paper"

"""Verdicts on made-up outcomes, with the numbers worked by hand."""

import pytest

from advmoe.studies.claims import Comparison, claim, compare, verdict


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


def test_the_numbers_of_a_comparison():
    result = compare(versus(side("1111", "1100", "0110"), side("0011", "0000", "1000")))
    assert result["seeds"] == [0, 1, 2] and result["images"] == 4
    assert result["differences"] == {"0": 0.5, "1": 0.5, "2": 0.25}
    assert result["mean_more"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result["mean_less"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert result["p_seeds"] == 1 / 8 and result["p_seeds_opposite"] == 1.0
    # Images 0 to 3, summed over seeds: 1 + 1 - 1, 1 + 1 + 1, 0 + 0 + 1, 0: signs of 1, 3 and 1 reach 5 once in 8.
    assert result["p_images"] == 1 / 8 and result["p_images_opposite"] == 1.0
    assert result["p"] == 1 / 8  # every seed agrees in sign, so the images decide


def test_one_seed_decides_nothing_however_clear():
    assert judged(versus(ALL, NONE)) == ("undecided", None)
    result = verdict("PGD", [versus(ALL, NONE)], "A note.")
    assert result["note"] == "Too little data: less < more: none: 1 of at least 3 seeds. A note."
    numbers = result["numbers"]["less < more"]
    assert (numbers["mean_more"], numbers["mean_less"], numbers["p"]) == (1.0, 0.0, 1.0)
    assert numbers["p_images"] == 1 / 64  # said, though it decides nothing


def test_three_seeds_need_one_sign_and_significant_images():
    # 5 images of 6 differ, on every seed: 1/32 over images, while seeds alone cannot go below 1/8.
    assert judged(versus(three("111110"), three("000000"))) == ("holds", 1 / 32)
    # 4 images: 1/16.
    assert judged(versus(three("111100"), three("000000"))) == ("undecided", 1 / 16)
    # A seed that is level, or the other way: undecided, whatever the images say.
    assert judged(versus(side("111111", "111111", "000000"), three("000000"))) == ("undecided", 1.0)
    assert judged(versus(side("111111", "111111", "000000"), side("000000", "000000", "100000"))) == ("undecided", 1.0)
    result = verdict("worst case", [versus(three("111110"), three("000000"))])
    assert result["measure"] == "worst case" and result["note"] == ""
    assert result["test"] == (
        "exact sign-flip test over 6 images, where all 3 seeds agree in sign (over seeds alone p >= 0.125)"
    )


def test_what_is_significantly_the_other_way_does_not_hold():
    assert judged(versus(three("000000"), three("111110"))) == ("does not hold", 1 / 32)
    assert judged(versus(three("000000"), three("111100"))) == ("undecided", 1.0)


def test_five_seeds_decide_by_seeds_alone():
    more, less = side(*["10"] * 5), side(*["00"] * 5)
    assert judged(versus(more, less)) == ("holds", 1 / 32)  # one image of two: over images 1/2
    assert judged(versus(less, more)) == ("does not hold", 1 / 32)
    assert compare(versus(more, less))["test"] == "exact sign-flip test over 5 seeds"
    # Four seeds by 1/2, one the other way by as much: 3/2 of 5/2 is reached by no or one flip of five: 6/32.
    mixed = versus(side("10", "10", "10", "10", "00"), side("00", "00", "00", "00", "10"))
    assert judged(mixed) == ("undecided", 6 / 32)
    assert compare(mixed)["p_opposite"] == 31 / 32  # all but the single pattern of five pluses


def test_a_claim_is_as_sure_as_its_least_sure_comparison():
    sure, surer = versus(three("111110"), three("000000")), versus(three("111111"), three("000000"))
    assert judged(sure, surer) == ("holds", 1 / 32) and judged(surer) == ("holds", 1 / 64)
    open_ = versus(three("111100"), three("000000"))
    assert judged(surer, open_) == ("undecided", 1 / 16)


def test_a_claim_of_several_comparisons_falls_with_one_at_the_price_of_having_looked_at_all():
    sure, against = versus(three("111111"), three("000000")), versus(three("000000"), three("111111"))
    assert judged(sure, against) == ("does not hold", 2 / 64)
    against = versus(three("000000"), three("111110"))
    assert judged(sure, against) == ("undecided", 1.0)  # 2/32 is too much
    assert judged(against) == ("does not hold", 1 / 32)


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
    assert judged(versus(three("111111"), three("000000")), missing) == ("undecided", 1.0)
    result = verdict("PGD", [versus(three("000000"), three("111111")), missing])
    assert (result["verdict"], result["p_value"]) == ("does not hold", 2 / 64)
    assert result["note"] == "Too little data: b < a: none: no seed has both."
    assert set(result["numbers"]) == {"less < more", "b < a"}


def test_a_claim_s_shape():
    verdicts = [verdict("PGD", [versus(three("111110"), three("000000"))])]
    assert claim("insight-1", "It is so.", verdicts) == {
        "name": "insight-1", "statement": "It is so.", "source": "Zhang et al., ICCV 2023, sec. 4",
        "verdicts": verdicts,
    }  # fmt: skip
    assert claim("x", "y", [], "beyond the paper")["source"] == "beyond the paper"

"""How numbers and tables are written."""

import pytest

from advmoe.text import aligned, by_layer, duration, passes, percent, radius


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"), (0.5 / 255, "linf", "0.5/255"), (16 / 255, "linf", "16/255"), (0.1, "linf", "0.1"),
        (0.0, "linf", "0"), (1.0, "linf", "1"), (0.5, "l2", "0.5"), (128 / 255, "l2", "0.501961"),
    ],
)  # fmt: skip
def test_a_radius_is_written_as_one_types_it(eps, norm, text):
    assert radius(eps, norm) == text


def test_layers_of_one_share_stand_together():
    assert by_layer([1, 0.985, 0.985, 0, 0, 0]) == "0: 100.0, 1 to 2: 98.5, 3 to 5: 0.0"
    assert by_layer([]) == ""


def test_percent():
    assert [percent(0.5834), percent(0.5834, 0), percent(1), percent(None)] == ["58.3", "58", "100.0", "-"]


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (
            {"straight_through": 50, "worst_case": 1610},
            "Gradient passes that a robust image withstood: 1,610 in the worst case, 50 under that PGD.",
        ),
        ({"straight_through": None, "worst_case": 100}, ""),  # no gap to speak of
        ({"straight_through": 50, "worst_case": None}, ""),
        ({"straight_through": 0, "worst_case": 0}, ""),  # no image was right
        ("garbage", ""),
    ],
)
def test_passes_are_told_where_they_are_known(told, sentence):
    assert passes({"gradient_passes": told}) == sentence and passes({}) == ""


def test_durations():
    assert [duration(each) for each in (0.1234, 91.6, 179.4, 180, 89 * 60, 90 * 60)] == [
        "0.123 s",
        "91.6 s",
        "179 s",
        "3 min",
        "89 min",
        "1 h 30 min",
    ]


def test_columns_stand_two_spaces_apart_on_the_side_asked_for():
    rows = [("a", "bb", "note"), ("ccc", "d", "")]
    assert aligned(rows) == ["a    bb  note", "ccc  d"]
    assert aligned(rows, "<><") == ["a    bb  note", "ccc   d"]
    assert aligned(rows, ">") == ["  a  bb  note", "ccc   d"]

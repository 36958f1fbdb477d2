import math

import pytest

from advmoe.report.html import element
from advmoe.report.tables import DASH, Cell, Column, decimals, number, pairs, percent, seconds, share_cell, table


def test_a_table_with_its_best_and_its_orders(parsed):
    rows = [
        ["AT", share_cell(0.401), 9.5, None],
        ["Adv<b>MoE", share_cell(0.5), 12, "a note"],
        [Cell("paper", "paper"), Cell("51.8", 0.518, shade=True), None, None],
    ]
    columns = ["Method", Column("RA", "higher"), Column("ms", "lower"), "Note"]
    page = parsed(table("Results & more.", columns, rows))
    assert page.texts("caption") == ["Results & more. The best of a column is in bold."]
    assert page.texts("button") == ["Method", "RA (higher is better)", "ms (lower is better)", "Note"]
    assert page.attributes("th", "aria-sort") == ["none"] * 4
    assert page.texts("th")[4:] == ["AT", "Adv<b>MoE", "paper"]
    assert page.texts("td") == ["40.1", "9.5", DASH, "50.0", "12", "a note", "51.8", DASH, DASH]
    assert page.attributes("td", "data-order") == ["0.401", "9.5", "", "0.5", "12.0", "a note", "0.518", "", ""]
    assert page.texts("strong") == ["9.5", "51.8"]
    # Numbers stand to the right, their heads and the gaps among them too.
    assert len(page.texts("td", "number")) == 6 and len(page.texts("th", "number")) == 2
    assert page.texts("td", "shade") == ["51.8"]
    assert page.attributes("div", "aria-label") == page.texts("caption")


def test_a_single_number_is_no_best_one(parsed):
    page = parsed(table("One.", ["Run", Column("RA", "higher")], [["a", 0.5], ["b", None]]))
    assert page.texts("strong") == [] and page.texts("caption") == ["One."]


def test_equally_good_ones_are_all_in_bold(parsed):
    page = parsed(table("Two.", ["Run", Column("RA", "higher")], [["a", 3], ["b", 3], ["c", math.nan]]))
    assert page.texts("strong") == ["3", "3"]
    assert page.attributes("td", "data-order") == ["3.0", "3.0", ""]


def test_a_long_name_gets_a_wider_column(parsed):
    page = parsed(table("Claims.", ["Claim"], [["AT < AdvMoE"], ["AT (MoE) < AT (S-Dense) < AdvMoE"]]))
    assert page.texts("th", "long") == ["AT (MoE) < AT (S-Dense) < AdvMoE"]


def test_html_in_a_cell_has_no_order_of_its_own(parsed):
    page = parsed(table("Links.", ["Run", "Link"], [["a", element("a", "here", href="#x")]]))
    assert page.attributes("td", "data-order") == [""] and page.texts("a") == ["here"]


def test_names_and_values(parsed):
    page = parsed(pairs("Manifest.", [("cpu", "a & b"), ("threads", 2)]))
    assert page.texts("th") == ["cpu", "threads"] and page.texts("td") == ["a & b", "2"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH), (math.nan, DASH), (math.inf, "inf"), (0, "0"), (11_173_962, "11,173,962"), (0.000552, "0.000552"),
        (0.139, "0.139"), (4.256, "4.26"), (51.83, "51.8"), (1234.5, "1,234"), (2000.0, "2,000"), (-12.34, "-12.3"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_decimals_are_those_of_the_number_shown():
    assert [decimals(value) for value in (0.139, 4.256, 51.83, 1234.5, 3)] == [3, 2, 1, 0, 0]


def test_percent():
    assert (percent(0.4567), percent(0.4567, 0), percent(None), percent(0.0)) == ("45.7", "46", DASH, "0.0")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, DASH), ("soon", DASH), (0.4191, "0.419 s"), (89, "89 s"), (150, "150 s"), (200, "3 min"), (3600, "60 min"),
     (5400, "1 h 30 min"), (90_000, "25 h 0 min")],
)  # fmt: skip
def test_durations(value, text):
    assert seconds(value) == text

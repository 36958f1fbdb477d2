"""Results as tables, figures, and their words."""

import pytest

from advmoe.studies.results import PGD, Results, accuracy_under
from advmoe.studies.tables import RA, SA, Quantity, by_method, mean_series, table, text, with_heights, with_points

NOTHING = {"x": 0, "y": None, "low": None, "high": None}


@pytest.fixture
def results(row, evaluated):
    """Two seeds of S-Dense, one of AdvMoE, none of AT (MoE), as the paper's CIFAR-10 and ResNet-18."""
    where = {"dataset": "CIFAR-10 (JPEG)", "paper_dataset": "CIFAR-10", "backbone": "R", "paper_backbone": "ResNet-18"}
    seeds = {0: "1100", 1: "1000"}
    dense = {seed: {"accuracy": evaluated("1110", {"pgd-10": marks})} for seed, marks in seeds.items()}
    return Results(
        [
            row({"method": "AT (S-Dense)", **where}, dense),
            row({"method": "AdvMoE", **where}, {0: {"accuracy": evaluated("1111", {"pgd-10": "1110"})}}),
            row({"method": "AT (MoE)", **where}, {}),
        ]
    )


def test_a_table_has_a_cell_for_each_row_and_number_beside_the_paper_s(results):
    shown = table("Ours", results, ["dataset", "method"], [RA, SA], caption="A caption.", paper_table="table1")
    assert (shown["title"], shown["caption"]) == ("Ours", "A caption.")
    assert [(column["key"], column["title"], column["better"]) for column in shown["columns"]] == [
        ("dataset", "Data", None), ("method", "Method", None), ("ra_pgd", "RA PGD %", "higher"),
        ("sa", "SA %", "higher"),
    ]  # fmt: skip
    first, second, third = shown["rows"]
    assert (first["dataset"], first["method"]) == ("CIFAR-10 (JPEG)", "AT (S-Dense)")
    assert first["ra_pgd"] == {
        "mean": 37.5, "std": pytest.approx(17.6777, abs=1e-4), "n": 2, "paper": 48.12, "paper_std": 0.09,
    }  # fmt: skip
    assert second["ra_pgd"] == {"mean": 75.0, "std": None, "n": 1, "paper": 51.83, "paper_std": 0.12}
    assert third["sa"] == {"mean": None, "std": None, "n": 0, "paper": 78.84, "paper_std": 0.75}
    assert all(row["ra_pgd"]["paper"] is None for row in table("x", results, [], [RA])["rows"][:2])
    own = table("x", results, ["experts", "beta"], [])["columns"]  # a label of a study's own is its own title
    assert [column["title"] for column in own] == ["N", "beta"]


def test_a_table_in_a_terminal(results):
    ratio = Quantity("ratio", "ratio", "lower", lambda run: None)
    shown = table("Ours", results, ["method", "experts"], [RA, SA, ratio], paper_table="table1")
    assert text(shown).splitlines() == [
        "Ours",
        "Method        N  RA PGD %           SA %            ratio",
        "AT (S-Dense)     37.5 ± 18 [48.12]  75 ± 0 [80.18]  -",
        "AdvMoE           75 [51.83]         100 [80.15]     -",
        "AT (MoE)         - [45.57]          - [78.84]       -",
    ]


def test_plain_values_in_a_terminal():
    columns = [{"key": key, "title": key} for key in ("a", "b", "c", "d")]
    rows = [{"a": "x", "b": 0.123456, "c": 12}, {"a": "longer", "b": 1.0, "c": None, "d": 1}]
    assert text({"title": "T", "columns": columns, "rows": rows}).splitlines() == [
        "T",
        "a       b       c   d",
        "x       0.1235  12  -",
        "longer  1       -   1",
    ]


def test_series_and_bars_of_which_nothing_was_measured_are_left_out():
    series = {
        "AT": [{"x": 0, "y": 80.0}, {"x": 4, "y": None}, {"x": 8, "y": 41.256}],
        "AdvMoE": [{"x": 8, "y": 50.0}],
        "missing": [NOTHING, NOTHING],
    }
    assert with_points(series) == {name: series[name] for name in ("AT", "AdvMoE")}  # a gap stays a gap
    bar = {"x": 0, "low": None, "high": None}
    groups = {"A": {"AT": {**bar, "y": 12.0}, "AdvMoE": {**bar, "y": 34.567}}, "B": {"AT": NOTHING}, "C": {}}
    assert with_heights(groups) == {"A": groups["A"]}


def test_a_series_for_each_value_of_a_label_in_the_order_of_another(row, evaluated):
    def at(method, scale, marks):
        return row({"method": method, "scale": scale}, {0: {"accuracy": evaluated("11", {"pgd-10": marks})}})

    results = Results([at("AT", 0.8, "11"), at("AT", 0.5, "10"), at("AdvMoE", 0.5, "00"), row({"method": "Dense"}, {})])
    series = by_method(results, "scale", accuracy_under(PGD))
    assert {name: [(p["x"], p["y"]) for p in points] for name, points in series.items()} == {
        "AT": [(0.5, 50.0), (0.8, 100.0)], "AdvMoE": [(0.5, 0.0)],
    }  # fmt: skip
    by_scale = by_method(results.select(method="AT"), "scale", accuracy_under(PGD), series="scale", factor=1)
    assert list(by_scale) == ["0.8", "0.5"] and by_scale["0.5"][0]["y"] == 0.5


def test_a_series_over_epochs_is_the_mean_of_the_seeds_that_have_them(row):
    result = row({}, {0: {"epochs": [{"a": 1.0}, {"a": 3.0}, {"a": 5.0}]}, 1: {"epochs": [{"a": 2.0}, {"a": None}]}})
    points = mean_series([result], lambda run: [line["a"] for line in run.epochs], 10)
    assert points == [
        {"x": 1, "y": 15.0, "low": 10.0, "high": 20.0}, {"x": 2, "y": 30.0, "low": None, "high": None},
        {"x": 3, "y": 50.0, "low": None, "high": None},
    ]  # fmt: skip
    none = row({}, {0: {"epochs": [{"a": None}]}})
    assert mean_series([none], lambda run: [line["a"] for line in run.epochs]) == [
        {"x": 1, "y": None, "low": None, "high": None}
    ]
    assert mean_series([row({}, {})], lambda run: []) == []

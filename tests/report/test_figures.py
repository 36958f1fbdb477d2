"""Figures of plain data: what is written, and what it says."""

import warnings
from functools import partial

import pytest
from drawings import swept, text_places, words

from advmoe.report.figures import (
    bars_figure,
    coarser,
    histogram_figure,
    lines_figure,
    stacked_figure,
    sweep_figure,
)


def test_long_names_leave_room_for_the_drawing(tmp_path):
    name = "runs/" + "a very long name of a run " * 5
    points = [{"x": 0, "y": 1.0}, {"x": 1, "y": 2.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines_figure({name: points, "b": points}, tmp_path / "lines.svg", xlabel="x", ylabel="y")
        bars_figure({"clean": {name: {"y": 1.0}, "b": {"y": 2.0}}}, tmp_path / "bars.svg", ylabel="y")
        stacked_figure({name: {"part " * 20: 0.5, "rest": 0.5}}, tmp_path / "stacked.svg", xlabel="x")
        sweep_figure({name: swept(0.8, 0.6, 0.4), "b": swept(0.9, 0.5, 0.2)}, tmp_path / "sweep.svg")
    said = {each.stem: " ".join(words(each)) for each in tmp_path.glob("*.svg")}
    assert all("runs/a very" in text for text in said.values()) and len(said) == 4


def point(x, y, spread=None):
    return {"x": x, "y": y, **({} if spread is None else {"low": y - spread, "high": y + spread})}


LINES = {"AdvMoE ($r$)": [point(1, 40.0, 2), point(2, 50.0, 2)], "AT": [point(1, 30.0), point(3, None)]}
BARS = {"clean": {"A": point(0, 61.25, 3), "B": point(0, 4.0)}, "worst case": {"A": point(0, 17.0)}}
SHARES = {"AT": {"survives": 0.756, "fails": 0.244}, "AdvMoE": {"survives": 1.0}}
BINS = {
    "clean": {"edges": [0, 0.5, 1], "shares": [0.25, 0.75]},
    "by chance": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5]},
}


def test_lines(tmp_path):
    references = [("paper", 51.8)]
    lines_figure(LINES, tmp_path / "a.svg", xlabel="epoch", ylabel="RA (%)", references=references, title="Methods")
    text = words(tmp_path / "a.svg")
    assert {"AdvMoE ($r$)", "AT", "paper", "epoch", "RA (%)", "Methods", "1", "2", "3"} <= set(text)
    assert "1.5" not in text  # epochs are whole


def test_many_points_have_a_band_for_their_interval(tmp_path):
    many = {"a": [point(at, 50.0 + at, 2) for at in range(20)]}
    lines_figure(many, tmp_path / "a.svg", xlabel="epoch", ylabel="y")
    lines_figure(LINES, tmp_path / "b.svg", xlabel="epoch", ylabel="y")
    assert "fill-opacity: 0.18" in (tmp_path / "a.svg").read_text()
    assert "fill-opacity: 0.18" not in (tmp_path / "b.svg").read_text()


def test_bars(tmp_path):
    bars_figure(BARS, tmp_path / "a.svg", ylabel="accuracy (%)")
    assert {"clean", "worst case", "A", "B", "61.2", "4", "17", "accuracy (%)"} <= set(words(tmp_path / "a.svg"))
    many = {str(at): {"A": point(0, 12.5)} for at in range(30)}
    bars_figure(many, tmp_path / "b.svg", ylabel="y")
    assert "12.5" not in words(tmp_path / "b.svg") and "29" in words(tmp_path / "b.svg")


def test_bars_lie_where_names_are_long(tmp_path):
    groups = {f"embedding router {at}": {"A": {"y": 10.5 + at, "low": 9.0, "high": 12.0}, "B": {}} for at in range(14)}
    bars_figure(groups, tmp_path / "a.svg", ylabel="accuracy (%)")
    said = words(tmp_path / "a.svg")
    assert {*groups, "accuracy (%)", "A", "B", *(f"{10.5 + at:.3g}" for at in range(14))} <= set(said)
    places = {text: place for text, place in text_places(tmp_path / "a.svg") if text in groups}
    x, y = zip(*places.values(), strict=True)
    assert list(y) == sorted(set(y)) and max(x) - min(x) < 1  # one below the other, up to the axis


def test_stacked_shares(tmp_path):
    stacked_figure(SHARES, tmp_path / "a.svg", xlabel="images (%)")
    text = words(tmp_path / "a.svg")
    assert {"76", "24", "AT", "AdvMoE", "survives", "fails", "images (%)"} <= set(text)
    stacked_figure({"AT": {"survives": 0.97, "fails": 0.03}}, tmp_path / "b.svg", xlabel="x")
    assert "97" in words(tmp_path / "b.svg") and "3" not in words(tmp_path / "b.svg")  # too narrow for its number


def test_a_histogram(tmp_path):
    histogram_figure(BINS, tmp_path / "a.svg", xlabel="IoU", ylabel="images (%)")
    assert {"clean", "by chance", "IoU", "images (%)", "70"} <= set(words(tmp_path / "a.svg"))


def grid(count, **shares):
    return {
        name: {"edges": [at / count for at in range(count + 1)], "shares": [each.get(at, 0.0) for at in range(count)]}
        for name, each in shares.items()
    }


def test_bins_are_joined_where_something_is():
    joined = coarser(grid(12, a={3: 0.5, 6: 0.5}, b={7: 1.0}), 3)
    # 3 to 7 of 12 are five bins: in pairs from an even one they are three.
    assert joined["a"] == {"edges": [2 / 12, 4 / 12, 6 / 12, 8 / 12], "shares": [0.5, 0, 0.5]}
    assert joined["b"]["shares"] == [0, 0, 1] and joined["b"]["edges"] == joined["a"]["edges"]
    assert coarser(grid(12, a={3: 0.5, 7: 0.5}), 2)["a"] == {"edges": [0.25, 0.5, 0.75], "shares": [0.5, 0.5]}
    assert coarser(grid(12, a={11: 1.0}), 2)["a"] == {"edges": [11 / 12, 1], "shares": [1]}
    # 7 does not divide into joined bins: the last is what is left.
    assert coarser(grid(7, a={0: 0.5, 6: 0.5}), 4)["a"] == {
        "edges": [0, 2 / 7, 4 / 7, 6 / 7, 1],
        "shares": [0.5, 0, 0, 0.5],
    }


def test_tails_of_next_to_nothing_go_to_the_ends():
    joined = coarser(grid(10, a={0: 5e-5, 4: 0.4, 5: 0.6 - 1e-4, 9: 5e-5}), 2)["a"]
    assert joined["edges"] == [0.4, 0.5, 0.6]
    assert joined["shares"] == pytest.approx([0.4 + 5e-5, 0.6 - 5e-5]) and sum(joined["shares"]) == pytest.approx(1)


def test_bins_of_different_grids_stay():
    unlike = {**grid(4, a={1: 1.0}), **grid(3, b={1: 1.0})}
    assert coarser(unlike, 2) is unlike and coarser(BINS, None) is BINS
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        coarser(BINS, 0)


@pytest.mark.parametrize(
    "draw, result, message",
    [
        (
            partial(lines_figure, xlabel="", ylabel=""),
            {"a": []},
            r"series must hold something to draw, got {'a': \[\]}",
        ),
        (partial(bars_figure, ylabel=""), {}, "groups must hold something to draw, got {}"),
        (partial(stacked_figure, xlabel=""), {}, "rows must hold something to draw, got {}"),
        (partial(histogram_figure, xlabel="", ylabel=""), {}, "series must hold something to draw, got {}"),
        (
            partial(histogram_figure, xlabel="", ylabel=""),
            {"a": {"edges": [0, 1], "shares": [0.5, 0.5]}},
            "series must have one more edge than shares, got 2 and 2 in 'a'",
        ),
    ],
)
def test_results_that_are_none(tmp_path, draw, result, message):
    with pytest.raises(ValueError, match=message):
        draw(result, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())

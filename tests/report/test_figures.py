"""Figures from results alone: what is written, what it says, and that it is the same each time."""

import json
import sys
import warnings
from functools import partial
from itertools import cycle, islice
from xml.etree import ElementTree

import matplotlib
import pytest

from advmoe.report import drawing
from advmoe.report.figures import (
    bars_figure,
    coarser,
    dissection_figure,
    flow_figure,
    heatmap_figure,
    histogram_figure,
    lines_figure,
    stacked_figure,
    sweep_figure,
)


def swept(*accuracies, norm="linf", reasons=()):
    def point(eps, accuracy):
        return {"eps": eps, "robust_accuracy": accuracy, "interval": [max(0, accuracy - 0.05), accuracy + 0.05]}

    radii = [0, 4 / 255, 8 / 255]
    return {
        "norm": norm,
        "points": [point(*each) for each in zip(radii, accuracies, strict=True)],
        "probe": point(1.0, 0.0),
        "masking": {"suspected": bool(reasons), "reasons": list(reasons)},
    }


def dissected(layers=3, experts=2, right=True):
    shares = {"both_survive": 0.317, "only_routing_fails": 0.06, "only_prediction_fails": 0.446, "both_fail": 0.177}
    load = [[1 / experts] * experts] * layers
    return {
        "num_examples": 1000,
        "num_clean_correct": 820 if right else 0,
        "categories": shares,
        "categories_of_clean_correct": {**shares, "both_survive": 0.301, "both_fail": 0.193} if right else None,
        "flip_rate": [0.0] * layers,
        "load": {"clean": load, "adversarial": load},
    }


def heat(values, rows=("cat", "dog"), columns=("0", "1"), **members):
    return {"rows": list(rows), "columns": list(columns), "values": values, **members}


def words(path):
    """The text elements of an SVG file."""
    tree = ElementTree.fromstring(path.read_text())
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    elements = tree.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(each.itertext()).replace("\N{NO-BREAK SPACE}", " ").strip() for each in elements]


def text_places(path):
    """The texts of an SVG file, each with where it stands."""
    elements = ElementTree.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}text")
    return [("".join(each.itertext()).strip(), (float(each.get("x")), float(each.get("y")))) for each in elements]


def test_a_sweep(tmp_path):
    sweep_figure(swept(0.823, 0.61, 0.402), tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert {"82.3", "61.0", "40.2", "robust accuracy (%)"} <= set(text)
    assert "attack radius eps, l\N{INFINITY} (pixels of 255)" in text
    assert "0.0 % robust at the probe, eps 1" in text
    assert not any("masking" in each for each in text)


def test_several_sweeps_and_a_suspicion(tmp_path):
    reason = "gradient masking suspected: " + "words " * 30
    masked = swept(0.8, 0.4, 0.6, reasons=[reason])
    sweep_figure({"AT ($1)": swept(0.8, 0.6, 0.4), "AdvMoE ($2)": masked}, str(tmp_path / "a.svg"))
    text = words(tmp_path / "a.svg")
    assert {"AT ($1)", "AdvMoE ($2) (masking suspected)"} <= set(text)
    assert any(each.startswith("AdvMoE ($2): gradient masking suspected: words") for each in text)
    assert sum(each.count("words") for each in text) == 30


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


def test_l2_radii_have_their_own_unit(tmp_path):
    sweep_figure(swept(0.8, 0.6, 0.4, norm="l2"), tmp_path / "a.svg")
    assert "attack radius eps, l2 (pixels of [0, 1])" in words(tmp_path / "a.svg")


def test_a_dissection(tmp_path):
    dissection_figure(dissected(), tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert {"31.7", "6.0", "44.6", "17.7", "30.1", "19.3"} <= set(text)
    assert {"1 both survive: 31.7 % / 30.1 %", "4 both fail: 17.7 % / 19.3 %", "expert 1", "adversarial"} <= set(text)
    assert text.count("MoE layer") == 2
    assert {"(n = 1000)", "(n = 820)"} <= set(text)


def test_a_dissection_where_nothing_is_right_clean(tmp_path):
    dissection_figure(dissected(right=False), tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert "1 both survive: 31.7 %" in text and "(n = 1000)" in text and "(n = 0)" not in text


@pytest.mark.parametrize("layers, experts", [(1, 1), (40, 12)])
def test_extreme_shapes(tmp_path, layers, experts):
    dissection_figure(dissected(layers, experts), tmp_path / "a.svg")
    assert f"expert {experts - 1}" in words(tmp_path / "a.svg")


def point(x, y, spread=None):
    return {"x": x, "y": y, **({} if spread is None else {"low": y - spread, "high": y + spread})}


LINES = {"AdvMoE ($r$)": [point(1, 40.0, 2), point(2, 50.0, 2)], "AT": [point(1, 30.0), point(3, None)]}
BARS = {"clean": {"A": point(0, 61.25, 3), "B": point(0, 4.0)}, "worst case": {"A": point(0, 17.0)}}
SHARES = {"AT": {"survives": 0.756, "fails": 0.244}, "AdvMoE": {"survives": 1.0}}
BINS = {
    "clean": {"edges": [0, 0.5, 1], "shares": [0.25, 0.75]},
    "by chance": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5]},
}
LABELS = {"xlabel": "MoE layer", "ylabel": "class"}
FLOWS = {"clean": {"load": [[0.75, 0.25], [0.5, 0.5]], "flows": [[[0.5, 0.25], [0.0, 0.25]]]}}


def marks(path, kind, colour):
    """How many filled or stroked paths of a colour an SVG file has."""
    styles = [
        each.get("style", "")
        for each in ElementTree.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}path")
    ]
    return sum(f"{kind}: {colour}" in style for style in styles)


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


def test_a_heat_map(tmp_path):
    heatmap_figure(heat([[0.25, 1.0], [0.5, None]]), tmp_path / "a.svg", **LABELS)
    text = words(tmp_path / "a.svg")
    assert {"0.25", "1.00", "0.50", "cat", "dog", "MoE layer", "class", "0.0"} <= set(text)  # the scale begins at 0
    heatmap_figure(heat([[0.25, 1.0], [0.5, None]]), tmp_path / "b.svg", **LABELS, spread=True)
    assert "0.0" not in words(tmp_path / "b.svg") and "0.25" in words(tmp_path / "b.svg")
    heatmap_figure(heat([[12.0, 1.0], [3.5, 2.0]]), tmp_path / "c.svg", **LABELS)
    assert {"12", "3.5"} <= set(words(tmp_path / "c.svg"))
    heatmap_figure(heat([[None, None], [None, None]]), tmp_path / "d.svg", **LABELS)
    assert {"cat", "dog"} <= set(words(tmp_path / "d.svg"))


def test_a_heat_map_in_groups(tmp_path):
    values = [[share for layer in range(20) for share in (0.25, 0.75)]] * 2
    layers = [str(layer) for layer in range(20)]
    heatmap_figure(heat(values, columns=layers, members=["a", "b"]), tmp_path / "a.svg", **LABELS)
    text = words(tmp_path / "a.svg")
    assert set(layers) <= set(text) and "0.75" not in text  # too many for their numbers
    assert marks(tmp_path / "a.svg", "stroke", "#fefefe; stroke-width: 3") == 19


def test_a_large_heat_map_names_some(tmp_path):
    names = [f"a class of a long name {at}" for at in range(100)]
    heatmap_figure(heat([[0.5] * 100] * 100, rows=names, columns=names), tmp_path / "a.svg", **LABELS)
    text = (tmp_path / "a.svg").read_text()
    assert sum(each.startswith("a class of a long") for each in words(tmp_path / "a.svg")) == 34 + 25
    assert "<image" in text and len(text) < 300_000


def test_a_flow(tmp_path):
    flow_figure({**FLOWS, "adversarial": FLOWS["clean"]}, tmp_path / "a.svg", title="Flow of images")
    text = words(tmp_path / "a.svg")
    assert {"clean", "adversarial", "MoE layer", "Flow of images", "0", "1"} <= set(text)
    # In each panel blue nodes and bands: two nodes of expert 0, and what leaves the first of them.
    assert marks(tmp_path / "a.svg", "fill", "#0072b2") == 2 * (2 + 2)


def test_a_flow_through_many_experts(tmp_path):
    even = {"load": [[1 / 8] * 8] * 17, "flows": [[[1 / 64] * 8] * 8] * 16}
    flow_figure({"clean": even}, tmp_path / "a.svg")
    # 64 flows of 1.6 % would be lost in one another: 8 grey bands lead into a bundle, and 8 out of it.
    assert marks(tmp_path / "a.svg", "fill", "#595959") == 16 * 16
    flow_figure({"clean": even}, tmp_path / "b.svg", thin=0.01)
    assert marks(tmp_path / "b.svg", "fill", "#595959") == 0


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize(
    "draw, result", [(sweep_figure, swept(0.8, 0.6, 0.4)), (dissection_figure, dissected()), (flow_figure, FLOWS)]
)
def test_the_same_bytes_each_time_whatever_the_settings(tmp_path, suffix, draw, result):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    draw(result, one)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "other"}):
        draw(json.loads(json.dumps(result)), two)
        assert matplotlib.rcParams["font.size"] == 30
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


@pytest.mark.parametrize(
    "draw, result, message",
    [
        (sweep_figure, {}, "one sweep or more"),
        (sweep_figure, {"a": {"norm": "linf"}}, "sweep 'a' with norm, points, probe, masking, got one without points"),
        (sweep_figure, {"a": swept(1, 1, 1), "b": swept(1, 1, 1, norm="l2")}, r"one norm, got \['l2', 'linf'\]"),
        (dissection_figure, {"load": {}}, "result must be a dissection with .* without num_examples"),
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
        (
            partial(heatmap_figure, **LABELS),
            heat([[1, 2]]),
            r"values must be 2 x 2, as the names are, .* got 1 x \[2\]",
        ),
        (partial(heatmap_figure, **LABELS), heat([[1, 2], [3]]), r"values must be 2 x 2, .* got 2 x \[1, 2\]"),
        (
            partial(heatmap_figure, **LABELS),
            heat([[1, 2]] * 2, members=["a", "b"]),
            r"values must be 2 x 4, .* got 2 x \[2\]",
        ),
        (flow_figure, {}, "panels must hold something to draw, got none"),
        (flow_figure, {"a": {"load": [], "flows": []}}, "flows of 'a' must be 0 x 0 x 0"),
        (
            flow_figure,
            {"a": {"load": [[1.0]] * 2, "flows": []}},
            "flows of 'a' must be 1 x 1 x 1, as its load is, got 0",
        ),
        (flow_figure, {"a": {"load": [[1.0]] * 2, "flows": [[[1, 0]]]}}, r"must be 1 x 1 x 1, .* got 1 x \[\(1, 2\)\]"),
    ],
)
def test_results_that_are_none(tmp_path, draw, result, message):
    with pytest.raises(ValueError, match=message):
        draw(result, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_other_formats_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in .svg or .png, got .*a.pdf"):
        sweep_figure(swept(1, 1, 1), tmp_path / "a.pdf")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'advmoe\[figures\]'"):
        sweep_figure(swept(1, 1, 1), tmp_path / "a.svg")


def test_no_two_of_many_series_look_alike():
    looks = list(islice(zip(cycle(drawing.LINES), cycle(drawing.MARKS), strict=False), 50))
    assert len(set(looks)) == 50

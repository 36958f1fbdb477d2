"""Figures from results alone: what is written, what it says, and that it is the same each time."""

import json
import sys
import warnings
from xml.etree import ElementTree

import matplotlib
import pytest

from advmoe.report.figures import bars_figure, dissection_figure, lines_figure, stacked_figure, sweep_figure


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


def words(path):
    """The text elements of an SVG file."""
    tree = ElementTree.fromstring(path.read_text())
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    elements = tree.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(each.itertext()).replace("\N{NO-BREAK SPACE}", " ").strip() for each in elements]


def test_a_sweep(tmp_path):
    sweep_figure(swept(0.823, 0.61, 0.402), tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert {"82.3", "61.0", "40.2", "robust accuracy (%)"} <= set(text)
    assert "attack radius eps, l\N{INFINITY} (pixels of 255)" in text
    assert "0.0 % robust at the probe, eps 255/255" in text
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


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("draw, result", [(sweep_figure, swept(0.8, 0.6, 0.4)), (dissection_figure, dissected())])
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

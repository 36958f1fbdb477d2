"""Sweeps and dissections as figures: what is written, and what is no such result."""

import pytest
from drawings import dissected, swept, words

from advmoe.report.result_figures import dissection_figure, sweep_figure


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


@pytest.mark.parametrize("layers, experts", [(1, 1), (27, 9)])
def test_extreme_shapes(tmp_path, layers, experts):
    dissection_figure(dissected(layers, experts), tmp_path / "a.svg")
    assert f"expert {experts - 1}" in words(tmp_path / "a.svg")


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


def test_numbers_and_experts_that_a_key_names_once(tmp_path):
    result = dissected(layers=2, experts=3)
    # A part narrower than 6 % has its number in the legend alone.
    result["categories"] = {**result["categories"], "only_routing_fails": 0.059, "both_fail": 0.178}
    dissection_figure(result, tmp_path / "a.svg")
    text = words(tmp_path / "a.svg")
    assert "6.0" in text and "5.9" not in text
    assert any(each.endswith("5.9 % / 6.0 %") for each in text)
    assert [text.count(f"expert {expert}") for expert in range(4)] == [1, 1, 1, 0]

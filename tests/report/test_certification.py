"""The page's part on proved routing: that it says what `certification.json` says."""

import json
import re

import pytest

from advmoe.report.certification import certification
from advmoe.report.html import joined
from advmoe.report.results import load_results

POINT = {"eps": 2 / 255, "proved": 0.75, "interval": [0.5, 0.9], "changed": 0.125, "unknown": 0.125}
EXACT = {
    "method": "exact", "num_examples": 8, "threat": {"norm": "linf"}, "seed": 0,
    "points": [POINT | {"pathways": {"1": 0.75, "2": 0.25}}],
    "quantiles": {"linf": {"p5": 0.01, "p50": None}, "l2": {"p5": 0.5, "p50": None}},
}  # fmt: skip


def loaded(tmp_path, result, router="layer"):
    run = tmp_path / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"model: {{kind: moe, router: {router}}}\ntraining: {{seed: 0}}\nthreat: {{norm: linf}}\n"
    )
    if result is not None:
        (run / "certification.json").write_text(json.dumps(result))
    return load_results([run])[0]


@pytest.mark.parametrize("exact", [True, False])
def test_the_section_says_what_was_proved(tmp_path, album, exact):
    result = EXACT if exact else {**EXACT, "method": "bounds", "points": [POINT], "quantiles": {}}
    text = " ".join(re.sub(r"<[^>]*>", " ", joined(certification(loaded(tmp_path, result), album))).split())
    assert "2/255 75.0 50.0 to 90.0 12.5 12.5" in text
    assert ("radii are exact" in text) == ("1: 75.0, 2: 25.0" in text) == ("p50 none" in text) == exact
    assert len(album.names) == 1


def test_layers_proved_and_why_there_are_no_bounds(tmp_path, album):
    bounds = {**EXACT, "method": "bounds", "points": [POINT | {"layers": [1.0, 0.25, 0.25]}], "quantiles": {}}
    said = joined(certification(loaded(tmp_path / "a", bounds), album))
    assert "0: 100.0, 1 to 2: 25.0" in said
    none = {**EXACT, "method": "attack", "unbounded": "layer_norm", "points": [POINT], "quantiles": {}}
    assert "layer_norm" in joined(certification(loaded(tmp_path / "b", none), album))


def test_a_run_without_one_has_no_section(tmp_path, album):
    assert certification(loaded(tmp_path, None), album) is None


@pytest.mark.parametrize(
    ("result", "router", "command"),
    [
        (EXACT, "layer", "certify {run} --radii 2/255 --num-examples 8"),
        (None, "fixed-top", "certify {run}"),
        (None, "layer", None),
    ],
)  # fmt: skip
def test_the_command_that_makes_it(tmp_path, result, router, command):
    run = loaded(tmp_path, result, router)
    made = [each.command for each in run.result_states() if each.title == "proved routing"]
    assert made == ([] if command is None else [f"advmoe {command.format(run=run.path)}"])

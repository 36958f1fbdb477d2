"""Pictures as data: each kind is drawn, and put into words, by what its table names."""

import json

import pytest
from drawings import FLOWS, heat, swept, words

from advmoe.report.pictures import KINDS, Picture

AXES = {"xlabel": "layer", "ylabel": "images (%)"}
SAMPLES = {
    "lines": ({"AT": [{"x": 1, "y": 20.0}, {"x": 2, "y": 50.0}]}, AXES, "Lines of images (%) against layer."),
    "bars": ({"clean": {"AT": {"y": 80.0}}}, {"ylabel": "images (%)"}, "Bars of images (%)."),
    "stacked": ({"AT": {"survives": 0.75, "fails": 0.25}}, {"xlabel": "images (%)"}, "Bars of shares."),
    "histogram": ({"AT": {"edges": [0.0, 0.5, 1.0], "shares": [0.25, 0.75]}}, AXES, "Distribution of layer."),
    "heatmap": (heat([[0.1, None], [0.9, 0.5]]), AXES, "Table of colours, 2 rows"),
    "sweep": ({"AT": swept(0.9, 0.7, 0.5)}, {}, "Lines of robust accuracy against eps."),
    "flow": (FLOWS, {}, "Flow"),
}
"""By kind: data, options, and how its words begin."""


def test_every_kind_has_a_sample():
    assert list(SAMPLES) == list(KINDS)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_picture_is_drawn_and_put_into_words_from_stored_data(kind, tmp_path):
    data, options, beginning = SAMPLES[kind]
    picture = Picture(kind, "a", "Title", *json.loads(json.dumps([data, options])))
    assert picture.alt.startswith(beginning) and picture.alt.endswith(".")
    picture.draw(tmp_path / "a.svg")
    assert words(tmp_path / "a.svg") and "Title" not in words(tmp_path / "a.svg")  # a page has it beside the picture


def test_a_title_is_drawn_where_one_is_given(tmp_path):
    data, options, _ = SAMPLES["lines"]
    Picture("lines", "a", "Title", data, options).draw(tmp_path / "a.svg", title="Drawn")
    assert "Drawn" in words(tmp_path / "a.svg")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"kind must be one of lines, bars, .*, got 'pie'"):
        Picture("pie", "a", "T", {})

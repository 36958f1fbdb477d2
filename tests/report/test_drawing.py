"""What all figures share: the same file each time, its kinds, its looks, and its legend."""

import json
import math
import sys
from itertools import cycle, islice

import matplotlib
import pytest
from drawings import FLOWS, dissected, swept, words

from advmoe.report import drawing
from advmoe.report.figures import dissection_figure, flow_figure, sweep_figure


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize(
    "draw, result", [(sweep_figure, swept(0.8, 0.6, 0.4)), (dissection_figure, dissected(2)), (flow_figure, FLOWS)]
)
def test_the_same_bytes_each_time_whatever_the_settings(tmp_path, suffix, draw, result):
    one, two = tmp_path / f"one.{suffix}", tmp_path / f"two.{suffix}"
    draw(result, one)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.hashsalt": "other"}):
        draw(json.loads(json.dumps(result)), two)
        assert matplotlib.rcParams["font.size"] == 30
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


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


def test_nothing_is_written_of_a_figure_that_fails(tmp_path):
    with pytest.raises(ValueError, match="halfway"), drawing.drawn(tmp_path / "a.svg", 2, 2) as figure:
        figure.add_subplot()
        raise ValueError("halfway")
    assert not list(tmp_path.iterdir())


def test_what_is_unknown_is_a_gap():
    assert math.isnan(drawing.nan_or(None)) and drawing.nan_or(3) == 3.0


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, "one two\nthree"),
        ("one two three", 2, "one two\nthree"),  # no line is narrower than eight
        ("", 10, ""),
        ("unbroken-by-spaces", 10, "unbroken-\nby-spaces"),
    ],
)
def test_a_text_on_lines(text, width, lines):
    assert drawing.wrapped(text, width) == lines


def test_fields_that_a_result_lacks_are_named():
    drawing.require_fields({"a": 1, "b": 2}, ("a",), "sweep")
    with pytest.raises(ValueError, match=r"^result must be a sweep with a, b, c, got one without b, c$"):
        drawing.require_fields({"a": 1}, ("a", "b", "c"), "sweep")
    with pytest.raises(ValueError, match=r"got one without a, b$"):
        drawing.require_fields(["a"], ("a", "b"), "sweep")


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (["x" * 40] * 3, 2),  # of 52 characters to a row, a name takes six more than its own: three rows
        (["x" * 20] * 3, 1),  # two to a row
        (["x", "y", "z"], 0),
        (["one name " * 8], 1),  # on two lines itself
    ],
)
def test_a_figure_grows_with_its_legend_s_rows(tmp_path, names, more):
    with drawing.drawn(tmp_path / "a.svg", 4, 3) as figure:
        axes = figure.add_subplot()
        for name in names:
            axes.plot([0, 1], label=name)
        drawing.finish(axes, "Title", legend=True)
        assert figure.get_figheight() == pytest.approx(3 + more * drawing.LEGEND_ROW)
    assert {"Title", *(line for name in names for line in drawing.wrapped(name, 46).splitlines())} <= set(
        words(tmp_path / "a.svg")
    )

"""Tables as colours: what is named and numbered, and which names fit no values."""

import re
from xml.etree import ElementTree

import pytest
from drawings import heat, marks, words

from advmoe.report.heatmap import heatmap_figure

LABELS = {"xlabel": "MoE layer", "ylabel": "class"}


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


@pytest.mark.parametrize(
    "table, message",
    [
        (heat([[1, 2]]), r"values must be 2 x 2, as the names are, .* got 1 x \[2\]"),
        (heat([[1, 2], [3]]), r"values must be 2 x 2, .* got 2 x \[1, 2\]"),
        (heat([[1, 2]] * 2, members=["a", "b"]), r"values must be 2 x 4, .* got 2 x \[2\]"),
    ],
)
def test_names_fit_the_values(tmp_path, table, message):
    with pytest.raises(ValueError, match=message):
        heatmap_figure(table, tmp_path / "a.svg", **LABELS)
    assert not list(tmp_path.iterdir())


def test_numbers_are_dark_on_light_cells_and_light_on_dark_ones(tmp_path):
    heatmap_figure(heat([[0.0, 1.0], [0.5, 0.6]]), tmp_path / "a.svg", **LABELS)
    inks = {}
    for each in ElementTree.fromstring((tmp_path / "a.svg").read_text()).iter("{http://www.w3.org/2000/svg}text"):
        inks["".join(each.itertext()).strip()] = re.search(r"fill: (#\w+)", each.get("style"))
    # Above 0.55 of the scale, from blue to yellow.
    assert {cell: inks[cell][1] for cell in ("0.00", "0.50", "0.60", "1.00")} == {
        "0.00": "#fefefe", "0.50": "#fefefe", "0.60": "#010101", "1.00": "#010101",
    }  # fmt: skip


def test_long_names_are_cut(tmp_path):
    rows = ("x" * 22, "y" * 23)
    heatmap_figure(heat([[0.5, 0.5]] * 2, rows=rows), tmp_path / "a.svg", **LABELS)
    assert {"x" * 22, "y" * 21 + "\N{HORIZONTAL ELLIPSIS}"} <= set(words(tmp_path / "a.svg"))

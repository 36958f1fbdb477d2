"""Names in any script: drawn by a font that has them, or with boxes and one note; never with a flood of warnings."""

import warnings
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")
from fontTools.fontBuilder import FontBuilder  # comes with matplotlib
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from advmoe.report import fonts
from advmoe.report.figures import bars_figure, heatmap_figure, lines_figure

CAT, DOG, HOUSE = "猫", "犬", "дом"  # matplotlib's own font has Cyrillic


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """What was said before says nothing of a test, every warning is an error, and fonts are matplotlib's own."""
    monkeypatch.setattr(fonts, "_said", [])
    shipped = [each for each in fontManager.ttflist if "mpl-data" in each.fname]
    monkeypatch.setattr(fontManager, "ttflist", shipped)
    fonts._fallbacks.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    fonts._fallbacks.cache_clear()


@pytest.fixture
def font(tmp_path):
    """A font of one character, the cat: a square."""
    pen = TTGlyphPen(None)
    for k, point in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if k else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord(CAT): "cat"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Of Cats", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    fontManager.addfont(tmp_path / "cats.ttf")
    return "Of Cats"


def draw(path, *names):
    table = {"rows": ["row"], "columns": names, "values": [[0.5] * len(names)]}
    heatmap_figure(table, path, xlabel="class", ylabel="")
    return path


def families(path):
    """The fonts of each text of an SVG file."""
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(each.itertext()).strip(): each.get("style", "") for each in texts}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_characters_that_no_font_has_are_boxes_and_one_note(tmp_path, capsys, suffix):
    draw(tmp_path / f"a.{suffix}", CAT, HOUSE)
    lines_figure({DOG: [{"x": 1, "y": 2}], CAT: [{"x": 1, "y": 3}]}, tmp_path / f"b.{suffix}", xlabel=DOG, ylabel="y")
    bars_figure({CAT: {DOG: {"y": 1}}}, tmp_path / f"c.{suffix}", ylabel="y", title=DOG)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note  no font here has ")


def test_a_font_that_has_them_is_found_for_the_texts_that_need_it(tmp_path, capsys, font):
    styles = families(draw(tmp_path / "a.svg", CAT, HOUSE, "plain"))
    assert font in styles[CAT] and font not in styles[HOUSE] and font not in styles["plain"]
    boxes = draw(tmp_path / "b.png", DOG).read_bytes()
    assert draw(tmp_path / "c.png", CAT).read_bytes() != boxes
    assert len(capsys.readouterr().err.splitlines()) == 1  # of the dog


def test_usual_names_are_drawn_as_ever(tmp_path, capsys, font):
    styles = families(draw(tmp_path / "a.svg", "cat", "café", "l∞ ± …"))
    assert not any(font in style for style in styles.values())
    assert capsys.readouterr().err == ""


def test_names_that_are_no_text_are_drawn_with_escapes(tmp_path):
    styles = families(draw(tmp_path / "a.svg", "chat-\udce9", "bell\x07", "line\nend"))
    assert {r"chat-\xe9", r"bell\x07", r"line\nend"} <= set(styles)

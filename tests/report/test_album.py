import pytest

from advmoe.report.figures import bars_figure, lines_figure

POINTS = {"a": [{"x": 1, "y": 2.0}]}
OPTIONS = {"xlabel": "x", "ylabel": "y"}


def test_a_figure_is_drawn_twice_and_set_into_the_page(album, parsed):
    made = album.draw("Run/1 loss", lines_figure, POINTS, title="Loss", alt="Falls.", caption="By epoch.", **OPTIONS)
    assert sorted(each.name for each in album.folder.iterdir()) == ["run-1-loss.png", "run-1-loss.svg"]
    assert (album.folder / "run-1-loss.png").read_bytes().startswith(b"\x89PNG")
    page = parsed(made)
    assert page.texts("figcaption") == ["Loss By epoch."]
    assert page.texts("title") == ["Loss"] and page.texts("desc") == ["Falls."]
    assert page.attributes("div", "aria-label") == ["Loss"]
    assert page.attributes("figure", "class") == []


def test_no_two_figures_share_a_name_or_an_identifier(album, parsed):
    made = [album.draw(name, lines_figure, POINTS, title="T", alt="A", **OPTIONS) for name in ("a", "A", "a!", "-")]
    assert album.names == ["a", "a-2", "a-3", "figure"]
    found = [each for tag in ("g", "path", "title", "desc") for each in parsed(*made).attributes(tag, "id")]
    assert len(found) == len(set(found)) > 8


def test_a_wide_figure_takes_the_whole_width(album, parsed):
    groups = {str(layer): {"changed": {"y": 1.0}} for layer in range(30)}
    made = album.draw("wide", bars_figure, groups, title="T", alt="A", ylabel="y")
    assert parsed(made).attributes("figure", "class") == ["wide"]


def test_a_figure_that_is_there_already(album, tmp_path, parsed):
    for suffix in ("svg", "png"):
        lines_figure(POINTS, tmp_path / f"there.{suffix}", **OPTIONS)
    made = album.keep("Study fig", tmp_path / "there.svg", tmp_path / "there.png", title="T", alt="A", caption=None)
    assert (album.folder / "study-fig.svg").read_bytes() == (tmp_path / "there.svg").read_bytes()
    assert (album.folder / "study-fig.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    assert parsed(made).texts("figcaption") == ["T"]
    album.keep("no picture", tmp_path / "there.svg", None, title="T", alt="A")
    assert not (album.folder / "no-picture.png").exists()


def test_no_figure_where_it_should_be(album, tmp_path):
    with pytest.raises(ValueError, match=r"figure 'T' must be an SVG file, got .*absent.svg"):
        album.keep("a", tmp_path / "absent.svg", None, title="T", alt="A")

from advmoe.report.pictures import Picture

POINTS = {"a": [{"x": 1, "y": 2.0}]}
OPTIONS = {"xlabel": "x", "ylabel": "y"}


def test_a_picture_is_drawn_twice_and_set_into_the_page(album, parsed):
    drawn = album.draw(Picture("lines", "loss", "Loss", POINTS, OPTIONS, "By epoch."), "Run/1")
    assert sorted(each.name for each in album.folder.iterdir()) == ["run-1-loss.png", "run-1-loss.svg"]
    assert (album.folder / "run-1-loss.png").read_bytes().startswith(b"\x89PNG")
    page = parsed(drawn)
    assert page.texts("figcaption") == ["Loss By epoch."]
    assert page.texts("title") == ["Loss"] and page.texts("desc") == ["Lines of y against x. a: 2 at 1."]
    assert page.attributes("div", "aria-label") == ["Loss"]
    assert page.attributes("figure", "class") == []


def test_no_two_figures_share_a_name_or_an_identifier(album, parsed):
    drawn = [album.draw(Picture("lines", name, "T", POINTS, OPTIONS)) for name in ("a", "A", "a!", "-")]
    assert album.names == ["a", "a-2", "a-3", "figure"]
    idents = [each for tag in ("g", "path", "title", "desc") for each in parsed(*drawn).attributes(tag, "id")]
    assert len(idents) == len(set(idents)) > 8


def test_a_wide_figure_takes_the_whole_width(album, parsed):
    groups = {str(layer): {"changed": {"y": 1.0}} for layer in range(30)}
    drawn = album.draw(Picture("bars", "wide", "T", groups, {"ylabel": "y"}))
    assert parsed(drawn).attributes("figure", "class") == ["wide"]

import pytest

from advmoe.report.figures import lines_figure
from advmoe.report.svg import inlined

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 200 100"'


def inside(body: str, head: str = HEAD) -> str:
    return inlined(f"{head}>{body}</svg>", prefix="f1", title="Title", description="What it shows").html


def test_it_is_named_and_described():
    drawing = inlined(f"{HEAD}/>", prefix="f1", title="A < B", description='"x"')
    assert drawing.width == 200
    assert drawing.html == (
        '<svg viewBox="0 0 200 100" role="img" class="drawing" style="--natural: 200" '
        'aria-labelledby="f1-title f1-desc"><title id="f1-title">A &lt; B</title><desc id="f1-desc">"x"</desc></svg>'
    )


def test_what_matplotlib_says_of_itself_and_rules_for_a_whole_page_go():
    body = '<metadata><x/></metadata><defs><style type="text/css">*{stroke-linejoin: round}</style></defs><g/>'
    assert inside(body).endswith("</desc><defs /><g /></svg>")


def test_identifiers_and_what_refers_to_them_get_the_prefix():
    body = (
        '<defs><clipPath id="c"/></defs><use xlink:href="#c"/><g clip-path="url(#c)"/>'
        '<g style="clip-path: url(#c); stroke-width: 2"/>'
    )
    html = inside(body)
    assert '<clipPath id="f1-c" />' in html and '<use href="#f1-c" />' in html
    assert '<g clip-path="url(#f1-c)" />' in html
    assert '<g style="clip-path: url(#f1-c); stroke-width: 2" />' in html


def test_colours_that_stand_for_the_pages_own():
    body = '<path style="fill: #FFFFFF; stroke: #000000"/><path fill="#000000" stroke="#d9d9d9"/><path fill="#0072b2"/>'
    html = inside(body)
    assert '<path style="fill: none; stroke: currentColor" />' in html
    assert '<path fill="currentColor" stroke="var(--grid)" />' in html
    assert '<path fill="#0072b2" />' in html


def test_pictures_stay():
    assert 'href="data:image/png;base64,AAAA"' in inside('<image xlink:href="data:image/png;base64,AAAA"/>')


def test_text_that_xml_cannot_hold():
    with pytest.raises(ValueError, match="figure 'T' must hold text that XML can hold, got not well-formed"):
        inlined(f"{HEAD}><text>\x01</text></svg>", prefix="f1", title="T", description="")


def test_a_figure_of_our_own(tmp_path, parsed):
    name = "a <b> & 'c'"
    lines_figure({name: [{"x": 1, "y": 2.0}], "d": [{"x": 2, "y": 1.0}]}, tmp_path / "a.svg", xlabel="x", ylabel="$y$")
    drawing = inlined((tmp_path / "a.svg").read_text(), prefix="f7", title="T", description="D")
    page = parsed(drawing.html)
    assert {name, "d", "x", "$y$"} <= set(page.texts("text"))
    assert all(each.startswith("f7-") for tag in ("g", "path", "clippath") for each in page.attributes(tag, "id"))
    assert "http" not in drawing.html

import pytest

from advmoe.report.html import Html, element, joined

HOSTILE = "<script>alert('1 & \"2\"')</script>"


def test_text_is_escaped_and_html_is_not():
    assert element("p", HOSTILE) == "<p>&lt;script&gt;alert('1 &amp; \"2\"')&lt;/script&gt;</p>"
    assert element("p", element("b", "x < y")) == "<p><b>x &lt; y</b></p>"
    assert joined("a & b", Html("<br>")) == "a &amp; b<br>"


def test_attributes_are_escaped_and_cannot_be_left():
    html = element("a", href=HOSTILE)
    assert html == ('<a href="&lt;script&gt;alert(&#x27;1 &amp; &quot;2&quot;&#x27;)&lt;/script&gt;"></a>')
    assert isinstance(html, Html)


def test_names_of_attributes():
    html = element("td", class_="number", aria_sort="none", hidden=True, title=None, lang=False, colspan=2)
    assert html == '<td class="number" aria-sort="none" hidden colspan="2"></td>'


def test_elements_without_content_are_not_closed():
    assert element("img", src="data:,") == '<img src="data:,">'
    assert element("p") == "<p></p>"


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, ""), (3, "3"), (0.5, "0.5"), ([], ""), (["a", None, ["b", [1]]], "ab1"), (iter("ab"), "ab")],
)
def test_what_an_element_may_hold(content, text):
    assert element("p", content) == f"<p>{text}</p>"

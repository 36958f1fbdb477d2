"""Sections of the page, and links that lead to each of their parts."""

import re

from advmoe.report.html import element
from advmoe.report.sections import Subsection, contents, section


def test_parts_without_content_are_left_out():
    parts = [
        Subsection("a", "First", element("p", "text")),
        Subsection("b", "Second", None),
        Subsection("c", "Third", "3"),
    ]
    made = section("run", "A <run>", element("p", "intro"), parts=parts)
    assert (made.ident, made.title) == ("run", "A <run>")
    assert list(made.parts) == [("run-a", "First"), ("run-c", "Third")]
    html = str(made.html)
    assert "A &lt;run&gt;" in html and "Second" not in html and html.index("intro") < html.index("First")


def test_every_link_of_the_contents_leads_somewhere():
    sections = [
        section("one", "One", parts=[Subsection("a", "First", "text"), Subsection("b", "Second", "text")]),
        section("two", "Two", "text"),
    ]
    listed = str(contents(sections))
    identifiers = {found for each in sections for found in re.findall(r'id="([^"]+)"', str(each.html))}
    links = re.findall(r'href="#([^"]+)"', listed)
    assert links == ["one", "one-a", "one-b", "two"] and set(links) <= identifiers
    assert str(contents([])).count("<li>") == 0

"""A section of the page: a title, parts with titles of their own, and where links to them lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from advmoe.report.html import Content, Html, element


class Subsection(NamedTuple):
    """A part of a section; one without content is left out."""

    key: str
    """Ends its identifier in the page."""
    title: str
    content: Content


@dataclass(frozen=True)
class Section:
    """A section as the page and its contents need it."""

    ident: str
    title: str
    parts: Sequence[tuple[str, str]]
    """Identifier and title of each part."""
    html: Html


def section(ident: str, title: str, *intro: Content, parts: Sequence[Subsection] = ()) -> Section:
    """A section that begins with `intro`; `ident` is its identifier in the page."""
    shown = [part for part in parts if part.content]
    html = element(
        "section",
        element("h2", title, id=f"{ident}-title"),
        intro,
        [[element("h3", part.title, id=f"{ident}-{part.key}"), part.content] for part in shown],
        id=ident,
        aria_labelledby=f"{ident}-title",
    )
    return Section(ident, title, [(f"{ident}-{part.key}", part.title) for part in shown], html)


def contents(sections: Sequence[Section]) -> Html:
    """Links to the sections and their parts."""
    return element("ol", [element("li", _link(each.ident, each.title), _parts(each)) for each in sections])


def _link(ident: str, title: str) -> Html:
    return element("a", title, href=f"#{ident}")


def _parts(of: Section) -> Html | None:
    return element("ol", [element("li", _link(*part)) for part in of.parts]) if of.parts else None

"""SVG as matplotlib writes it, made to stand in an HTML page and to follow the page's colours.

Only what this package has drawn from data comes here, never a file from elsewhere. Identifiers get a prefix: the
figures of a page share one space of names.
"""

from __future__ import annotations

from typing import NamedTuple
from xml.etree import ElementTree

from advmoe.errors import InputError
from advmoe.report.html import Html, element

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"

_DROPPED = {"metadata", "style"}
"""What matplotlib says of itself, and rules that would hold for the whole page."""

# Colours of `drawing` that stand for the page's own: its background, text, faint lines and quiet text.
_THEME = {
    ("fill", "#ffffff"): "none",
    ("stroke", "#ffffff"): "var(--card)",
    ("stroke", "#fefefe"): "var(--card)",
    ("fill", "#000000"): "currentColor",
    ("stroke", "#000000"): "currentColor",
    ("fill", "#d9d9d9"): "var(--grid)",
    ("stroke", "#d9d9d9"): "var(--grid)",
    ("fill", "#595959"): "var(--quiet)",
    ("stroke", "#595959"): "var(--quiet)",
}


class Drawing(NamedTuple):
    """A figure fit for a page."""

    html: Html
    width: float
    """Its natural width in points: at it, text has the size that it was drawn in."""


def inlined(text: str, *, prefix: str, title: str, description: str) -> Drawing:
    """An SVG document as an element of a page, with a title and a description for those who cannot see it.

    Args:
        text: the SVG that `drawing.drawn` wrote.
        prefix: of all its identifiers; no other figure of the page may have it.

    Raises `ValueError` where a text in it holds characters that XML has none of.
    """
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"figure {title!r} must hold text that XML can hold, got {error}") from None
    _adapt(tree, prefix)
    width, height = _size(tree)
    tree.attrib = {
        "viewBox": f"0 0 {width:g} {height:g}", "role": "img", "class": "drawing",
        "style": f"--natural: {width:g}", "aria-labelledby": f"{prefix}-title {prefix}-desc",
    }  # fmt: skip
    inside = "".join(ElementTree.tostring(child, encoding="unicode", short_empty_elements=True) for child in tree)
    head = element("title", title, id=f"{prefix}-title") + element("desc", description, id=f"{prefix}-desc")
    opening = element("svg", **{name.replace("-", "_"): value for name, value in tree.attrib.items()})
    return Drawing(Html(opening.removesuffix("</svg>") + head + inside + "</svg>"), width)


def _size(tree: ElementTree.Element) -> tuple[float, float]:
    _, _, width, height = map(float, tree.attrib["viewBox"].split())
    return width, height


def _adapt(node: ElementTree.Element, prefix: str) -> None:
    """Name and colour `node`, and what is below it, for the page."""
    node.tag = node.tag.removeprefix(_SVG)
    attributes = node.attrib
    if "id" in attributes:
        attributes["id"] = f"{prefix}-{attributes['id']}"
    if (href := attributes.pop(_HREF, None)) is not None:
        attributes["href"] = f"#{prefix}-{href[1:]}" if href.startswith("#") else href
    if "style" in attributes:
        attributes["style"] = "; ".join(map(_themed, attributes["style"].split(";")))
    for name in ("fill", "stroke"):
        if name in attributes:
            attributes[name] = _THEME.get((name, attributes[name].lower()), attributes[name])
    for name in ("style", "clip-path", "fill"):
        if name in attributes:
            attributes[name] = attributes[name].replace("url(#", f"url(#{prefix}-")
    for child in list(node):
        if child.tag.removeprefix(_SVG) in _DROPPED:
            node.remove(child)
        else:
            _adapt(child, prefix)


def _themed(declaration: str) -> str:
    name, _, value = (part.strip() for part in declaration.partition(":"))
    return f"{name}: {_THEME.get((name, value.lower()), value)}"

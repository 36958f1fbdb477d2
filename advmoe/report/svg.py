"""SVG files made fit to stand in an HTML page: nothing in them runs or is fetched, and they follow the page's colours.

What may be in a file is listed, so that a file of unknown origin can add no script, no style for the rest of the page
and no request. Identifiers get a prefix: the figures of a page share one space of names.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree import ElementTree

from advmoe.errors import InputError
from advmoe.report.html import Html, element

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"

_ELEMENTS = {
    "svg", "g", "defs", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "use",
    "clipPath", "image", "pattern", "linearGradient", "radialGradient", "stop", "symbol", "marker", "mask",
}  # fmt: skip
_ATTRIBUTES = {
    "id", "class", "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "dx", "dy", "width", "height",
    "points", "transform", "style", "fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-opacity",
    "stroke-dasharray", "stroke-linecap", "stroke-linejoin", "opacity", "clip-path", "clip-rule", "viewBox",
    "preserveAspectRatio", "patternUnits", "patternTransform", "patternContentUnits", "clipPathUnits", "offset",
    "stop-color", "stop-opacity", "gradientUnits", "gradientTransform", "font-size", "font-weight", "font-style",
    "font-family", "text-anchor", "dominant-baseline", "mask", "marker-end", "markerWidth", "markerHeight", "orient",
    "refX", "refY",
}  # fmt: skip
_DRAWN_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=\s]*")

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
    """Points at which its text has the size that it was drawn in."""


def inlined(text: str, *, prefix: str, title: str, description: str) -> Drawing:
    """An SVG document as an element of a page, with a title and a description for those who cannot see it.

    Args:
        text: the SVG file's.
        prefix: of all its identifiers; no other figure of the page may have it.

    Raises `ValueError` where the text is no SVG document.
    """
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InputError(f"figure {title!r} must be SVG, got a file that is no XML ({error})") from None
    if tree.tag != f"{_SVG}svg":
        raise InputError(f"figure {title!r} must be SVG, got <{tree.tag}>")
    _clean(tree, prefix)
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
    box = [float(number) for number in re.findall(r"-?[\d.]+", tree.get("viewBox", ""))]
    if len(box) != 4 or min(box[2:]) <= 0 or box[:2] != [0, 0]:
        raise InputError(f"figure must have a viewBox from 0 0, got {tree.get('viewBox')!r}")
    return box[2], box[3]


def _clean(node: ElementTree.Element, prefix: str) -> None:
    """Drop what is not listed, below `node` and at it; name and colour the rest for the page."""
    node.tag = node.tag.removeprefix(_SVG)
    href = node.attrib.get(_HREF) or node.attrib.get("href") or ""
    kept = {name: value for name, value in node.attrib.items() if name in _ATTRIBUTES}
    if "id" in kept:
        kept["id"] = f"{prefix}-{kept['id']}"
    if "style" in kept:
        kept["style"] = "; ".join(_declarations(kept["style"], prefix))
    for name in ("fill", "stroke"):
        if name in kept:
            kept[name] = _THEME.get((name, kept[name].lower()), kept[name])
    kept = {name: _local(value, prefix) for name, value in kept.items() if name == "style" or _harmless(value)}
    if href.startswith("#"):
        kept["href"] = f"#{prefix}-{href[1:]}"
    elif node.tag == "image" and _DRAWN_PICTURE.fullmatch(href):
        kept["href"] = href
    node.attrib = kept
    for child in list(node):
        if isinstance(child.tag, str) and child.tag.removeprefix(_SVG) in _ELEMENTS:
            _clean(child, prefix)
        else:
            node.remove(child)


def _declarations(style: str, prefix: str) -> list[str]:
    found = []
    for each in style.split(";"):
        name, _, value = (part.strip() for part in each.partition(":"))
        if name and _harmless(value) and "\\" not in value:
            found.append(f"{name}: {_THEME.get((name, value.lower()), value)}")
    return found


def _harmless(value: str) -> bool:
    """Whether a value names nothing outside the figure."""
    return all(inner.strip(" \"'").startswith("#") for inner in re.findall(r"url\(([^)]*)", value, re.I)) and not (
        re.search(r"javascript:|expression\(|@import|image-set|\bsrc\(", value, re.I)
    )


def _local(value: str, prefix: str) -> str:
    return re.sub(r"url\(\s*[\"']?#([^)\"']*)[\"']?\s*\)", rf"url(#{prefix}-\1)", value)

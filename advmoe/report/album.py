"""The pictures of a page: each drawn as SVG and as PNG, and set into the page with words that say what it shows."""

from __future__ import annotations

import re
from pathlib import Path

from advmoe.report.html import Html, element
from advmoe.report.pictures import Picture
from advmoe.report.svg import inlined

_COLUMN = 420
"""Points: a wider picture takes the page's whole width."""


class Album:
    """Draws pictures into a folder and hands back what goes into the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def draw(self, picture: Picture, of: str = "") -> Html:
        """Draw a picture as SVG and PNG; the page's own heading takes the place of a title. `of`: what it is of, which
        its files are named for too.
        """
        name = self._free_name(f"{of}-{picture.name}")
        for suffix in ("svg", "png"):
            picture.draw(self.folder / f"{name}.{suffix}")
        text = (self.folder / f"{name}.svg").read_text(encoding="utf-8")
        drawing = inlined(text, prefix=f"f{len(self.names)}", title=picture.title, description=picture.alt)
        below = element("figcaption", element("b", picture.title), " " if picture.caption else None, picture.caption)
        box = element("div", drawing.html, class_="scroll", role="group", tabindex="0", aria_label=picture.title)
        return element("figure", box, below, class_="wide" if drawing.width > _COLUMN else None)

    def _free_name(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "figure"
        count = 2
        free = plain
        while free in self.names:
            free, count = f"{plain}-{count}", count + 1
        self.names.append(free)
        return free

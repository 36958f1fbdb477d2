"""The figures of a page: each drawn as SVG and as PNG, and set into the page with words that say what it shows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.errors import InputError
from advmoe.report.html import Content, Html, element
from advmoe.report.svg import inlined

_COLUMN = 420
"""Points: a wider figure takes the page's whole width."""


class Album:
    """Draws figures into a folder and hands back what goes into the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def draw(
        self, name: str, function: Callable[..., None], *data: Any, title: str, alt: str, caption: Content = None,
        **options: Any,
    ) -> Html:  # fmt: skip
        """Draw `function(*data, path, **options)` as SVG and PNG; the page's own heading takes the place of a title."""
        name = self._taken(name)
        for suffix in ("svg", "png"):
            function(*data, self.folder / f"{name}.{suffix}", **options)
        return self._framed(name, title, alt, caption)

    def keep(self, name: str, svg: Path, png: Path | None, *, title: str, alt: str, caption: Content = None) -> Html:
        """Take a figure that is drawn already. Raises `ValueError` where it is no SVG file."""
        name = self._taken(name)
        if not svg.is_file():
            raise InputError(f"figure {title!r} must be an SVG file, got {str(svg)!r}, which is none")
        shutil.copyfile(svg, self.folder / f"{name}.svg")
        if png is not None and png.is_file():
            shutil.copyfile(png, self.folder / f"{name}.png")
        return self._framed(name, title, alt, caption)

    def _taken(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "figure"
        count = 2
        free = plain
        while free in self.names:
            free, count = f"{plain}-{count}", count + 1
        self.names.append(free)
        return free

    def _framed(self, name: str, title: str, alt: str, caption: Content) -> Html:
        text = (self.folder / f"{name}.svg").read_text(encoding="utf-8", errors="replace")
        drawing = inlined(text, prefix=f"f{len(self.names)}", title=title, description=alt)
        below = element("figcaption", element("b", title), " " if caption else None, caption)
        box = element("div", drawing.html, class_="scroll", role="group", tabindex="0", aria_label=title)
        return element("figure", box, below, class_="wide" if drawing.width > _COLUMN else None)

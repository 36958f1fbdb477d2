"""Fonts for what a figure's usual one lacks: names of classes may be in any script."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from advmoe.progress import tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LATIN = "\u024f"
"""The last character up to which matplotlib's own font has all of them."""
_EMPTY = "Last Resort"
"""The names of fonts that have nothing but a box for every character begin so."""


@contextmanager
def fallback_fonts(figure: Figure) -> Iterator[None]:
    """Give every text of `figure` fonts of this machine that have its characters, and silence warnings inside.

    Characters that no font has are drawn as boxes; one note says so.
    """
    import warnings

    from matplotlib.text import Text

    missing = ""
    for text in figure.findobj(Text):
        if isinstance(text, Text) and max(shown := text.get_text(), default="") > _LATIN:
            families, lacking = _fallbacks("".join(sorted(set(shown) - {"\n"})))
            if families:
                text.set_fontfamily([*text.get_fontfamily(), *families])
            missing += lacking
    if missing:
        _say_once(missing[0])
    with warnings.catch_warnings():
        if missing:  # of each of them, at every place, once more
            warnings.simplefilter("ignore", UserWarning)
        yield


_said: list[str] = []


def _say_once(character: str) -> None:
    """Note that there are boxes in figures; once for all characters and figures."""
    if not _said:
        _said.append(character)
        tell(f"note  no font here has {character} and others: figures show boxes (a font such as Noto Sans CJK helps)")


@cache
def _fallbacks(characters: str) -> tuple[tuple[str, ...], str]:
    """The fewest fonts, by family, that have what the usual one lacks of `characters`; and what none of them has."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    missing = set(map(ord, characters)) - _characters(findfont(FontProperties()))
    if not missing:
        return (), ""
    plain = [each for each in fontManager.ttflist if each.style == "normal" and not each.name.startswith(_EMPTY)]
    fonts = {
        each.name: _characters(each.fname) for each in sorted(plain, key=lambda each: abs(int(each.weight) - 400))[::-1]
    }
    families = []
    while missing:
        best = max(sorted(fonts), key=lambda name: len(fonts[name] & missing), default=None)
        if best is None or not fonts[best] & missing:
            break
        families.append(best)
        missing -= fonts[best]
    return tuple(families), "".join(map(chr, sorted(missing)))


@cache
def _characters(path: str) -> frozenset[int]:
    """The characters that the font in a file can draw at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (OSError, RuntimeError):  # a damaged font is none
        return frozenset()

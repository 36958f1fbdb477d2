"""HTML put together from parts: whatever is not HTML already is escaped, in text and in attributes alike."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is HTML: it is taken as it is. Only what this package has written itself may become one."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]
"""What an element may hold: `Html` as it is, other text escaped, None nothing, and any of these in a row."""

_VOID = {"img", "br", "hr", "meta", "link", "input", "col"}


def element(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Html:
    """An element with its content.

    Args:
        attributes: a trailing underscore is dropped (`class_`), the others become hyphens (`aria_sort`); None and False
            leave an attribute out, True gives it without a value.
    """
    words = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(attribute)
        elif value is not None and value is not False:
            words.append(f'{attribute}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{joined(*content)}</{name}>")


def joined(*content: Content) -> Html:
    """Parts in a row, without an element around them."""
    parts: list[str] = []
    for part in content:
        if isinstance(part, Html):
            parts.append(part)
        elif isinstance(part, str | int | float):
            parts.append(html.escape(str(part), quote=False))
        elif part is not None:
            parts.append(joined(*part))
    return Html("".join(parts))

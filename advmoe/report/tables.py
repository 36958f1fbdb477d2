"""Tables that a reader can sort by any column, and numbers as they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from advmoe import text
from advmoe.report.html import Content, Html, element

DASH = "\N{EN DASH}"
_LONG = 30
"""Characters: a longer name of a row gets a wider column."""
Better = Literal["higher", "lower"]
"""Which end of a column is the good one."""


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and the number or text by which its column is sorted."""

    content: Content
    order: float | str | None = None
    """None stands below everything else, whichever way the column is sorted."""
    shade: bool = False
    """Whether it is another's published number, shown more quietly."""


@dataclass(frozen=True)
class Column:
    """A column's title and how to read it."""

    title: str
    better: Better | None = None
    """Where it is given, the best cell of several is printed in bold."""


def table(caption: str, columns: Sequence[Column | str], rows: Sequence[Sequence[Cell | Content]]) -> Html:
    """A table; the first cell of a row names it. It scrolls within its own box where a page is narrow.

    Args:
        rows: a cell for each column; one that is not a `Cell` is sorted by what it shows.
    """
    heads = [column if isinstance(column, Column) else Column(column) for column in columns]
    lines = [[_as_cell(each) for each in row] for row in rows]
    orders = [[line[at].order for line in lines] for at in range(len(heads))]
    best = [_best(column.better, order) for column, order in zip(heads, orders, strict=True)]
    numeric = [at > 0 and any(isinstance(each, int | float) for each in order) for at, order in enumerate(orders)]
    head = [_head(column, right) for column, right in zip(heads, numeric, strict=True)]
    body = [element("tr", map(_cell, line, range(len(line)), best, numeric)) for line in lines]
    if any(each is not None for each in best):
        caption = f"{caption.removesuffix('.')}. The best of a column is in bold."
    return _boxed("data", caption, element("thead", element("tr", head)), element("tbody", body))


def _boxed(kind: str, caption: str, *parts: Html) -> Html:
    inner = element("table", element("caption", element("span", caption)), parts, class_=kind)
    return element("div", inner, class_="scroll", role="group", tabindex="0", aria_label=caption)


def _head(column: Column, numeric: bool) -> Html:
    hint = column.better and element("span", f"({column.better} is better)", class_="unseen")
    words = [[element("span", word), " "] for word in column.title.split()]  # a name such as pgd-10 stays on one line
    button = element("button", words, hint, type="button")
    return element("th", button, scope="col", aria_sort="none", class_="number" if numeric else None)


def _cell(cell: Cell, at: int, best: float | None, numeric: bool) -> Html:
    if at == 0:
        long = isinstance(cell.order, str) and len(cell.order) > _LONG
        return element("th", cell.content, scope="row", class_="long" if long else None, data_order=_order(cell.order))
    shown = element("strong", cell.content) if best is not None and cell.order == best else cell.content
    kinds = " ".join(word for word, wanted in (("number", numeric), ("shade", cell.shade)) if wanted)
    return element("td", shown, class_=kinds or None, data_order=_order(cell.order))


def _as_cell(content: Cell | Content) -> Cell:
    if isinstance(content, Cell):
        return content
    if isinstance(content, int | float) and not isinstance(content, bool):
        return Cell(number(content), content)
    if content is None:
        return Cell(DASH)
    return Cell(content, content if isinstance(content, str) and not isinstance(content, Html) else None)


def _order(value: float | str | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, str) else repr(float(value))


def _best(better: Better | None, orders: Sequence[float | str | None]) -> float | None:
    numbers = [order for order in orders if isinstance(order, int | float) and not math.isnan(order)]
    if better is None or len(numbers) < 2:
        return None
    return max(numbers) if better == "higher" else min(numbers)


def pairs(caption: str, items: Sequence[tuple[Content, Content]]) -> Html:
    """A table of names and values, as they come."""
    body = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in items]
    return _boxed("pairs", caption, element("tbody", body))


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as percent, without the sign."""
    return text.percent(share, digits, missing=DASH)


def share_cell(share: float | None) -> Cell:
    """A cell with a fraction as percent."""
    return Cell(percent(share), share)


def number(value: float | None) -> str:
    """A number with as many digits as one reads."""
    if value is None or not math.isfinite(value):
        return DASH if value is None or math.isnan(value) else str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{value:,.0f}"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def decimals(value: float) -> int:
    """How many decimals `number` shows of it."""
    return len(number(value).partition(".")[2])


def seconds(value: Any) -> str:
    """A duration in words."""
    return text.duration(value) if isinstance(value, int | float) else DASH

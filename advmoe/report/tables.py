"""Tables that a reader can sort by any column, and numbers as they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from advmoe.report.html import Content, Html, element, joined

DASH = "\N{EN DASH}"
Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, and the number or text by which its column is sorted."""

    content: Content
    order: float | str | None = None
    """None stands below everything else, whichever way the column is sorted."""
    shade: bool = False
    """Whether it is somebody else's number, shown more quietly."""


@dataclass(frozen=True)
class Column:
    """A column's title and how to read it."""

    title: str
    better: Better = None
    """Which end of the column is the good one; the best cell is printed in bold."""


def table(caption: Content, columns: Sequence[Column | str], rows: Sequence[Sequence[Cell | Content]]) -> Html:
    """A table; the first cell of a row names it. It scrolls within its own box where a page is narrow.

    Args:
        rows: a cell for each column; one that is not a `Cell` is sorted by what it shows.
    """
    heads = [column if isinstance(column, Column) else Column(column) for column in columns]
    lines = [[_as_cell(each) for each in row] for row in rows]
    best = [_best(column.better, [line[at].order for line in lines]) for at, column in enumerate(heads)]
    head = element("tr", [_head(column) for column in heads])
    body = [element("tr", [_cell(cell, at, best[at]) for at, cell in enumerate(line)]) for line in lines]
    inner = element("table", element("caption", caption), element("thead", head), element("tbody", body), class_="data")
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=_plain(caption))


def _head(column: Column) -> Html:
    arrow = {"higher": "\N{UPWARDS ARROW}", "lower": "\N{DOWNWARDS ARROW}", None: ""}[column.better]
    hint = []
    if column.better is not None:
        hint = [
            element("span", arrow, class_="hint", aria_hidden="true", title=f"{column.better} is better"),
            element("span", f" ({column.better} is better)", class_="unseen"),
        ]
    return element("th", element("button", column.title, hint, type="button"), scope="col", aria_sort="none")


def _cell(cell: Cell, at: int, best: float | None) -> Html:
    if at == 0:
        return element("th", cell.content, scope="row", data_order=_order(cell.order))
    numeric = isinstance(cell.order, float | int)
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


def _best(better: Better, orders: Sequence[float | str | None]) -> float | None:
    numbers = [order for order in orders if isinstance(order, int | float) and not math.isnan(order)]
    if better is None or len(numbers) < 2:
        return None
    return max(numbers) if better == "higher" else min(numbers)


def _plain(content: Content) -> str:
    import re

    return re.sub(r"<[^>]*>", "", joined(content))


def pairs(caption: Content, items: Sequence[tuple[Content, Content]]) -> Html:
    """A table of names and values, as they come."""
    body = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in items]
    inner = element("table", element("caption", caption), element("tbody", body), class_="pairs")
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=_plain(caption))


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as percent, without the sign."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


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
    if not isinstance(value, int | float):
        return DASH
    if value < 90:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"

"""Results as tables and figures: what the studies have in common in how they show what they found. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from advmoe.studies import paper
from advmoe.studies.results import (
    PGD,
    Found,
    Results,
    Trained,
    accuracy_under,
    cell,
    of_cost,
    of_evaluation,
    point,
    seconds_per_epoch,
)
from advmoe.studies.study import Figure
from advmoe.text import aligned

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Column:
    """A column of a table: a number of each run."""

    key: str
    title: str
    better: Better | None
    value: Callable[[Trained], float | None]
    factor: float = 1.0
    paper: str = ""
    """The number's name in the paper's tables."""


RA = Column("ra_pgd", "RA PGD %", "higher", accuracy_under(PGD), 100, "ra_pgd50")
WORST = Column("worst", "RA worst case %", "higher", of_evaluation("worst_case"), 100)
SA = Column("sa", "SA %", "higher", of_evaluation("clean_accuracy"), 100, "sa")
GMACS = Column("gmacs", "GMACs", "lower", of_cost("gmacs"), 1, "gmacs")
MS = Column("ms", "ms/image", "lower", of_cost("ms_per_image"))
SECONDS = Column("seconds", "s/epoch", "lower", seconds_per_epoch)

LABELS = {
    "dataset": "Data", "backbone": "Backbone", "method": "Method", "scale": "r", "experts": "N", "K": "K",
    "variant": "Variant",
}  # fmt: skip


def table(
    title: str, results: Results, labels: Sequence[str], columns: Sequence[Column], *, caption: str = "",
    paper_table: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One row for each of `results`: its labels, then a cell for each column."""
    rows = []
    for row in results:
        reported = _reported(paper_table, row)
        cells = {column.key: cell(row, column.value, column.factor, reported, column.paper) for column in columns}
        shown = {label: str(row.labels.get(label, "")) for label in labels}
        rows.append({**shown, **cells})
    heads: list[Mapping[str, Any]] = [{"key": label, "title": LABELS[label], "better": None} for label in labels]
    heads += [{"key": column.key, "title": column.title, "better": column.better} for column in columns]
    return {"title": title, "caption": caption, "columns": heads, "rows": rows}


def _reported(table: str, row: Found) -> dict[str, float]:
    names = (row.labels.get(name) for name in ("paper_dataset", "paper_backbone", "method"))
    return paper.numbers(table, *names) if table else {}


def lines(
    id: str, title: str, series: Mapping[str, Sequence[Mapping[str, Any]]], *, xlabel: str, ylabel: str, caption: str,
    references: Sequence[tuple[str, float]] = (),
) -> Figure:  # fmt: skip
    """A line for each series that has a point; what it shows in words too."""
    drawn = {name: list(points) for name, points in series.items() if any(each["y"] is not None for each in points)}
    told = []
    for name, points in drawn.items():
        known = [each for each in points if each["y"] is not None]
        first, last = known[0], known[-1]
        told.append(f"{name} {_number(first['y'])} at {_number(first['x'])}")
        if last is not first:
            told[-1] += f", {_number(last['y'])} at {_number(last['x'])}"
    told += [f"{name}: dashed line at {_number(height)}" for name, height in references]
    alt = f"{ylabel} against {xlabel}: {'; '.join(told) or 'nothing was measured'}."
    options = {"xlabel": xlabel, "ylabel": ylabel, "references": [list(each) for each in references]}
    return Figure(id=id, title=title, kind="lines", data=drawn, options=options, caption=caption, alt=alt)


def bars(
    id: str, title: str, groups: Mapping[str, Mapping[str, Mapping[str, Any]]], *, ylabel: str, caption: str
) -> Figure:
    """Bars side by side in groups."""
    drawn = {
        group: kept for group, each in groups.items() if (kept := {n: p for n, p in each.items() if p["y"] is not None})
    }
    told = []
    for group, each in drawn.items():
        heights = ", ".join(f"{name} {_number(bar['y'])}" for name, bar in each.items())
        told.append(f"{group}: {heights}")
    alt = f"Bars of {ylabel}. {'; '.join(told) or 'Nothing was measured'}."
    return Figure(id=id, title=title, kind="bars", data=drawn, options={"ylabel": ylabel}, caption=caption, alt=alt)


def stacked(id: str, title: str, rows: Mapping[str, Mapping[str, float]], *, xlabel: str, caption: str) -> Figure:
    """A bar for each row, made of its parts."""
    told = [
        f"{row}: {', '.join(f'{part} {100 * share:.1f} %' for part, share in parts.items())}"
        for row, parts in rows.items()
    ]
    alt = f"{xlabel}. {'; '.join(told) or 'Nothing was measured'}."
    return Figure(id=id, title=title, kind="stacked", data=rows, options={"xlabel": xlabel}, caption=caption, alt=alt)


def histogram(id: str, title: str, series: Mapping[str, Mapping[str, Sequence[float]]], *, caption: str) -> Figure:
    """Distributions of an IoU, over one another."""
    told = []
    for name, each in series.items():
        middles = [(low + high) / 2 for low, high in pairwise(each["edges"])]
        mean = sum(middle * share for middle, share in zip(middles, each["shares"], strict=True))
        told.append(f"{name}: mean {_number(mean)}")
    options = {"xlabel": "IoU", "ylabel": "share of images (%)", "bins": 50}
    alt = f"Distributions of the IoU. {'; '.join(told)}."
    return Figure(id=id, title=title, kind="histogram", data=series, options=options, caption=caption, alt=alt)


def by_method(
    results: Results, x: str, value: Callable[[Trained], float | None], *, series: str = "method", factor: float = 100.0
) -> dict[str, list[dict[str, Any]]]:
    """A series for each value of a label, its points by another label, a number."""
    found = {}
    for name in results.distinct(series):
        rows = [row for row in results.select(**{series: name}) if x in row.labels]
        points = sorted((point(row, value, float(row.labels[x]), factor) for row in rows), key=lambda each: each["x"])
        if points:
            found[str(name)] = points
    return found


def mean_series(
    rows: Iterable[Found], of: Callable[[Trained], Sequence[float | None]], factor: float = 1.0
) -> list[dict[str, Any]]:
    """The mean over seeds of something that each run has for every epoch, from 1."""
    runs = [of(run) for row in rows for run in row.by_seed.values()]
    points = []
    for epoch in range(max((len(each) for each in runs), default=0)):
        values = [factor * v for each in runs if epoch < len(each) and (v := each[epoch]) is not None]
        spread = bool(values) and len(values) > 1
        points.append({
            "x": epoch + 1, "y": sum(values) / len(values) if values else None,
            "low": min(values) if spread else None, "high": max(values) if spread else None,
        })  # fmt: skip
    return points


def _number(value: float) -> str:
    return f"{value:.4g}"


def draw(figure: Figure, path: Path) -> None:
    """Draw a figure as .svg or .png. Raises `ValueError` without matplotlib, or with nothing to draw."""
    from advmoe.report import figures

    getattr(figures, f"{figure.kind}_figure")(figure.data, path, **figure.options)


def text(shown: Mapping[str, Any]) -> str:
    """A table of `study.json` as aligned lines for a terminal, with the paper's numbers in brackets."""
    heads = [column["title"] for column in shown["columns"]]
    body = [[_shown(row.get(column["key"])) for column in shown["columns"]] for row in shown["rows"]]
    return "\n".join([shown["title"], *aligned([heads, *body])])


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        words = "-" if value["mean"] is None else _number(value["mean"])
        if value.get("std") is not None:
            words += f" ± {value['std']:.2g}"
        return words if value.get("paper") is None else f"{words} [{_number(value['paper'])}]"
    return _number(value) if isinstance(value, float) else str(value)

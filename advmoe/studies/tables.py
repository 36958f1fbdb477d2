"""Results as tables and figures: what all studies show alike. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.report.tables import Better
from advmoe.studies import paper
from advmoe.studies.labels import title_of
from advmoe.studies.results import (
    PGD,
    Results,
    RowResults,
    RunNumber,
    RunResults,
    accuracy_under,
    best_validation,
    cell,
    of_cost,
    of_evaluation,
    point,
    seconds_per_epoch,
)
from advmoe.text import WIDTH, aligned, macs_column, tabular, wrapped


@dataclass(frozen=True)
class Quantity:
    """A number of each run, and how a table shows it: a column with mean and standard deviation over seeds."""

    key: str
    title: str
    better: Better | None
    value: RunNumber
    factor: float = 1.0
    paper: str = ""
    """The number's name in the paper's tables."""


RA = Quantity("ra_pgd", "RA PGD %", "higher", accuracy_under(PGD), 100, "ra_pgd50")
WORST = Quantity("worst", "RA worst case %", "higher", of_evaluation("worst_case"), 100)
SA = Quantity("sa", "SA %", "higher", of_evaluation("clean_accuracy"), 100, "sa")
GMACS = Quantity("gmacs", "GMACs", "lower", of_cost("gmacs"), 1, "gmacs")
MS = Quantity("ms", "ms/image", "lower", of_cost("ms_per_image"))
GAP = Quantity("gap", "masking gap (points)", "lower", of_evaluation("masking_gap"), 100)
VALIDATED = Quantity("val", "validation RA (worst of two) %", "higher", best_validation, 100)
"""Of plain models under the one attack."""
SECONDS = Quantity("seconds", "s/epoch", "lower", seconds_per_epoch)


def table(
    title: str, results: Results, labels: Sequence[str], quantities: Sequence[Quantity], *, caption: str = "",
    paper_table: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One row for each of `results`: its labels, then a cell for each of `quantities`."""
    rows = []
    for row in results:
        reported = _reported(paper_table, row)
        cells = {each.key: cell(row, each.value, each.factor, reported, each.paper) for each in quantities}
        shown = {label: str(row.labels.get(label, "")) for label in labels}
        rows.append({**shown, **cells})
    heads: list[Mapping[str, Any]] = [{"key": label, "title": title_of(label), "better": None} for label in labels]
    heads += [{"key": each.key, "title": each.title, "better": each.better} for each in quantities]
    return {"title": title, "caption": caption, "columns": heads, "rows": rows}


def _reported(table: str, row: RowResults) -> dict[str, float]:
    names = (row.labels.get(name) for name in ("paper_dataset", "paper_backbone", "method"))
    return paper.numbers(table, *names) if table else {}


def with_points(series: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    """The series of lines that have a point."""
    return {name: list(points) for name, points in series.items() if any(each["y"] is not None for each in points)}


def with_heights(groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The bars that were measured, and the groups that have one."""
    measured = {
        group: {name: bar for name, bar in bars.items() if bar["y"] is not None} for group, bars in groups.items()
    }
    return {group: bars for group, bars in measured.items() if bars}


def by_method(
    results: Results,
    x: str,
    value: RunNumber,
    *,
    series: str = "method",
    factor: float = 100.0,
) -> dict[str, list[dict[str, Any]]]:
    """A line for each value of the label `series`; its points lie at the numbers of the label `x`."""
    lines = {}
    for name in results.distinct(series):
        rows = [row for row in results.select(**{series: name}) if x in row.labels]
        points = sorted((point(row, value, float(row.labels[x]), factor) for row in rows), key=lambda each: each["x"])
        if points:
            lines[str(name)] = points
    return lines


def mean_series(
    rows: Iterable[RowResults], of: Callable[[RunResults], Sequence[float | None]], factor: float = 1.0
) -> list[dict[str, Any]]:
    """A line over epochs, from 1, of what each run has for every epoch: the mean over runs, and their range."""
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


def text(shown: Mapping[str, Any]) -> str:
    """A table of `study.json` as aligned lines for a terminal, with the paper's numbers in brackets.

    Where it is wide, what all rows are of stands above it.
    """
    columns, rows = macs_column(shown["columns"], shown["rows"])
    heads, body = _cells(columns, rows)
    lines = [shown["title"]]
    if len(rows) > 1 and max(map(len, aligned([heads, *body]))) > WIDTH:
        alike = [column for column in columns if len({str(row.get(column["key"])) for row in rows}) == 1]
        if common := [f"{each['title']}: {rows[0][each['key']]}" for each in alike if _label(each, rows)]:
            lines += wrapped(", ".join(common))
            columns = [column for column in columns if column not in alike or not _label(column, rows)]
            heads, body = _cells(columns, rows)
    labels = next((at for at, column in enumerate(columns) if not _label(column, rows)), len(columns))
    return "\n".join([*lines, *tabular(heads, body, labels=labels)])


def _cells(
    columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    heads = [column["title"] for column in columns]
    return heads, [[_shown(row.get(column["key"])) for column in columns] for row in rows]


def _label(column: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column says what its rows are of: in words."""
    return all(isinstance(row.get(column["key"]), str) for row in rows)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        words = "-" if value["mean"] is None else _number(value["mean"])
        if value.get("std") is not None:
            words += f" ± {value['std']:.2g}"
        return words if value.get("paper") is None else f"{words} [{_number(value['paper'])}]"
    return _number(value) if isinstance(value, float) else str(value)

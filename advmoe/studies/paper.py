"""The paper's numbers, as shipped in `paper.json` with their source."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def reported() -> dict[str, Any]:
    """All of `paper.json`: `source`, `rows` of tables 1 to 3, `figures`. Percent, and GMACs."""
    content: dict[str, Any] = json.loads((files(__package__) / "paper.json").read_text(encoding="utf-8"))
    return content


def numbers(table: str, dataset: str | None, backbone: str | None, method: str | None) -> dict[str, float]:
    """One row of a table of the paper, empty where there is none; of table 2 with table 1's SA and RA."""
    cells: dict[str, float] = {}
    for source in ("table1", "table2") if table == "table2" else (table,):
        for row in reported()["rows"]:
            cited = row["method"].partition(", ref.")[0]  # table 3's AT (MoE) is another paper's
            if (row["table"], row["dataset"], row["backbone"], cited) == (source, dataset, backbone, method):
                cells |= {name: value for name, value in row.items() if isinstance(value, int | float)}
    return cells


def figure(number: int) -> dict[str, Any]:
    """The numbers of a figure that the text states (percent); empty where there are none."""
    percentages: dict[str, Any] = reported()["figures"].get(f"figure{number}", {})
    return percentages

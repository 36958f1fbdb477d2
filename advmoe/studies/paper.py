"""The paper's numbers, as shipped in `paper.json` with their source."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def reported() -> dict[str, Any]:
    """All of `paper.json`: `source`, `rows` of tables 1 to 3, `figures`. Percent, and GMACs."""
    found: dict[str, Any] = json.loads((files(__package__) / "paper.json").read_text(encoding="utf-8"))
    return found


def numbers(table: str, dataset: str | None, backbone: str | None, method: str | None) -> dict[str, float]:
    """What a table of the paper reports of one row, empty where there is none; of table 2, table 1's SA and RA too."""
    found: dict[str, float] = {}
    for source in ("table1", "table2") if table == "table2" else (table,):
        for row in reported()["rows"]:
            cited = row["method"].partition(", ref.")[0]  # table 3's AT (MoE) is another paper's
            if (row["table"], row["dataset"], row["backbone"], cited) == (source, dataset, backbone, method):
                found |= {name: value for name, value in row.items() if isinstance(value, int | float)}
    return found


def figure(number: int) -> dict[str, Any]:
    """What the text says about a figure (percent), empty where it says nothing."""
    found: dict[str, Any] = reported()["figures"].get(f"figure{number}", {})
    return found

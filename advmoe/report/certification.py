"""The part of the page on proved routing: within which radii a run keeps its choices of experts.

Results hold fractions; the page shows percent.
"""

from __future__ import annotations

from typing import Any

from advmoe.report.album import Album
from advmoe.report.html import Content, element
from advmoe.report.pictures import Picture
from advmoe.report.results import RunFolder
from advmoe.report.tables import Cell, number, percent, share_cell, table
from advmoe.text import by_layer, radius

_METHODS = {
    "exact": "Choices are sides of hyperplanes in pixel space: radii are exact.",
    "bounds": "Proved by interval bounds, changed by an attack on the choices.",
    "attack": "No bounds are known of {unbounded}: what no attack changes is unknown.",
}


def certification(run: RunFolder, album: Album) -> Content:
    """What is proved, changed and unknown at each radius, and where radii are exact how they are distributed."""
    result = run.certification
    if not result:
        return None
    norm = str(result["threat"]["norm"])
    shares = {
        radius(each["eps"], norm): {part: each[part] for part in ("proved", "unknown", "changed")}
        for each in result["points"]
    }
    rows: list[list[Cell | Content]] = [
        [
            radius(each["eps"], norm), share_cell(each["proved"]), " to ".join(map(percent, each["interval"])),
            share_cell(each["unknown"]), share_cell(each["changed"]), _within(each.get("pathways") or {}),
            by_layer(each.get("layers") or ()) or None,
        ]
        for each in result["points"]
    ]  # fmt: skip
    caption = f"Choices of {run.label} on {result['num_examples']} test images, percent of them, {norm}."
    columns = [
        "eps", "Proved", "95 % interval", "Unknown", "Changed", "Images by pathways within reach", "Proved in layer",
    ]  # fmt: skip
    picture = Picture(
        "stacked", "certification", "Choices of experts within a radius", shares, {"xlabel": "images (%)"}
    )
    smallest = [
        f"{name}: " + ", ".join(f"{q} {'none' if value is None else number(value)}" for q, value in each.items())
        for name, each in (result.get("quantiles") or {}).items()
    ]
    used = result.get("pathways_in_use")
    return [
        element("p", _method(result)),
        None if used is None else element("p", f"Pathways in use: {used}."),
        element("div", album.draw(picture, run.label), class_="figures"),
        table(caption, columns, rows),
        element("p", f"Smallest perturbation that changes a choice, by percentile; {'; '.join(smallest)}.")
        if smallest
        else None,
    ]


def _method(result: dict[str, Any]) -> str:
    text = _METHODS.get(str(result.get("method")), "")
    return text.replace("{unbounded}", str(result.get("unbounded", "routers that see features")))


def _within(pathways: dict[str, float]) -> str | None:
    return ", ".join(f"{count}: {percent(share)}" for count, share in pathways.items()) or None

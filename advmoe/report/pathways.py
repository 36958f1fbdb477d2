"""Pictures and tables of `pathways.json`: for the page, and for the command that writes it.

Axes: `L` MoE layers, `E` experts, `K` classes. Results hold fractions; tables show percent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe.report.album import Album
from advmoe.report.drawing import require_fields
from advmoe.report.flow import FEW, THIN
from advmoe.report.html import Content, element
from advmoe.report.pictures import Picture
from advmoe.report.results import RunFolder
from advmoe.report.tables import Cell, number, percent, table
from advmoe.rundir import PATHWAYS

Found = Mapping[str, Any]

KINDS = ("clean", "adversarial")
_BINS = 40
_SHOWN_CLASSES = 3


def draw_pictures(found: Found, folder: Path) -> list[Path]:
    """Draw each picture of `pathways.json` into `folder` as `pathways-NAME.svg`. Raises `ValueError` as figures do."""
    paths = []
    for picture in pictures(found):
        path = folder / f"pathways-{picture.name}.svg"
        picture.draw(path, title=picture.title)
        paths.append(path)
    return paths


def pathways(run: RunFolder, album: Album) -> Content:
    """How many pathways there are, who takes which, and what they share; None without `pathways.json`."""
    found = run.pathways
    if not found:
        return None
    drawn: dict[bool, list[Content]] = {True: [], False: []}
    for each in pictures(found):
        drawn[each.wide].append(album.draw(each, f"{run.label}-pathways"))
    name, kept = found["attack"].get("name", "The attack"), percent(found["attack"]["unchanged"])
    said = f"{name} leaves the pathways of {kept} % of {found['num_examples']} test images as they are."
    return [
        element("p", said),
        _numbers(run, found),
        _frequent(run, found),
        _against(run, found),
        element("div", drawn[True], class_="figures wide"),
        element("div", drawn[False], class_="figures"),
    ]


# Pictures


def pictures(found: Found) -> Iterator[Picture]:
    """What `pathways.json` shows. Raises `ValueError` for something else."""
    require_fields(found, ("num_experts", "clean", "adversarial", "attack", "against"), PATHWAYS)
    names = _class_names(found)
    if found["clean"]["flows"]:
        yield _flow(found)
    for kind in KINDS:
        yield _by_class(found, kind, names)
    for kind in KINDS:
        yield _between(found, kind, names)
    series = {"clean to adversarial": found["attack"]["iou"]["histogram"]}
    yield _overlap(
        "attack", series, "IoU of each image's two pathways", "1 is a pathway that the attack left as it is."
    )
    if found["against"] is not None:
        shown = [name for name in (*KINDS, "random_pathways", "random_masks") if name in found["against"]]
        series = {name.replace("_", " "): found["against"][name]["histogram"] for name in shown}
        what, caption = _compared_with(found["against"])
        yield _overlap("against", series, f"IoU with {what}", caption)


def _flow(found: Found) -> Picture:
    panels = {kind: {name: found[kind][name] for name in ("load", "flows")} for kind in KINDS}
    grey = f", and of flows under {100 * THIN:.0f} % in grey where there are more than {FEW}"
    caption = (
        f"A column is a layer, a node an expert, as high as its share of the {_unit(found)}; bands have the colour of "
        f"the expert that they leave{grey if found['num_experts'] > 2 else ''}."
    )
    return Picture("flow", "flow", f"Flow of {_unit(found)} through the experts", panels, caption=caption, wide=True)


def _unit(found: Found) -> str:
    return "tokens" if found.get("tokens") else "images"


def _by_class(found: Found, kind: str, names: Sequence[str]) -> Picture:
    experts, layers = found["num_experts"], [str(layer) for layer in range(len(found[kind]["load"]))]
    unknown = [[None] * experts] * len(layers)
    values = [[share for layer in shares or unknown for share in layer] for shares in found[kind]["class_shares"]]
    members = [f"expert {expert}" for expert in range(experts)]
    return Picture(
        "heatmap", f"classes-{kind}", f"Experts by class, {kind} images",
        {"rows": names, "columns": layers, "members": members, "values": values},
        {"xlabel": "MoE layer", "ylabel": "class"},
        f"Share of a class's {_unit(found)} that a layer sends to an expert; in each layer, experts 0 to {experts - 1} "
        "from left to right.",
        wide=experts * len(layers) > 20,
    )  # fmt: skip


def _between(found: Found, kind: str, names: Sequence[str]) -> Picture:
    within, between = (number(found[kind][f"iou_{which}_classes"]) for which in ("within", "between"))
    return Picture(
        "heatmap", f"class-iou-{kind}", f"IoU of pathways by class, {kind} images",
        {"rows": names, "columns": names, "values": found[kind]["class_iou"]},
        {"xlabel": "class", "ylabel": "class", "spread": True},
        f"Mean over all pairs of two images; {within} within a class, {between} between classes.",
    )  # fmt: skip


def _overlap(name: str, series: Mapping[str, Any], title: str, caption: str) -> Picture:
    return Picture(
        "histogram", f"iou-{name}", title, series, {"xlabel": "IoU", "ylabel": "images (%)", "bins": _BINS}, caption
    )


def _compared_with(against: Found) -> tuple[str, str]:
    """What the pathways are compared with, and how to read the picture of it."""
    if against["kind"] == "mask":
        random = "random choices of experts, and random masks of the same size, as they would be by chance"
        return f"the static mask of {against.get('run', 'a sparse model')}", f"Beside it {random}."
    others = [f"{number(value)} ({kind})" for kind, value in against["other_images"].items()]
    caption = f"Beside it random choices of experts. The mean over pairs of different images is {' and '.join(others)}."
    return f"the pathways of {against.get('run', 'another model')}", caption


def _class_names(found: Found) -> list[str]:
    return [str(name) for name in found.get("classes") or range(found["num_classes"])]


# Tables


def _numbers(run: RunFolder, found: Found) -> Content:
    rows: list[list[Cell | Content]] = [
        [
            kind, found[kind]["distinct"], found[kind]["entropy"], found[kind]["max_entropy"],
            found[kind]["iou_within_classes"], found[kind]["iou_between_classes"],
        ]
        for kind in KINDS
    ]  # fmt: skip
    columns = [
        "Images", "Distinct pathways", "Their entropy, bits", "At most, bits", "IoU within a class",
        "IoU between classes",
    ]  # fmt: skip
    return table(f"Pathways of {run.label}, {found['num_examples']} test images", columns, rows)


def _frequent(run: RunFolder, found: Found) -> Content:
    names = _class_names(found)
    rows: list[list[Cell | Content]] = []
    for each in found["clean"]["frequent"]:
        path = ("" if found["num_experts"] <= 10 else ".").join(map(str, each["pathway"]))
        classes = [f"{names[one['class']]}: {percent(one['share'], 0)} %" for one in each["classes"][:_SHOWN_CLASSES]]
        more = f" and {extra} more" if (extra := len(each["classes"]) - _SHOWN_CLASSES) > 0 else ""
        rows.append([element("code", path), Cell(percent(each["share"]), each["share"]), f"{', '.join(classes)}{more}"])
    columns = ["Experts, by layer", "Clean images, %", "Classes of these images"]
    return table(f"Most frequent pathways of {run.label}", columns, rows) if rows else None


def _against(run: RunFolder, found: Found) -> Content:
    against = found["against"]
    if against is None:
        return None
    shown = [name for name in (*KINDS, "random_pathways", "random_masks") if name in against]
    rows: list[list[Cell | Content]] = [
        [
            name.replace("_", " "),
            *(Cell(f"{value:.3f}", value) for value in (each["mean"], each["std"], *each["quantiles"].values())),
        ]
        for name, each in ((name, against[name]) for name in shown)
    ]
    columns = ["Pathways", "Mean", "Standard deviation", "5 %", "25 %", "Median", "75 %", "95 %"]
    return table(f"IoU with {_compared_with(against)[0]}", columns, rows)

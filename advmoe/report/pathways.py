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

PathwaysResult = Mapping[str, Any]
"""The content of `pathways.json`."""

KINDS = ("clean", "adversarial")
_BINS = 40
_SHOWN_CLASSES = 3


def draw_pictures(result: PathwaysResult, folder: Path) -> list[Path]:
    """Draw each picture of `pathways.json` into `folder` as `pathways-NAME.svg`. Raises `ValueError` as figures do."""
    paths = []
    for picture in pictures(result):
        path = folder / f"pathways-{picture.name}.svg"
        picture.draw(path, title=picture.title)
        paths.append(path)
    return paths


def pathways(run: RunFolder, album: Album) -> Content:
    """How many pathways there are, which classes take which, and what they share; None without `pathways.json`."""
    result = run.pathways
    if not result:
        return None
    drawn: dict[bool, list[Content]] = {True: [], False: []}
    for each in pictures(result):
        drawn[each.wide].append(album.draw(each, f"{run.label}-pathways"))
    attack, unchanged = result["attack"].get("name", "The attack"), percent(result["attack"]["unchanged"])
    sentence = f"{attack} leaves the pathways of {unchanged} % of {result['num_examples']} test images as they are."
    return [
        element("p", sentence),
        _numbers(run, result),
        _frequent(run, result),
        _against(run, result),
        element("div", drawn[True], class_="figures wide"),
        element("div", drawn[False], class_="figures"),
    ]


# Pictures


def pictures(result: PathwaysResult) -> Iterator[Picture]:
    """What `pathways.json` shows. Raises `ValueError` for something else."""
    require_fields(result, ("num_experts", "clean", "adversarial", "attack", "against"), PATHWAYS)
    names = _class_names(result)
    if result["clean"]["flows"]:
        yield _flow(result)
    for kind in KINDS:
        yield _by_class(result, kind, names)
    for kind in KINDS:
        yield _between(result, kind, names)
    series = {"clean to adversarial": result["attack"]["iou"]["histogram"]}
    yield _overlap(
        "attack", series, "IoU of each image's two pathways", "1 is a pathway that the attack left as it is."
    )
    if result["against"] is not None:
        shown = [name for name in (*KINDS, "random_pathways", "random_masks") if name in result["against"]]
        series = {name.replace("_", " "): result["against"][name]["histogram"] for name in shown}
        what, caption = _compared_with(result["against"])
        yield _overlap("against", series, f"IoU with {what}", caption)


def _flow(result: PathwaysResult) -> Picture:
    panels = {kind: {name: result[kind][name] for name in ("load", "flows")} for kind in KINDS}
    grey = f", and of flows under {100 * THIN:.0f} % in grey where there are more than {FEW}"
    caption = (
        f"A column is a layer, a node an expert, as high as its share of the {_unit(result)}; bands have the colour of "
        f"the expert that they leave{grey if result['num_experts'] > 2 else ''}."
    )
    return Picture("flow", "flow", f"Flow of {_unit(result)} through the experts", panels, caption=caption, wide=True)


def _unit(result: PathwaysResult) -> str:
    return "tokens" if result.get("tokens") else "images"


def _by_class(result: PathwaysResult, kind: str, names: Sequence[str]) -> Picture:
    experts, layers = result["num_experts"], [str(layer) for layer in range(len(result[kind]["load"]))]
    unknown = [[None] * experts] * len(layers)
    values = [[share for layer in shares or unknown for share in layer] for shares in result[kind]["class_shares"]]
    members = [f"expert {expert}" for expert in range(experts)]
    return Picture(
        "heatmap", f"classes-{kind}", f"Experts by class, {kind} images",
        {"rows": names, "columns": layers, "members": members, "values": values},
        {"xlabel": "MoE layer", "ylabel": "class"},
        f"Share of a class's {_unit(result)} that a layer sends to an expert; in each layer, experts 0 to "
        f"{experts - 1} from left to right.",
        wide=experts * len(layers) > 20,
    )  # fmt: skip


def _between(result: PathwaysResult, kind: str, names: Sequence[str]) -> Picture:
    within, between = (number(result[kind][f"iou_{which}_classes"]) for which in ("within", "between"))
    return Picture(
        "heatmap", f"class-iou-{kind}", f"IoU of pathways by class, {kind} images",
        {"rows": names, "columns": names, "values": result[kind]["class_iou"]},
        {"xlabel": "class", "ylabel": "class", "spread": True},
        f"Mean over all pairs of two images; {within} within a class, {between} between classes.",
    )  # fmt: skip


def _overlap(name: str, series: Mapping[str, Any], title: str, caption: str) -> Picture:
    return Picture(
        "histogram", f"iou-{name}", title, series, {"xlabel": "IoU", "ylabel": "images (%)", "bins": _BINS}, caption
    )


def _compared_with(against: Mapping[str, Any]) -> tuple[str, str]:
    """What the pathways are compared with, and how to read the picture of it."""
    if against["kind"] == "mask":
        random = "random choices of experts, and random masks of the same size, as they would be by chance"
        return f"the static mask of {against.get('run', 'a sparse model')}", f"Beside it {random}."
    others = [f"{number(value)} ({kind})" for kind, value in against["other_images"].items()]
    caption = f"Beside it random choices of experts. The mean over pairs of different images is {' and '.join(others)}."
    return f"the pathways of {against.get('run', 'another model')}", caption


def _class_names(result: PathwaysResult) -> list[str]:
    return [str(name) for name in result.get("classes") or range(result["num_classes"])]


# Tables


def _numbers(run: RunFolder, result: PathwaysResult) -> Content:
    rows: list[list[Cell | Content]] = [
        [
            kind, result[kind]["distinct"], result[kind]["entropy"], result[kind]["max_entropy"],
            result[kind]["iou_within_classes"], result[kind]["iou_between_classes"],
        ]
        for kind in KINDS
    ]  # fmt: skip
    columns = [
        "Images", "Distinct pathways", "Their entropy, bits", "At most, bits", "IoU within a class",
        "IoU between classes",
    ]  # fmt: skip
    return table(f"Pathways of {run.label}, {result['num_examples']} test images", columns, rows)


def _frequent(run: RunFolder, result: PathwaysResult) -> Content:
    names = _class_names(result)
    rows: list[list[Cell | Content]] = []
    for each in result["clean"]["frequent"]:
        path = ("" if result["num_experts"] <= 10 else ".").join(map(str, each["pathway"]))
        classes = [f"{names[one['class']]}: {percent(one['share'], 0)} %" for one in each["classes"][:_SHOWN_CLASSES]]
        more = f" and {extra} more" if (extra := len(each["classes"]) - _SHOWN_CLASSES) > 0 else ""
        rows.append([element("code", path), Cell(percent(each["share"]), each["share"]), f"{', '.join(classes)}{more}"])
    columns = ["Experts, by layer", "Clean images, %", "Classes of these images"]
    return table(f"Most frequent pathways of {run.label}", columns, rows) if rows else None


def _against(run: RunFolder, result: PathwaysResult) -> Content:
    against = result["against"]
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

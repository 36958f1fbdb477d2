"""The part of the page that is about one run.

Axes: `L` MoE layers, `E` experts. Results hold fractions; the page shows percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from advmoe.report import words
from advmoe.report.album import Album
from advmoe.report.certification import certification
from advmoe.report.gallery import gallery
from advmoe.report.html import Content, Html, element
from advmoe.report.pathways import pathways
from advmoe.report.pictures import Picture
from advmoe.report.results import RunFolder
from advmoe.report.sections import Section, Subsection, section
from advmoe.report.tables import DASH, Cell, Column, number, pairs, percent, seconds, share_cell, table
from advmoe.text import complete, few, macs, passes

_LOSSES = {
    "ce": "cross-entropy", "kl": "beta x KL(clean || adversarial)",
    "clean_kl": "KL(teacher || clean)", "adv_kl": "KL(teacher || adversarial)",
}  # fmt: skip
"""Terms of the loss, which are logged as they are added up, with their weights."""


def run_section(run: RunFolder, album: Album, number_: int, *, alone: bool) -> Section:
    """Everything known about one run. `alone`: the summary has introduced it already."""
    ident = f"run-{number_}"
    intro = None if alone else introduction(run, ident)
    parts = [
        Subsection("accuracy", "Robust accuracy", accuracy(run)),
        Subsection("training", "Training", training(run, album)),
        Subsection("sweep", "Robustness against the attack's strength", sweep(run, album)),
        Subsection("dissection", "The attack, dissected", dissection(run, album)),
        Subsection("pathways", "Pathways", pathways(run, album)),
        Subsection("certification", "Proved routing", certification(run, album)),
        Subsection("gallery", "Gallery", None if run.gallery is None else gallery(run.gallery)),
        Subsection("made", "Commands and configuration", commands(run)),
    ]
    return section(ident, run.label, intro, parts=parts)


def introduction(run: RunFolder, ident: str) -> Content:
    """The run in a sentence, its main numbers, and which results are missing. `ident`: its section's identifier."""
    absent = [each.title for each in run.result_states() if each.state != "there"]
    notes: list[Content] = []
    if absent:
        link = element("a", "commands that make them", href=f"#{ident}-made")
        notes.append(element("p", f"Missing or unfinished: {', '.join(absent)}. See the ", link, "."))
    notes += [element("p", f"{each}.") for each in run.notes]
    if isinstance(left_out := run.manifest.get("data_notes"), list) and left_out:
        files = [element("li", str(each)) for each in left_out]
        notes.append([element("p", "Files that were not used:"), element("ul", files)])
    if run.gallery is None and run.no_gallery:
        notes.append(element("p", f"No gallery could be made: {run.no_gallery}"))
    return [
        element("p", f"{run.method}: {run.model}, on {_data(run)}{_classes(run)}.", class_="lead"),
        tiles(run),
        element("div", notes, class_="note") if notes else None,
    ]


def _data(run: RunFolder) -> str:
    name, root = run.field("data", "name"), run.field("data", "root")
    return f"{name} ({root})" if name == "folder" else str(name)


def _classes(run: RunFolder) -> str:
    names = few(run.classes, 10)
    return f", {len(run.classes)} classes: {names}" if names else ""


def tiles(run: RunFolder) -> Html | None:
    """The main numbers of an evaluation as tiles; None without one."""
    evaluation = run.evaluation
    if not evaluation:
        return None
    cost, reports = evaluation.get("cost") or {}, evaluation.get("attacks") or {}
    items = [("Clean accuracy (SA)", f"{percent(evaluation.get('clean_accuracy'))} %", "")]
    for name, share in list((evaluation.get("robust_accuracy") or {}).items())[:3]:
        low, high = (reports.get(name) or {}).get("interval") or (None, None)
        note = "" if low is None else f"95 % interval {percent(low)} to {percent(high)}"
        items.append((f"Robust, {name}", f"{percent(share)} %", note))
    items.append(("Robust, worst case", f"{percent(evaluation.get('worst_case'))} %", "over all attacks at once"))
    if "gmacs" in cost:
        of = "selected pathway, routers included" if run.routed else ""
        items.append(("Cost of one image", macs(cost["gmacs"]), of))
    if "ms_per_image" in cost:
        where = f"{cost.get('device')}, batch {cost.get('batch')}, {cost.get('threads')} threads"
        where += f", {cost['precision']}" if "precision" in cost else ""
        items.append(("Time of one image", f"{number(cost['ms_per_image'])} ms", where))
    entries = [
        element("div", element("dt", name), element("dd", value, element("small", note) if note else None))
        for name, value, note in items
    ]
    return element("dl", entries, class_="tiles")


def accuracy(run: RunFolder) -> Content:
    """A row for each attack, what its parts broke, and what was warned of."""
    evaluation = run.evaluation
    if not evaluation:
        return None
    reports = evaluation.get("attacks") or {}
    rows: list[list[Cell | Content]] = [["none (clean)", share_cell(evaluation["clean_accuracy"]), None, None, None]]
    for name, share in (evaluation.get("robust_accuracy") or {}).items():
        report = reports.get(name) or {}
        low, high = report.get("interval") or (None, None)
        parts = list((report.get("parts") or {}).values())
        broken, tried = sum(part["broken"] for part in parts), max((part["attempted"] for part in parts), default=0)
        rows.append([
            name, share_cell(share), Cell(DASH if low is None else f"{percent(low)} to {percent(high)}", low),
            Cell(f"{broken} of {tried}", broken) if parts else None,
            Cell(seconds(report.get("seconds")), report.get("seconds")),
        ])  # fmt: skip
    rows.append(["worst case", share_cell(evaluation.get("worst_case")), None, None, None])
    threat = words.of_threat(evaluation.get("threat") or {})
    caption = f"{run.label} on {evaluation.get('num_examples')} test images, {threat}."
    columns = ["Attack", "Accuracy, %", "95 % interval", "Broken of attacked", "Time"]
    gap = evaluation.get("masking_gap")
    masking = f"Masking gap, straight-through PGD less the worst case: {percent(gap)} percentage points. "
    masking += f"{passes(evaluation)} {complete(evaluation)}"
    return [
        table(caption, columns, rows),
        None if gap is None else element("p", masking.rstrip()),
        _parts(run.label, reports),
        _warnings(reports, evaluation.get("checks") or ()),
    ]


def _parts(label: str, reports: Mapping[str, Any]) -> Content:
    """Of attacks that have several parts: what each broke. A part attacks the images that the ones before it left."""
    rows: list[list[Cell | Content]] = [
        [part, attack, each["attempted"], each["broken"]]
        for attack, report in reports.items()
        if len(parts := report.get("parts") or {}) > 1
        for part, each in parts.items()
    ]
    if not rows:
        return None
    listing = table(f"Parts of the attacks on {label}.", ["Part", "Attack", "Images attacked", "Broken"], rows)
    return element("details", element("summary", "What each part of the attacks broke"), listing)


def _warnings(reports: Mapping[str, Any], checks: Iterable[Mapping[str, Any]]) -> Content:
    warnings = [f"{name}: {flag}" for name, report in reports.items() for flag in report.get("flags") or ()]
    warnings += [f"{name} was skipped: {report['skipped']}" for name, report in reports.items() if "skipped" in report]
    warnings += [f"check {check['name']} failed: {check['detail']}" for check in checks if not check["passed"]]
    if not warnings:
        return None
    title = element("p", element("b", "Warnings"))
    return element("div", title, element("ul", [element("li", each) for each in warnings]), class_="note")


def training(run: RunFolder, album: Album) -> Content:
    """Losses and accuracies by epoch, and in MoE layers the experts' load."""
    if not run.epochs:
        return None
    figures = [_losses(run, album), _validation(run, album), _busiest(run, album)]
    rate = [each["images_per_second"] for each in run.epochs if each.get("images_per_second")]
    spent = sum(each.get("seconds") or 0 for each in run.epochs)
    about = f"{len(run.epochs)} epochs in {seconds(spent)}"
    about += f", {number(sum(rate) / len(rate))} images/s on average." if rate else "."
    dead = sorted({each["layer"] for each in run.epochs[-1].get("layers") or () if each.get("dead_experts")})
    if dead:
        about += f" In the last epoch some expert was chosen for no image in layers {', '.join(map(str, dead))}."
    return [element("p", about), element("div", figures, class_="figures")]


def _losses(run: RunFolder, album: Album) -> Content:
    series: dict[str, list[dict[str, Any]]] = {}
    for at, each in enumerate(run.epochs, start=1):
        for level, losses in (each.get("train") or {}).items():
            for name, value in (losses or {}).items():
                if name != "accuracy" and value is not None:
                    shown = _LOSSES.get(name, name.replace("_", " "))
                    shown = shown if level == "all" else f"{level}: {shown}"
                    series.setdefault(shown, []).append({"x": at, "y": value})
    if not series:
        return None
    labels = {"xlabel": "epoch", "ylabel": "loss term, as weighted (nats)"}
    return album.draw(Picture("lines", "losses", "Training losses", series, labels), run.label)


def _validation(run: RunFolder, album: Album) -> Content:
    names = {"clean_accuracy": "clean", "robust_accuracy": "robust"}
    series: dict[str, list[dict[str, Any]]] = {}
    for at, each in enumerate(run.epochs, start=1):
        for name, share in (each.get("val") or {}).items():
            if isinstance(share, int | float) and not isinstance(share, bool) and name.endswith("accuracy"):
                shown = names.get(name, name.replace("_", " ").removesuffix(" accuracy"))
                series.setdefault(shown, []).append({"x": at, "y": 100 * share})
    if not series:
        return None
    labels = {"xlabel": "epoch", "ylabel": "accuracy (%)"}
    return album.draw(Picture("lines", "validation", "Validation accuracy", series, labels), run.label)


def _busiest(run: RunFolder, album: Album) -> Content:
    epochs = [each["layers"] for each in run.epochs if each.get("layers")]
    if not epochs or len({len(layers) for layers in epochs}) != 1:
        return None
    step = -(-len(epochs) // 25)
    shown = list(range(0, len(epochs), step))
    values = [[max(layer["load"]) for layer in epochs[at]] for at in shown]
    loads = {
        "rows": [str(at + 1) for at in shown],
        "columns": [str(layer["layer"]) for layer in epochs[0]],
        "values": values,
    }
    caption = f"1 is collapse onto one expert; equal shares are {number(1 / len(epochs[0][0]['load']))}."
    labels = {"xlabel": "MoE layer", "ylabel": "epoch"}
    picture = Picture("heatmap", "load-by-epoch", "Share of the busiest expert", loads, labels, caption)
    return album.draw(picture, run.label)


def sweep(run: RunFolder, album: Album) -> Content:
    """Robust accuracy against eps, one line an attack."""
    curves = run.sweep.get("curves") if run.sweep else None
    if not curves:
        return None
    images = next(iter(curves.values())).get("num_examples")
    caption = f"{images} test images, with 95 % intervals."
    if any(curve["masking"]["suspected"] for curve in curves.values()):
        caption += " Crosses and dashes mark curves not to be believed."
    picture = Picture("sweep", "sweep", "Robust accuracy against eps", curves, caption=caption)
    return element("div", album.draw(picture, run.label), class_="figures")


def dissection(run: RunFolder, album: Album) -> Content:
    """Which predictions and which choices survive, per attack."""
    return [
        _dissected(run, album, name, each) for name, each in run.dissection.items() if isinstance(each, dict)
    ] or None


def _dissected(run: RunFolder, album: Album, name: str, result: Mapping[str, Any]) -> Html:
    rows = {
        f"right clean (n = {result['num_clean_correct']})": result["categories_of_clean_correct"],
        f"all images (n = {result['num_examples']})": result["categories"],
    }
    titles = words.CATEGORIES.items()
    shares = {row: {title: each[key] for key, title in titles} for row, each in rows.items() if each is not None}
    changed = {str(layer): {"changed": {"y": 100 * rate}} for layer, rate in enumerate(result["flip_rate"])}
    loads = {
        f"expert {expert}, {kind}": [layer[expert] for layer in result["load"][kind]]
        for expert in range(result["num_experts"])
        for kind in ("clean", "adversarial")
    }
    table_of_loads = {"rows": list(loads), "columns": list(changed), "values": list(loads.values())}
    pictures = [
        Picture(
            "stacked", "categories", f"What survived {name}", shares, {"xlabel": "images (%)"},
            "1 + 2 is the model's robustness, 1 + 3 the routers'.",
        ),
        Picture(
            "bars", "changed", "Choices changed by the attack", changed, {"xlabel": "MoE layer", "ylabel": "images (%)"}
        ),
        Picture(
            "heatmap", "load", "Expert load", table_of_loads, {"xlabel": "MoE layer", "ylabel": ""},
            "Share of images that each layer sends to each expert, before and under the attack.",
        ),
    ]  # fmt: skip
    figures = element("div", [album.draw(each, f"{run.label}-{name}") for each in pictures], class_="figures")
    return Html(figures + (_by_class(run, name, result) or ""))


def _by_class(run: RunFolder, name: str, result: Mapping[str, Any]) -> Html | None:
    """What survived in each class; of many classes the weakest."""
    named = {"classes": run.classes} if run.classes else {}
    found = words.class_shares({"per_class": [], **named, **result})
    rows = [[each["name"], each["num_examples"], *(share_cell(each[part]) for part in _PARTS)] for each in found]
    total = len(result.get("per_class", ()))
    which = "each class" if total == len(found) else f"the {len(found)} weakest of {total} classes"
    caption = f"What survived {name} in {which}, percent."
    columns: list[Column | str] = [
        "Class",
        "Images",
        Column("Model robust (1 + 2)", "higher"),
        Column("Routers robust (1 + 3)", "higher"),
    ]
    return table(caption, columns, rows) if rows else None


_PARTS = ("model", "routers")


def commands(run: RunFolder) -> Content:
    """The command behind every result, the configuration, and the manifest."""
    lines = [
        element(
            "li",
            element("b", each.title),
            " ",
            element("span", each.state, class_="verdict holds" if each.state == "there" else "verdict neutral"),
            element("pre", element("code", each.command)),
        )
        for each in run.result_states()
    ]
    return [element("ul", lines, class_="commands"), _settings(run)]


def _settings(run: RunFolder) -> Content:
    config = element("details", element("summary", "Configuration (config.yaml)"), element("pre", run.config_text))
    if not run.manifest:
        return [config, element("p", "There is no manifest.json: nothing is known of versions and hardware.")]
    rows = [(name.replace("_", " "), words.flat(value)) for name, value in run.manifest.items() if name != "command"]
    about = element(
        "details",
        element("summary", "Versions, hardware, times (manifest.json)"),
        pairs(f"Manifest of {run.label}", rows),
    )
    return [config, about]

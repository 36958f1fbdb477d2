"""The part of the page that is about one run.

Axes: `L` MoE layers, `E` experts. Results hold fractions; the page shows percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from advmoe.report import words
from advmoe.report.album import Album
from advmoe.report.figures import bars_figure, heatmap_figure, lines_figure, stacked_figure, sweep_figure
from advmoe.report.gallery import gallery
from advmoe.report.html import Content, Html, element, joined
from advmoe.report.pathways import pathways
from advmoe.report.results import Run
from advmoe.report.tables import DASH, Cell, Column, number, pairs, percent, seconds, share_cell, table

Draw = Callable[[Run, Album], Content]

_LOSSES = {"ce": "cross-entropy", "kl": "KL(clean || adversarial)"}
_CATEGORIES = {
    "both_survive": "1 both survive",
    "only_routing_fails": "2 only routing fails",
    "only_prediction_fails": "3 only prediction fails",
    "both_fail": "4 both fail",
}


def run_section(run: Run, album: Album, number_: int) -> Html:
    """Everything known about one run, and what is missing."""
    parts: list[tuple[str, Draw]] = [
        ("Robust accuracy", accuracy),
        ("Training", training),
        ("Robustness against the attack's strength", sweep),
        ("The attack, dissected", dissection),
        ("Pathways", pathways),
        ("Gallery", _gallery),
    ]
    found = [(title, draw(run, album)) for title, draw in parts]
    shown = [joined(element("h3", title), content) for title, content in found if content]
    ident = f"run-{number_}"
    return element(
        "section",
        element("h2", run.label, id=f"{ident}-title"),
        element("p", f"{run.method}: {run.model}, on {_data(run)}.", class_="lead"),
        tiles(run),
        shown,
        element("h3", "What made it"),
        _commands(run),
        _settings(run),
        id=ident,
        aria_labelledby=f"{ident}-title",
    )


def _data(run: Run) -> str:
    name, root = run.field("data", "name"), run.field("data", "root")
    return f"{name} ({root})" if name == "folder" else str(name)


def tiles(run: Run) -> Html | None:
    """The few numbers one looks for first."""
    found = run.evaluation
    if not found:
        return None
    cost, reports = found.get("cost") or {}, found.get("attacks") or {}
    items: list[tuple[str, str, str]] = [("Clean accuracy (SA)", f"{percent(found.get('clean_accuracy'))} %", "")]
    for name, share in list((found.get("robust_accuracy") or {}).items())[:3]:
        low, high = (reports.get(name) or {}).get("interval") or (None, None)
        note = "" if low is None else f"95 % interval {percent(low)} to {percent(high)}"
        items.append((f"Robust, {name}", f"{percent(share)} %", note))
    items.append(("Robust, worst case", f"{percent(found.get('worst_case'))} %", "over all attacks at once"))
    if "gmacs" in cost:
        items.append(("Cost of one image", f"{number(cost['gmacs'])} GMACs", "selected pathway, routers included"))
    if "ms_per_image" in cost:
        where = f"{cost.get('device')}, batch {cost.get('batch')}, {cost.get('threads')} threads"
        items.append(("Time of one image", f"{number(cost['ms_per_image'])} ms", where))
    entries = [
        element("div", element("dt", name), element("dd", value, element("small", note) if note else None))
        for name, value, note in items
    ]
    return element("dl", entries, class_="tiles")


def accuracy(run: Run, album: Album) -> Content:
    """A row for each attack, its flags beneath, and what it was measured on."""
    found = run.evaluation
    if not found:
        return None
    reports = found.get("attacks") or {}
    columns = ["Attack", Column("Robust accuracy, %", "higher"), "95 % interval", "Broken of attacked", "Time"]
    rows: list[list[Cell | Content]] = [["none (clean)", Cell(percent(found["clean_accuracy"])), *3 * [None]]]
    for name, share in (found.get("robust_accuracy") or {}).items():
        report = reports.get(name) or {}
        low, high = report.get("interval") or (None, None)
        parts = list((report.get("parts") or {}).values())
        broken, tried = sum(part["broken"] for part in parts), max((part["attempted"] for part in parts), default=0)
        rows.append([
            name, share_cell(share), Cell(DASH if low is None else f"{percent(low)} to {percent(high)}", low),
            Cell(f"{broken} of {tried}" if parts else DASH, broken / tried if tried else None),
            Cell(seconds(report.get("seconds")), report.get("seconds")),
        ])  # fmt: skip
    rows.append(["worst case", share_cell(found.get("worst_case")), *3 * [None]])
    threat = found.get("threat") or {}
    caption = f"{run.label} on {found.get('num_examples')} test images, {_radius(threat)}"
    flags = [f"{name}: {flag}" for name, report in reports.items() for flag in report.get("flags") or ()]
    flags += [f"{name} was skipped: {report['skipped']}" for name, report in reports.items() if "skipped" in report]
    notes: list[Content] = []
    if (gap := found.get("masking_gap")) is not None:
        notes.append(
            element("p", f"Masking gap, straight-through PGD less the worst case: {percent(gap)} percentage points.")
        )
    if flags:
        title = element("p", element("b", "Warnings of the attacks"))
        notes.append(element("div", title, element("ul", [element("li", flag) for flag in flags]), class_="note"))
    return [table(caption, columns, _worst_first(rows)), notes]


def _worst_first(rows: list[list[Cell | Content]]) -> list[list[Cell | Content]]:
    """The clean accuracy has no place among those under attack when they are sorted or the best one is marked."""
    clean, *others = rows
    shown = clean[1]
    assert isinstance(shown, Cell)
    return [[clean[0], Cell(shown.content, None), *clean[2:]], *others]


def _radius(threat: Mapping[str, Any]) -> str:
    eps = threat.get("eps")
    if eps is None:
        return "eps unknown"
    text = f"{255 * eps:.4g}/255" if threat.get("norm") == "linf" else f"{eps:.4g}"
    return f"{threat.get('norm')} eps {text}"


def training(run: Run, album: Album) -> Content:
    """Losses and accuracies by epoch, and in MoE layers the experts' load."""
    if not run.epochs:
        return None
    found = [_losses(run, album), _validation(run, album), _busiest(run, album)]
    rate = [each["images_per_second"] for each in run.epochs if each.get("images_per_second")]
    spent = sum(each.get("seconds") or 0 for each in run.epochs)
    about = f"{len(run.epochs)} epochs in {seconds(spent)}"
    about += f", {number(sum(rate) / len(rate))} images/s on average." if rate else "."
    dead = sorted({each["layer"] for each in run.epochs[-1].get("layers") or () if each.get("dead_experts")})
    if dead:
        about += f" In the last epoch some expert was chosen for no image in layers {', '.join(map(str, dead))}."
    return [element("p", about), element("div", found, class_="figures")]


def _losses(run: Run, album: Album) -> Content:
    series: dict[str, list[dict[str, Any]]] = {}
    for at, each in enumerate(run.epochs, start=1):
        for level, losses in (each.get("train") or {}).items():
            for name, value in (losses or {}).items():
                if name in _LOSSES and value is not None:
                    shown = _LOSSES[name] if level == "all" else f"{level}: {_LOSSES[name]}"
                    series.setdefault(shown, []).append({"x": at, "y": value})
    if not series:
        return None
    return _lines(run, album, series, "losses", "Training losses", "epoch", "loss (nats)")


def _validation(run: Run, album: Album) -> Content:
    names = {"clean_accuracy": "clean", "robust_accuracy": "robust"}
    series: dict[str, list[dict[str, Any]]] = {}
    for at, each in enumerate(run.epochs, start=1):
        for name, share in (each.get("val") or {}).items():
            if isinstance(share, int | float) and not isinstance(share, bool) and name.endswith("accuracy"):
                shown = names.get(name, name.replace("_", " ").removesuffix(" accuracy"))
                series.setdefault(shown, []).append({"x": at, "y": 100 * share})
    if not series:
        return None
    return _lines(run, album, series, "validation", "Validation accuracy", "epoch", "accuracy (%)")


def _lines(
    run: Run, album: Album, series: Mapping[str, Sequence[Mapping[str, Any]]], name: str, title: str, xlabel: str,
    ylabel: str,
) -> Html:  # fmt: skip
    return album.draw(
        f"{run.label}-{name}", lines_figure, series, title=title, alt=words.of_lines(series, xlabel, ylabel),
        xlabel=xlabel, ylabel=ylabel,
    )  # fmt: skip


def _busiest(run: Run, album: Album) -> Content:
    epochs = [each["layers"] for each in run.epochs if each.get("layers")]
    if not epochs or len({len(layers) for layers in epochs}) != 1:
        return None
    step = -(-len(epochs) // 25)
    shown = list(range(0, len(epochs), step))
    values = [[max(layer["load"]) for layer in epochs[at]] for at in shown]
    rows, columns = [str(at + 1) for at in shown], [str(layer["layer"]) for layer in epochs[0]]
    return album.draw(
        f"{run.label}-load-by-epoch", heatmap_figure, values, title="Share of the busiest expert",
        alt=words.of_heatmap(values, rows, columns, "MoE layer", "epoch"),
        caption=f"1 is collapse onto one expert; equal shares are {number(1 / len(epochs[0][0]['load']))}.",
        row_names=rows, column_names=columns, xlabel="MoE layer", ylabel="epoch",
    )  # fmt: skip


def sweep(run: Run, album: Album) -> Content:
    """Robust accuracy against eps, one line an attack."""
    curves = run.sweep.get("curves") if run.sweep else None
    if not curves:
        return None
    alt = []
    for name, curve in curves.items():
        heights = ", ".join(
            f"{percent(point['robust_accuracy'])} % at {number(point['eps'])}" for point in curve["points"]
        )
        alt.append(f"{name}: {heights}.")
    images = next(iter(curves.values())).get("num_examples")
    drawn = album.draw(
        f"{run.label}-sweep", sweep_figure, curves, title="Robust accuracy against eps", alt=" ".join(alt),
        caption=f"{images} test images, with 95 % intervals. Crosses and dashes mark curves not to be believed.",
    )  # fmt: skip
    return element("div", drawn, class_="figures one")


def dissection(run: Run, album: Album) -> Content:
    """Which predictions and which choices survive, per attack."""
    return [
        _dissected(run, album, name, each) for name, each in run.dissection.items() if isinstance(each, dict)
    ] or None


def _dissected(run: Run, album: Album, name: str, found: Mapping[str, Any]) -> Html:
    rows = {
        f"right clean (n = {found['num_clean_correct']})": found["categories_of_clean_correct"],
        f"all images (n = {found['num_examples']})": found["categories"],
    }
    shares = {
        row: {title: each[key] for key, title in _CATEGORIES.items()} for row, each in rows.items() if each is not None
    }
    flips = {"": [{"x": layer, "y": 100 * rate} for layer, rate in enumerate(found["flip_rate"])]}
    changed = {str(layer): {"changed": {"y": 100 * rate}} for layer, rate in enumerate(found["flip_rate"])}
    loads = {
        f"expert {expert}, {kind}": [layer[expert] for layer in found["load"][kind]]
        for expert in range(found["num_experts"])
        for kind in ("clean", "adversarial")
    }
    layers = [str(layer) for layer in range(len(flips[""]))]
    values = list(loads.values())
    label = f"{run.label}-{name}"
    drawn = [
        album.draw(
            f"{label}-categories", stacked_figure, shares, title=f"What survived {name}", alt=words.of_shares(shares),
            caption="1 + 2 is the model's robustness, 1 + 3 the routers'.", xlabel="images (%)",
        ),
        album.draw(
            f"{label}-changed", bars_figure, changed, title="Choices changed by the attack",
            alt=words.of_bars({f"layer {layer}": bars for layer, bars in changed.items()}, "images (%)"),
            caption="By MoE layer.", ylabel="images (%)",
        ),
        album.draw(
            f"{label}-load", heatmap_figure, values, title="Expert load",
            alt=words.of_heatmap(values, list(loads), layers, "MoE layer", "expert"),
            caption="Share of images that each layer sends to each expert, before and under the attack.",
            row_names=list(loads), column_names=layers, xlabel="MoE layer", ylabel="",
        ),
    ]  # fmt: skip
    return element("div", drawn, class_="figures")


def _gallery(run: Run, album: Album) -> Content:
    return None if run.gallery is None else gallery(run.gallery)


def _commands(run: Run) -> Content:
    rows = run.commands()
    missing = [title for title, there, _ in rows if there is None]
    lines = [
        element("tr", element("th", title, scope="row"),
                element("td", there or element("span", "missing", class_="verdict neutral")),
                element("td", element("code", command)))
        for title, there, command in rows
    ]  # fmt: skip
    head = element("tr", [element("th", title, scope="col") for title in ("Result", "State", "Command that makes it")])
    caption = f"Results of {run.label} and what makes them"
    made = element(
        "table", element("caption", caption), element("thead", head), element("tbody", lines), class_="pairs"
    )
    said = f"Missing: {', '.join(missing)}. The commands below make them." if missing else "Every result is there."
    reason = element("p", f"No gallery: {run.no_gallery}.") if run.gallery is None and run.no_gallery else None
    return [
        element("p", said),
        reason,
        element("div", made, class_="scroll", role="region", tabindex="0", aria_label=caption),
    ]


def _settings(run: Run) -> Content:
    config = element("details", element("summary", "Configuration (config.yaml)"), element("pre", run.config_text))
    if not run.manifest:
        return [config, element("p", "There is no manifest.json: nothing is known of versions and hardware.")]
    rows = [(name.replace("_", " "), _flat(value)) for name, value in run.manifest.items()]
    about = element(
        "details",
        element("summary", "Versions, hardware, times (manifest.json)"),
        pairs(f"Manifest of {run.label}", rows),
    )
    return [config, about]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_flat, value))
    return DASH if value is None else str(value)

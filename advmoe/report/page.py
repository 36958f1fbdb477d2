"""`advmoe report`: runs and studies on one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from advmoe.report import words
from advmoe.report.album import Album
from advmoe.report.figures import bars_figure, require_matplotlib, sweep_figure
from advmoe.report.html import Content, Html, element
from advmoe.report.results import Run, Study
from advmoe.report.run_sections import run_section
from advmoe.report.study_sections import study_section, verdict
from advmoe.report.tables import Cell, Column, number, percent, share_cell, table


def write_report(
    results: Sequence[Run | Study], path: str | Path, *, title: str | None = None, made_by: str = "advmoe report"
) -> Path:
    """Write the page about `results` to `path`, and its figures as SVG and PNG into `<name>-figures/` beside it.

    Args:
        results: what `results.load_results` read, in the order in which it is shown.
        path: of the page, ending in .html.
        title: of the page; by default made from the results' names.
        made_by: the command that makes the page again, shown at its end.

    Returns the folder of the figures. Raises `ValueError` without matplotlib, for another suffix, no results, or
    results that cannot be drawn; nothing is written then.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"path must end in .html, got {str(path)!r}")
    if not results:
        raise ValueError("results must be at least one run or study, got none")
    require_matplotlib()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f"{path.stem}-figures")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as place:
        album = Album(Path(place))
        page = _page(results, album, title or _title(results), made_by, folder.name)
        whole = Path(place) / ".page"
        whole.write_bytes(page.encode("utf-8", "backslashreplace"))  # names of files may be no text
        folder.mkdir(exist_ok=True)
        for figure in sorted(Path(place).glob("[!.]*")):
            os.replace(figure, folder / figure.name)
        os.replace(whole, path)
    return folder


def _title(results: Sequence[Run | Study]) -> str:
    if len(results) == 1:
        (only,) = results
        return only.title if isinstance(only, Study) else f"{only.method}, {only.label}"
    runs, studies = (sum(isinstance(each, kind) for each in results) for kind in (Run, Study))
    found = [
        f"{runs} run{'s' * (runs > 1)}" if runs else "",
        f"{studies} stud{'ies' if studies > 1 else 'y'}" if studies else "",
    ]
    return " and ".join(each for each in found if each)


def _page(results: Sequence[Run | Study], album: Album, title: str, made_by: str, folder: str) -> str:
    runs = [each for each in results if isinstance(each, Run)]
    studies = [each for each in results if isinstance(each, Study)]
    summary = _summary(runs, studies, album)
    sections, entries = [], [("summary", "Summary")]
    for at, each in enumerate(results, start=1):
        study = isinstance(each, Study)
        sections.append(study_section(each, album, at) if isinstance(each, Study) else run_section(each, album, at))
        entries.append((f"{'study' if study else 'run'}-{at}", each.title if isinstance(each, Study) else each.label))
    links = [element("li", element("a", name, href=f"#{ident}")) for ident, name in entries]
    script, style = (Html(files("advmoe.report").joinpath(name).read_text("utf-8")) for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's own script alone may run, and nothing may be fetched, whatever a name in the results holds.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} \N{MIDDLE DOT} advmoe report"),
        element("style", style),
    )  # fmt: skip
    body = element(
        "body",
        element("a", "Skip to the content", class_="skip", href="#main"),
        element("header", element("p", "advmoe report", class_="eyebrow"), element("h1", title)),
        element("div",
            element("nav", element("h2", "Contents"), element("ol", links), aria_label="Contents"),
            element("main", summary, sections, id="main"),
            class_="columns",
        ),
        element("footer",
            element("p", "This page needs no other file. Its figures lie as SVG and PNG in ", element("code", f"{folder}/"), " beside it."),
            element("p", "Made by ", element("code", made_by)),
        ),
        element("script", script),
    )  # fmt: skip
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _summary(runs: Sequence[Run], studies: Sequence[Study], album: Album) -> Html:
    parts: list[Content] = [element("h2", "Summary", id="summary-title")]
    if studies:
        parts.append(_verdicts(studies))
    if runs:
        parts.append(_side_by_side(runs, album))
    return element("section", parts, id="summary", aria_labelledby="summary-title")


def _verdicts(studies: Sequence[Study]) -> Content:
    """What each study shows, and the verdicts of all claims."""
    shown = [
        element("li", element("b", study.title), f": {study.content['shows']}" if study.content.get("shows") else "")
        for study in studies
    ]
    rows: list[list[Cell | Content]] = []
    for study in studies:
        for claim in study.content.get("claims") or []:
            for each in claim.get("verdicts") or []:
                word, p = str(each.get("verdict")), each.get("p_value")
                shown_p = Cell(None if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001", p)
                rows.append([
                    str(claim.get("statement") or claim.get("name")), study.title, str(each.get("measure")),
                    Cell(verdict(word), word), shown_p,
                ])  # fmt: skip
    columns = ["Claim", "Study", "Measure", "Verdict at this size", "p-value"]
    return [element("ul", shown), table("Claims and their verdicts", columns, rows) if rows else None]


def _side_by_side(runs: Sequence[Run], album: Album) -> Content:
    attacks = list(dict.fromkeys(name for run in runs for name in run.evaluation.get("robust_accuracy") or {}))
    columns = [
        "Run", "Method", "Model", Column("Clean (SA), %", "higher"),
        *(Column(f"{name}, %", "higher") for name in attacks), Column("Worst case, %", "higher"),
        Column("GMACs", "lower"), Column("ms/image", "lower"), "Parameters", "Images",
    ]  # fmt: skip
    rows = [_row(run, attacks, at) for at, run in enumerate(runs, start=1)]
    parts: list[Content] = [table("Runs side by side", columns, rows), _unlike(runs)]
    figures = [_compared(runs, attacks, album), _swept(runs, album)]
    if any(figures):
        parts.append(element("div", figures, class_="figures"))
    return parts


def _row(run: Run, attacks: Sequence[str], at: int) -> list[Cell | Content]:
    found = run.evaluation
    cost, robust = found.get("cost") or {}, found.get("robust_accuracy") or {}
    return [
        Cell(run.label, run.label), run.method, run.model, share_cell(found.get("clean_accuracy")),
        *(share_cell(robust.get(name)) for name in attacks), share_cell(found.get("worst_case")), cost.get("gmacs"),
        cost.get("ms_per_image"), cost.get("parameters"), found.get("num_examples"),
    ]  # fmt: skip


def _unlike(runs: Sequence[Run]) -> Content:
    """A warning where numbers that stand side by side were not measured alike."""
    measured = [run for run in runs if run.evaluation]
    asked = {
        "attacks": {", ".join(sorted(run.evaluation.get("robust_accuracy") or {})) for run in measured},
        "eps": {str((run.evaluation.get("threat") or {}).get("eps")) for run in measured},
        "number of images": {str(run.evaluation.get("num_examples")) for run in measured},
        "data": {str((run.evaluation.get("data") or {}).get("name")) for run in measured},
    }
    unlike = [what for what, values in asked.items() if len(values) > 1]
    notes: list[Content] = []
    if unlike:
        notes.append(
            element("p", f"Not measured alike, so compare with care: these runs differ in {', '.join(unlike)}.")
        )
    absent = [run.label for run in runs if not run.evaluation]
    if absent:
        notes.append(element("p", f"Not evaluated yet: {', '.join(absent)}. Each run's part below has the command."))
    return element("div", notes, class_="note") if notes else None


def _compared(runs: Sequence[Run], attacks: Sequence[str], album: Album) -> Content:
    measured = [run for run in runs if run.evaluation]
    if len(measured) < 2:
        return None
    common = [
        name for name in attacks if all(name in (run.evaluation.get("robust_accuracy") or {}) for run in measured)
    ]
    groups: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in ("clean", *common[:3], "worst case"):
        bars = {}
        for run in measured:
            found = run.evaluation
            keys = {"clean": found.get("clean_accuracy"), "worst case": found.get("worst_case")}
            share = keys[name] if name in keys else found["robust_accuracy"][name]
            low, high = ((found.get("attacks") or {}).get(name) or {}).get("interval") or (None, None)
            bars[run.label] = {
                key: None if value is None else 100 * value
                for key, value in (("y", share), ("low", low), ("high", high))
            }
        groups[name] = bars
    return album.draw(
        "compared", bars_figure, groups, title="Accuracy side by side", alt=words.of_bars(groups, "accuracy (%)"),
        caption="Clean, under the attacks that all runs have in common, and in the worst case.", ylabel="accuracy (%)",
    )  # fmt: skip


def _swept(runs: Sequence[Run], album: Album) -> Content:
    curves = {run.label: (run.sweep.get("curves") or {}).get("worst case") for run in runs if run.sweep}
    known = {label: curve for label, curve in curves.items() if curve}
    if len(known) < 2 or len({curve["norm"] for curve in known.values()}) > 1:
        return None
    alt = ". ".join(
        f"{label}: " + ", ".join(f"{percent(p['robust_accuracy'])} % at {number(p['eps'])}" for p in curve["points"])
        for label, curve in known.items()
    )
    return album.draw(
        "sweeps", sweep_figure, known, title="Worst case against eps", alt=alt,
        caption="Over the attacks of each run's sweep, with 95 % intervals.",
    )  # fmt: skip

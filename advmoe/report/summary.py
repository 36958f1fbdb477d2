"""The first section of the page: the verdicts of studies, and runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from advmoe.report import words
from advmoe.report.album import Album
from advmoe.report.html import Content, element
from advmoe.report.pictures import Picture
from advmoe.report.results import RunFolder, StudyFolder
from advmoe.report.run_sections import introduction
from advmoe.report.sections import Section, section
from advmoe.report.study_sections import p_value, these_models, verdict
from advmoe.report.tables import Cell, Column, share_cell, table
from advmoe.text import macs_unit


def summary(results: Sequence[RunFolder | StudyFolder], album: Album) -> Section:
    """The first section: the verdicts of studies, then one run's numbers or several runs side by side."""
    runs = [each for each in results if isinstance(each, RunFolder)]
    studies = [each for each in results if isinstance(each, StudyFolder)]
    parts: list[Content] = []
    if studies:
        parts.append(_verdicts(studies))
    if len(results) == len(runs) == 1:
        parts.append(introduction(runs[0], "run-1"))
    elif runs:
        parts.append(_side_by_side(runs, album))
    return section("summary", "Summary", parts)


def _verdicts(studies: Sequence[StudyFolder]) -> Content:
    """What each study shows, and the verdicts of all claims."""
    shown = [
        element("li", element("b", study.title), f": {study.content['shows']}" if study.content.get("shows") else "")
        for study in studies
    ]
    rows: list[list[Cell | Content]] = []
    for study in studies:
        for claim in study.content.get("claims") or []:
            for each in claim.get("verdicts") or []:
                rows.append([
                    str(claim.get("statement") or claim.get("name")), *([study.title] if len(studies) > 1 else []),
                    str(each.get("measure")), verdict(each.get("verdict")), p_value(each.get("p_value")),
                    these_models(each.get("these_models")).removeprefix("these models: "),
                ])  # fmt: skip
    of = ["Study"] if len(studies) > 1 else []
    columns = ["Claim", *of, "Measure", "Verdict at this size", "p\N{NON-BREAKING HYPHEN}value", "These models alone"]
    return [element("ul", shown), table("Claims and their verdicts.", columns, rows) if rows else None]


def _side_by_side(runs: Sequence[RunFolder], album: Album) -> Content:
    attacks = list(dict.fromkeys(name for run in runs for name in run.evaluation.get("robust_accuracy") or {}))
    unit, factor = macs_unit((run.evaluation.get("cost") or {}).get("gmacs") for run in runs)
    columns: list[Column | str] = [
        "Run", "Method", Column("Clean (SA)", "higher"), *(Column(name, "higher") for name in attacks),
        Column("Worst case", "higher"), Column(unit, "lower"), Column("ms/image", "lower"), "Parameters", "Images",
    ]  # fmt: skip
    caption = "Runs side by side; accuracies in percent, clean and under each attack."
    parts: list[Content] = [table(caption, columns, [_row(run, attacks, factor) for run in runs]), _unlike(runs)]
    figures = [_compared(runs, attacks, album), _swept(runs, album)]
    if any(figures):
        parts.append(element("div", figures, class_="figures"))
    return parts


def _row(run: RunFolder, attacks: Sequence[str], of_gmacs: float) -> list[Cell | Content]:
    evaluation = run.evaluation
    cost, robust = evaluation.get("cost") or {}, evaluation.get("robust_accuracy") or {}
    macs = None if (gmacs := cost.get("gmacs")) is None else gmacs * of_gmacs
    return [
        run.label, Cell([run.method, element("small", run.model, class_="below")], run.method),
        share_cell(evaluation.get("clean_accuracy")), *(share_cell(robust.get(name)) for name in attacks),
        share_cell(evaluation.get("worst_case")), macs, cost.get("ms_per_image"), cost.get("parameters"),
        evaluation.get("num_examples"),
    ]  # fmt: skip


def _unlike(runs: Sequence[RunFolder]) -> Content:
    """A warning where numbers that stand side by side were not measured alike."""
    measured = [run for run in runs if run.evaluation]
    asked = {
        "attacks": {", ".join(sorted(run.evaluation.get("robust_accuracy") or {})) for run in measured},
        "eps": {words.of_threat(run.evaluation.get("threat") or {}) for run in measured},
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
        notes.append(element("p", f"Not evaluated yet: {', '.join(absent)}. Each run's section has the command."))
    return element("div", notes, class_="note") if notes else None


def _compared(runs: Sequence[RunFolder], attacks: Sequence[str], album: Album) -> Content:
    measured = [run for run in runs if run.evaluation]
    if len(measured) < 2:
        return None
    common = [
        name for name in attacks if all(name in (run.evaluation.get("robust_accuracy") or {}) for run in measured)
    ]
    groups = {name: {run.label: _bar(run, name) for run in measured} for name in ("clean", *common[:3], "worst case")}
    caption = "Clean, under the attacks that all runs have in common, and in the worst case."
    labels = {"ylabel": "accuracy (%)"}
    return album.draw(Picture("bars", "compared", "Accuracy side by side", groups, labels, caption))


def _bar(run: RunFolder, name: str) -> dict[str, float | None]:
    """A run's accuracy under one attack, `clean` or in the `worst case`, in percent."""
    evaluation = run.evaluation
    shares = {
        "clean": evaluation.get("clean_accuracy"),
        "worst case": evaluation.get("worst_case"),
        **(evaluation.get("robust_accuracy") or {}),
    }
    low, high = ((evaluation.get("attacks") or {}).get(name) or {}).get("interval") or (None, None)
    bar = {"y": shares[name], "low": low, "high": high}
    return {end: None if share is None else 100 * share for end, share in bar.items()}


def _swept(runs: Sequence[RunFolder], album: Album) -> Content:
    curves = {run.label: (run.sweep.get("curves") or {}).get("worst case") for run in runs if run.sweep}
    known = {label: curve for label, curve in curves.items() if curve}
    if len(known) < 2 or len({curve["norm"] for curve in known.values()}) > 1:
        return None
    caption = "Over the attacks of each run's sweep, with 95 % intervals."
    return album.draw(Picture("sweep", "sweeps", "Worst case against eps", known, caption=caption))

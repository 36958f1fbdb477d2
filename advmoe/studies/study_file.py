"""`study.json` and its figures: a study's findings, written for reports.

Imports no torch until it writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.files import read_object, write_text
from advmoe.rundir import DONE, MANIFEST, STUDY
from advmoe.studies.labels import field_of, shared
from advmoe.studies.plan import PlannedMeasure, PlannedRow, PlannedRun, StudyTask
from advmoe.studies.rows import Settings
from advmoe.studies.study import StudyFindings


def write_study_file(
    home: Path, about: Mapping[str, Any], rows: Sequence[PlannedRow], tasks: Mapping[str, StudyTask],
    errors: Mapping[str, str], findings: StudyFindings,
) -> dict[str, Any]:  # fmt: skip
    """Write `study.json` into the folder `home`, after the figures that it names; returns its content.

    Args:
        about: what the file begins with: the study's name, title and scale, and the command.
        rows, tasks: as planned, finished or not. errors: of tasks that failed, by id.
    """
    import torch

    from advmoe.training.manifest import describe

    folder = home / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    size = of_size(rows)
    drawn, notes = [], [*findings.notes, *unfinished(rows), *_left_out(rows)]
    for figure in findings.figures:
        if not figure.data:
            notes.append(f"Nothing was measured for the figure {figure.title!r}.")
            continue
        for suffix in ("svg", "png"):
            figure.draw(folder / f"{figure.name}.{suffix}")
        drawn.append({
            "id": figure.name, **{name: getattr(figure, name) for name in ("title", "alt", "kind", "data", "options")},
            "caption": _with_size(figure.caption, size),
            "svg": f"figures/{figure.name}.svg", "png": f"figures/{figure.name}.png",
        })  # fmt: skip
    tables = [{**each, "caption": _with_size(each["caption"] or f"{each['title']}.", size)} for each in findings.tables]
    machine = describe(name="", seed=0, device=torch.device("cpu"), devices=1, command=None)
    content = {
        **about, "size": size, "tables": tables, "figures": drawn, "claims": list(findings.claims), "notes": notes,
        "runs": _runs(tasks, errors), "settings": shared([row.row.run.settings for row in rows]),
        "seconds": round(math.fsum(_seconds(task) or 0.0 for task in tasks.values()), 1),
        "made_on": _made_on(tasks.values()), "shown_by": {name: machine[name] for name in ("versions", "git_commit")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_text(home / STUDY, json.dumps(content, indent=1) + "\n")
    return content


def _with_size(caption: str, size: str) -> str:
    """A caption that tells how large the study is: tables and figures are shown elsewhere, too."""
    return f"{caption} {size[:1].upper()}{size[1:]}.".strip() if size else caption


def unfinished(rows: Iterable[PlannedRow]) -> list[str]:
    """A line for each row of which seeds are not trained or measured: means and verdicts are of the others, and what
    fails may fail for being worse.
    """
    lines = []
    for row in rows:
        parts: dict[int, list[StudyTask]] = {
            seed: [run, *row.measures[seed].values()] for seed, run in row.runs.items()
        }
        missing = [str(seed) for seed, each in parts.items() if any(part.state() != "finished" for part in each)]
        if missing and len(missing) < len(row.runs):
            lines.append(
                f"Not finished, and left out of means and verdicts: {row.row.run.name}, seed {', '.join(missing)}."
            )
    return lines


def _left_out(rows: Iterable[PlannedRow]) -> list[str]:
    """Which images the runs left out, each line once."""
    notes = [note for row in rows for run in row.runs.values() for note in _manifest(run).get("data_notes") or ()]
    return [f"Images: {note}" for note in dict.fromkeys(notes)]


def _runs(tasks: Mapping[str, StudyTask], errors: Mapping[str, str]) -> list[dict[str, Any]]:
    """What became of each run, those that others start from included."""
    entries = []
    for run in (task for task in tasks.values() if isinstance(task, PlannedRun)):
        measures = [t for t in tasks.values() if isinstance(t, PlannedMeasure) and t.run.key == run.key]
        parts: list[StudyTask] = [run, *measures]
        failed = [error for task in parts if (error := errors.get(task.id))]
        entries.append({
            "name": run.name, "key": run.key, "seed": run.seed, "path": str(run.path), "seconds": _seconds(run),
            "status": "failed" if failed else run.state(), "error": failed[0] if failed else None,
        })  # fmt: skip
    return entries


def _made_on(tasks: Iterable[StudyTask]) -> dict[str, list[Any]]:
    """Hardware and versions behind the runs and measurements, each once: they may come from several machines."""
    facts: dict[str, dict[Any, None]] = {"cpu": {}, "device": {}, "threads": {}, "torch": {}, "git_commit": {}}
    for manifest in map(_manifest, tasks):
        for each in (manifest, *manifest.get("resumed", ())):
            known = {**each, "torch": (each.get("versions") or {}).get("torch")}
            for name, values in facts.items():
                if known.get(name) is not None:
                    values[known[name]] = None
    return {name: list(values) for name, values in facts.items()}


def _seconds(task: StudyTask) -> float | None:
    """The wall time of a run or a measurement, as its own file says; None where it does not."""
    seconds: float | None = _manifest(task).get("wall_seconds" if isinstance(task, PlannedRun) else "seconds")
    return seconds


def _manifest(task: StudyTask) -> dict[str, Any]:
    """A run's manifest, or a measurement's `done.json`; empty where it is not there."""
    try:
        return read_object(task.path / (MANIFEST if isinstance(task, PlannedRun) else DONE))
    except (OSError, ValueError):
        return {}


def of_size(rows: Iterable[PlannedRow]) -> str:
    """The size of a study in a sentence: epochs, images, threat, attacks and the like, where all runs share them."""
    rows = list(rows)
    configs = [run.config for row in rows for run in row.runs.values()]
    attacked = [each for each in configs if each["training"]["method"] != "standard"]
    usual = {field_of(each, "training", "epochs") for each in attacked or configs}
    standard = [run.config for row in rows for each in row.runs.values() for run in each.lineage if run.standard]
    longer = [each for each in standard if field_of(each, "training", "epochs") not in usual]
    partial = [each for each in configs if each["model"]["kind"] != "dense"]
    routed = [each for each in configs if each["model"]["kind"] == "moe"]
    trained = [
        *_told(attacked or configs, "training", "epochs", "{} epochs"),
        *_told(longer, "training", "epochs", "{} without attacks"),
        *_told(configs, "data", "train_examples", "{:,} training images", "all training images"),
        *_told(configs, "threat", "norm", "{}"),
        *_told(configs, "threat", "eps", "eps {}"),
        *_told(attacked, "training", "attack_steps", "K = {}"),
        *_told(partial, "model", "scale", "r = {}"),
        *_told(routed, "model", "num_experts", "N = {}"),
    ]
    measured = _told(configs, "attack", "steps", "PGD of {} steps")
    numbers = {
        name: measure.options["num_examples"]
        for row in rows
        for measures in row.measures.values()
        for name, measure in measures.items()
        if "num_examples" in measure.options
    }
    by_number: dict[int | None, list[str]] = {}
    for name, number in numbers.items():
        by_number.setdefault(number, []).append(name)
    for number, names in by_number.items():
        images = "all test images" if number is None else f"{number:,} test images"
        measured.append(images if len(by_number) == 1 else f"{images} ({', '.join(names)})")
    return "; ".join(", ".join(part) for part in (trained, measured) if part)


def _told(configs: Iterable[Settings], group: str, name: str, words: str, none: str = "") -> list[str]:
    """A field in words, if all configurations have one value of it; `none`: the words for None."""
    values = {field_of(each, group, name) for each in configs}
    if len(values) != 1:
        return []
    (value,) = values
    if value is None:
        return [none]
    text = words.format(value)
    return [text.removesuffix("s") if value == 1 else text]

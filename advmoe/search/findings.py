"""What a search shows: `study.json`, as studies write it, for reports. Imports no torch until it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.files import write_text
from advmoe.report.pictures import Picture
from advmoe.rundir import STUDY
from advmoe.search.settings import SearchSettings
from advmoe.search.trials import TrialTask

Ends = Mapping[str, Mapping[str, Any]]
"""How trials ended, by id: see `TrialTask.ended`."""
TITLES = {"worst_case": "worst case", "clean_accuracy": "clean"}


def write_findings(
    folder: Path, settings: SearchSettings, tasks: Mapping[str, TrialTask], ends: Ends, best: str | None,
    command: str | None,
) -> None:  # fmt: skip
    """Write `study.json` of a search whose trials ended so."""
    import torch

    from advmoe.training.manifest import describe

    machine = describe(name="", seed=0, device=torch.device("cpu"), devices=1, command=None)
    content = {
        "study": "search", "title": f"Search for {', '.join(each.name for each in settings.space)}",
        "shows": f"The configuration with the highest {TITLES[settings.objective]} accuracy on validation images.",
        "scale": "as configured", "seeds": [settings.config.training.seed], "command": command,
        "size": f"{len(tasks)} trials drawn by {settings.sampler}, pruned by {settings.pruner}",
        "tables": [trials_table(settings, ends)], "figures": [_described(each) for each in pictures(settings, ends)],
        "claims": [], "notes": notes(tasks, ends, best), "runs": [_run(task, ends) for task in tasks.values()],
        "settings": {f"{group}.{name}": value for group, fields in settings.config.to_dict().items()
                     for name, value in fields.items() if f"{group}.{name}" not in {d.name for d in settings.space}},
        "seconds": round(math.fsum(end["seconds"] or 0.0 for end in ends.values()), 1),
        "shown_by": {name: machine[name] for name in ("versions", "git_commit")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_text(folder / STUDY, json.dumps(content, indent=1) + "\n")


def trials_table(settings: SearchSettings, ends: Ends) -> dict[str, Any]:
    """The table of trials, in percent: as of `study.json`."""
    fields = [each.name for each in settings.space]
    measured = ("clean_accuracy", "worst_case")
    columns = [
        {"key": "trial", "title": "Trial"}, *({"key": name, "title": name} for name in fields),
        {"key": "state", "title": "State"}, {"key": "epochs", "title": "Epochs"},
        *({"key": name, "title": f"{TITLES[name]} %", "better": "higher"} for name in measured),
    ]  # fmt: skip
    rows = [
        {
            "trial": name, "state": end["state"], "epochs": len(end["epochs"]),
            **{field: _plain(end["parameters"].get(field)) for field in fields},
            **{key: None if (share := end["measured"].get(key)) is None else 100 * share for key in measured},
        }
        for name, end in ends.items()
    ]  # fmt: skip
    caption = "Accuracies on the validation split."
    return {"title": "Trials", "caption": caption, "columns": columns, "rows": rows}


def pictures(settings: SearchSettings, ends: Ends) -> list[Picture]:
    """The best value so far by trial; and the accuracy of every trial by epoch, where they had several."""
    values = [(int(name), 100 * end["value"]) for name, end in ends.items() if end["value"] is not None]
    if not values:
        return []
    each = [{"x": number, "y": value} for number, value in values]
    so_far = [{"x": number, "y": max(value for _, value in values[: at + 1])} for at, (number, _) in enumerate(values)]
    title = TITLES[settings.objective]
    shown = [Picture(
        "lines", "best", "Best so far", {"best so far": so_far, "each trial": each},
        {"xlabel": "trial", "ylabel": f"{title} accuracy (%)"}, "On the validation split.",
    )]  # fmt: skip
    curves = {
        name: [{"x": int(epoch), "y": 100 * share} for epoch, share in end["epochs"].items()]
        for name, end in ends.items() if len(end["epochs"]) > 1
    }  # fmt: skip
    if 1 < len(curves) <= _MOST_CURVES:
        shown.append(Picture(
            "lines", "epochs", "Trials by epoch", curves, {"xlabel": "epoch", "ylabel": _WATCHED[settings.watched]},
            "What the pruner compares; a trial that ends early was pruned.",
        ))  # fmt: skip
    return shown


_MOST_CURVES = 16
_WATCHED = {"robust_accuracy": "validation robust accuracy (%)", "clean_accuracy": "validation clean accuracy (%)"}


def notes(tasks: Mapping[str, TrialTask], ends: Ends, best: str | None) -> list[str]:
    """What to know of the numbers."""
    lines = []
    if best is not None:
        lines.append(f"The best trial is {best}; its configuration is best.yaml. It was chosen among "
                     f"{len(ends)} by these very images: what it is worth, test images tell.")  # fmt: skip
    if len(ends) < len(tasks):
        lines.append(f"{len(tasks) - len(ends)} of {len(tasks)} trials have not ended yet.")
    return lines


def _described(of: Picture) -> dict[str, Any]:
    fields = {name: getattr(of, name) for name in ("title", "alt", "kind", "data", "options", "caption")}
    return {"id": of.name, **fields}


def _run(task: TrialTask, ends: Ends) -> dict[str, Any]:
    end: Mapping[str, Any] = ends.get(task.id, {})
    return {
        "name": f"trial {task.id}", "key": task.id, "seed": task.settings.config.training.seed,
        "path": str(task.path), "seconds": end.get("seconds"), "status": end.get("state", task.state()),
        "error": end.get("error"),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as a cell shows it: truth values and nothing as YAML has them."""
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else value

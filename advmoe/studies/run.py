"""A study run: its rows planned, trained and measured, and `study.json` with figures made of what was found.

Runs lie side by side under one folder, by key, so that studies share them; a study's own folder holds what it shows.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advmoe.config import Config, require
from advmoe.errors import InputError
from advmoe.files import read_object, require_writable, write_text
from advmoe.rundir import DONE, MANIFEST, STUDY, require_plain
from advmoe.studies.catalogue import study_named
from advmoe.studies.labels import of_size, shared
from advmoe.studies.plan import PlannedMeasure, PlannedRow, PlannedRun, Planner, Task, only
from advmoe.studies.pool import Told, run_tasks
from advmoe.studies.present import draw
from advmoe.studies.results import Results
from advmoe.studies.scales import Scale, scale_named
from advmoe.studies.spec import Outcome, Settings, Study
from advmoe.studies.statistics import MOST_SEEDS

FIXED = (
    "model.kind", "model.name", "model.source", "model.to_moe", "data.name", "training.method", "training.seed",
    "training.init_from",
)  # fmt: skip
"""Fields that every study sets itself: what its rows are called by."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is run. Raises `ValueError` for what cannot be, by the names that the command gives it."""

    scale: str = "smoke"
    """`smoke`, `cpu` or `paper`."""
    seeds: int | None = None
    """Seeds 0 ... seeds - 1; by default the scale's number."""
    only: Sequence[str] = ()
    """Rows whose run's name holds one of these words, or all of `a+b`; every row where there are none."""
    overrides: Settings = field(default_factory=dict)
    """Fields set for all runs, over the scale's."""
    num_examples: int | None = None
    """Test images attacked; by default the scale's number."""
    root: Path = Path("runs/studies")
    """Folder of the studies, and of their runs in `runs`."""
    jobs: int = 1
    """Processes that train and measure at the same time."""
    threads: int = 1
    """CPU threads of each."""
    accelerator: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    command: Sequence[str] | None = None
    """What the user typed, for the record."""

    def __post_init__(self) -> None:
        scale_named(self.scale)
        for name in ("seeds", "num_examples", "jobs", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')}", ">= 1", value)
        require((self.seeds or 1) <= MOST_SEEDS, "--seeds", f"<= {MOST_SEEDS}", self.seeds)
        require(self.root.is_dir() or not self.root.exists(), "--out", "a folder, or new", str(self.root))

    def sized(self) -> Scale:
        """The scale with what the user changed of it."""
        scale = scale_named(self.scale)
        scale = replace(scale, overrides=self.overrides, seeds=self.seeds or scale.seeds)
        if (number := self.num_examples) is None:
            return scale
        return replace(scale, examples=number, autoattack=(*scale.autoattack[:2], number))


@dataclass
class Session:
    """A study at one size: what is planned so far, and what became of it."""

    study: Study
    options: Options
    scale: Scale = field(init=False)
    planner: Planner = field(init=False)
    errors: dict[str, str] = field(default_factory=dict)
    """Of tasks that failed, by id."""

    def __post_init__(self) -> None:
        _require_free(self.study, self.options.overrides)
        self.scale = self.options.sized()
        self.planner = Planner(self.options.root / "runs", range(self.scale.seeds))

    def stages(self) -> Iterator[list[PlannedRow]]:
        """The planned rows up to each stage; those of a later stage depend on what the ones before it found.

        Raises `ValueError` for settings that cannot be, for a run that lies there and was trained otherwise, and where
        `only` leaves nothing.
        """
        rows: list[PlannedRow] = []
        for number, stage in enumerate(self.study.stages):
            found = stage(self.scale, Results.read(rows))
            wanted = only(found, self.options.only)
            if number == 0 and not wanted:
                names = "; ".join(row.run.name for row in found)
                raise InputError(f"--only must be words of a run's name ({names}), got {', '.join(self.options.only)}")
            rows = [*rows, *self.planner.rows(wanted)]
            for task in self.planner.tasks(rows).values():
                if isinstance(task, PlannedRun):
                    task.require_same()
            yield rows

    @property
    def home(self) -> Path:
        """The study's folder; a part of the study has its own, and leaves what the whole one found."""
        part = re.sub(r"[^\w+.-]+", "_", "".join(f"-{word}" for word in self.options.only))
        return self.options.root / f"{self.study.name}-{self.scale.name}{part}"


def _require_free(study: Study, overrides: Settings) -> None:
    for group, fields in overrides.items():
        for name in fields:
            if (full := f"{group}.{name}") in (*FIXED, *study.varies):
                raise InputError(f"{full} must be left to the study {study.name}, got {fields[name]!r}")


def plan_study(name: str, options: Options) -> dict[str, Task]:
    """The tasks of a study, those of later stages too where the earlier ones are finished; nothing is run."""
    session = Session(study_named(name), options)
    tasks: dict[str, Task] = {}
    for rows in session.stages():
        tasks = session.planner.tasks(rows)
        if any(task.state() != "finished" for task in tasks.values()):
            break
    return tasks


def run_study(name: str, options: Options, told: Told = lambda word, task: None) -> tuple[Path, dict[str, Any]]:
    """Train and measure what a study needs and is not there yet, then write `study.json` and its figures.

    Finished runs and measurements are reused, interrupted runs continued, failed ones reported and what needs them
    skipped. Returns the study's folder and the content of `study.json`. Raises `ValueError` for what cannot be run.
    """
    session = Session(study_named(name), options)
    for folder in (session.home, options.root / "logs"):
        require_plain(folder, itself=True)
    require_writable("--out", session.home)
    rows: list[PlannedRow] = []
    for number, rows in enumerate(session.stages()):
        if number == 0:
            _require_images(session.planner.tasks(rows))
        session.errors = run_tasks(
            session.planner.tasks(rows), session.errors, jobs=options.jobs, threads=options.threads,
            accelerator=options.accelerator, logs=options.root / "logs", told=told,
        )  # fmt: skip
    outcome = session.study.show(session.scale, Results.read(rows))
    return session.home, _write(session, rows, outcome)


def _require_images(tasks: Mapping[str, Task]) -> None:
    """Read the images that `tasks` need: a mistake shows before anything is made, and workers find them decoded.

    Raises `ValueError` for images that cannot be read.
    """
    from advmoe.training.run import load_data

    runs = [t.run if isinstance(t, PlannedMeasure) else t for t in tasks.values() if t.state() != "finished"]
    for config in {json.dumps(run.config["data"], sort_keys=True): run.config for run in runs}.values():
        load_data(Config.from_dict(config))


def _write(session: Session, rows: Sequence[PlannedRow], outcome: Outcome) -> dict[str, Any]:
    """Figures first, then `study.json`, which names them."""
    import torch

    from advmoe.training.manifest import describe

    home, options = session.home, session.options
    folder = home / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    size = of_size(rows)
    drawn, notes = [], [*outcome.notes, *_left_out(rows)]
    for figure in outcome.figures:
        if not figure.data:
            notes.append(f"Nothing was measured for the figure {figure.title!r}.")
            continue
        for suffix in ("svg", "png"):
            draw(figure, folder / f"{figure.id}.{suffix}")
        drawn.append({
            **{name: getattr(figure, name) for name in ("id", "title", "alt", "kind", "data", "options")},
            "caption": _with_size(figure.caption, size),
            "svg": f"figures/{figure.id}.svg", "png": f"figures/{figure.id}.png",
        })  # fmt: skip
    seconds = math.fsum(_seconds(task) or 0.0 for task in session.planner.tasks(rows).values())
    tables = [{**each, "caption": _with_size(each["caption"] or f"{each['title']}.", size)} for each in outcome.tables]
    shown = describe(name="", seed=0, device=torch.device("cpu"), devices=1, command=None)
    content = {
        "study": session.study.name, "title": session.study.title, "shows": session.study.shows,
        "scale": session.scale.name, "seeds": list(session.planner.seeds), "size": size, "tables": tables,
        "figures": drawn, "claims": list(outcome.claims), "notes": notes, "runs": _runs(session, rows),
        "settings": shared([row.row.run.settings for row in rows]),
        "command": shlex.join(options.command or ()) or None, "seconds": round(seconds, 1),
        "made_on": _made_on(session.planner.tasks(rows).values()),
        "shown_by": {name: shown[name] for name in ("versions", "git_commit")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_text(home / STUDY, json.dumps(content, indent=1) + "\n")
    return content


def _with_size(caption: str, size: str) -> str:
    """A caption that tells how large the study is: tables and figures are shown elsewhere, too."""
    return f"{caption} {size[:1].upper()}{size[1:]}.".strip() if size else caption


def _left_out(rows: Iterable[PlannedRow]) -> list[str]:
    """Which images the runs left out, each line once."""
    found = [note for row in rows for run in row.runs.values() for note in _noted(run).get("data_notes") or ()]
    return [f"Images: {note}" for note in dict.fromkeys(found)]


def _runs(session: Session, rows: Sequence[PlannedRow]) -> list[dict[str, Any]]:
    """What became of each run, those that others start from included."""
    tasks = session.planner.tasks(rows)
    found = []
    for run in (task for task in tasks.values() if isinstance(task, PlannedRun)):
        measures = [t for t in tasks.values() if isinstance(t, PlannedMeasure) and t.run.key == run.key]
        parts: list[Task] = [run, *measures]
        errors = [error for task in parts if (error := session.errors.get(task.id))]
        state = run.state()
        found.append({
            "name": run.name, "key": run.key, "seed": run.seed, "path": str(run.path), "seconds": _seconds(run),
            "status": "failed" if errors else state, "error": errors[0] if errors else None,
        })  # fmt: skip
    return found


def _made_on(tasks: Iterable[Task]) -> dict[str, list[Any]]:
    """What the runs and their measurements were made with, each thing once: they may come from several machines."""
    found: dict[str, dict[Any, None]] = {"cpu": {}, "device": {}, "threads": {}, "torch": {}, "git_commit": {}}
    for noted in map(_noted, tasks):
        for each in (noted, *noted.get("resumed", ())):
            known = {**each, "torch": (each.get("versions") or {}).get("torch")}
            for name, values in found.items():
                if known.get(name) is not None:
                    values[known[name]] = None
    return {name: list(values) for name, values in found.items()}


def _seconds(task: Task) -> float | None:
    """What a run or a measurement took, as was noted there when it was made."""
    seconds: float | None = _noted(task).get("wall_seconds" if isinstance(task, PlannedRun) else "seconds")
    return seconds


def _noted(task: Task) -> dict[str, Any]:
    """What a run or a measurement says of how it was made; nothing where it is not there."""
    try:
        return read_object(task.path / (MANIFEST if isinstance(task, PlannedRun) else DONE))
    except (OSError, ValueError):
        return {}

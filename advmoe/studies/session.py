"""A study, run: its rows are planned, trained and measured, and its results written.

Runs lie side by side under one folder, by key, so that studies share them. A study's own folder has `study.json` and
its figures.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from advmoe.config import Config, require
from advmoe.errors import InputError
from advmoe.files import require_writable
from advmoe.rundir import put_away, require_plain
from advmoe.studies.catalogue import study_named
from advmoe.studies.plan import PlannedMeasure, PlannedRow, PlannedRun, Planner, StudyTask, only
from advmoe.studies.results import Results
from advmoe.studies.rows import Row, Settings, TrainingRun
from advmoe.studies.scales import DataOrBackbone, Scale, scale_named, useless_for
from advmoe.studies.significance import MOST_SEEDS
from advmoe.studies.study import Study
from advmoe.studies.study_file import write_study_file
from advmoe.studies.task_pool import OnProgress, TaskWorkers, WorkOptions, run_tasks
from advmoe.tables import BACKBONES, DATASETS, Table
from advmoe.text import as_option

FIXED = (
    "model.kind", "model.name", "model.source", "model.to_moe", "data.name", "training.method", "training.seed",
    "training.init_from",
)  # fmt: skip
"""Fields that every study sets itself: what its rows are called by."""
STAND_IN: Mapping[str, Table[Any]] = {"data.name": DATASETS, "model.name": BACKBONES}
"""Those of them that take a plugin's name: it stands in for the study's own data sets, or backbones."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(WorkOptions):
    """How a study is run. Raises `ValueError`, which names the command's option, for a value that cannot be."""

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
    command: Sequence[str] | None = None
    """What the user typed, for the record."""

    def __post_init__(self) -> None:
        scale_named(self.scale)
        for name in ("seeds", "num_examples", "jobs", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, as_option(name), ">= 1", value)
        require((self.seeds or 1) <= MOST_SEEDS, "--seeds", f"<= {MOST_SEEDS}", self.seeds)
        require(self.root.is_dir() or not self.root.exists(), "--out", "a folder, or new", str(self.root))

    def workers(self) -> TaskWorkers:
        """The processes that do the tasks."""
        return self.workers_in(self.root / "logs")

    def sized(self) -> Scale:
        """The scale with what the user changed of it."""
        scale = scale_named(self.scale)
        scale = replace(
            scale, overrides=self.overrides, seeds=self.seeds or scale.seeds,
            datasets=_labelled(scale.datasets, "data.name", self.overrides),
            backbones=_labelled(scale.backbones, "model.name", self.overrides),
        )  # fmt: skip
        if (number := self.num_examples) is None:
            return scale
        return replace(scale, examples=number, autoattack=(*scale.autoattack[:2], number))


def _labelled(parts: Mapping[str, DataOrBackbone], field: str, overrides: Settings) -> Mapping[str, DataOrBackbone]:
    """A scale's data sets or backbones, called what stands in for them, of which the paper says nothing."""
    group, _, name = field.partition(".")
    if name not in overrides.get(group, {}):
        return parts
    label = STAND_IN[field].find(overrides[group][name]).label
    return {key: replace(part, label=label, paper=None) for key, part in parts.items()}


@dataclass
class Session:
    """A study at one size: what is planned so far, and what became of it."""

    study: Study
    options: StudyOptions
    scale: Scale = field(init=False)
    planner: Planner = field(init=False)
    errors: dict[str, str] = field(default_factory=dict)
    """Of tasks that failed, by id."""

    def __post_init__(self) -> None:
        _require_free(self.study, self.options.overrides)
        self.scale = self.options.sized()
        self.planner = Planner(self.options.root / "runs", range(self.scale.seeds))

    def stages(self) -> Iterator[list[PlannedRow]]:
        """The planned rows up to each stage; those of a later stage depend on the results of the ones before it.

        Raises `ValueError` for settings that cannot be, for another run in the place of one, and where `only` leaves
        no row.
        """
        rows: list[PlannedRow] = []
        for number, stage in enumerate(self.study.stages):
            stage_rows = _distinct(stage(self.scale, Results.read(rows)))
            wanted = only(stage_rows, self.options.only)
            unknown = [words for words in self.options.only if not only(stage_rows, [words])]
            # Rows that a later stage adds may be called so.
            if number == 0 and unknown and (not wanted or len(self.study.stages) == 1):
                names = "; ".join(row.run.name for row in stage_rows)
                raise InputError(f"--only must be words of a run's name ({names}), got {', '.join(unknown)}")
            if len(self.study.stages) == 1:  # else a later row may have a use for it
                _require_used(self.options.overrides, [row.run for row in stage_rows])
            rows = [*rows, *self.planner.rows(wanted)]
            for task in self.planner.tasks(rows).values():
                if isinstance(task, PlannedRun):
                    task.require_same()
            yield rows

    @property
    def home(self) -> Path:
        """The study's folder. A part of it, chosen by `only`, has one of its own and leaves this one alone."""
        part = re.sub(r"[^\w+.-]+", "_", "".join(f"-{word}" for word in self.options.only))
        return self.options.root / f"{self.study.name}-{self.scale.name}{part}"


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each name and measures: where one backbone stands in for several, their rows become one."""
    distinct: dict[tuple[str, ...], Row] = {}
    for row in rows:
        distinct.setdefault((row.run.name, *row.measures), row)
    return list(distinct.values())


def _require_used(overrides: Settings, runs: Sequence[TrainingRun]) -> None:
    """Refuse what the user sets of training and none of the runs, nor one that they start from, has a use for."""
    every = [each for run in runs for each in (run, *run.behind())]
    for name, value in overrides.get("training", {}).items():
        reasons = [useless_for(run.settings, name, value) for run in every]
        if (first := next(iter(reasons), None)) is not None and None not in reasons:
            raise first


def _require_free(study: Study, overrides: Settings) -> None:
    for group, fields in overrides.items():
        for name in fields:
            if (full := f"{group}.{name}") in STAND_IN and STAND_IN[full].added(fields[name]):
                continue
            if full in (*FIXED, *study.varies):
                raise InputError(f"{full} must be left to the study {study.name}, got {fields[name]!r}")


def plan_study(name: str, options: StudyOptions) -> dict[str, StudyTask]:
    """The tasks of a study, those of later stages too where the earlier ones are finished; nothing is run."""
    session = Session(study_named(name), options)
    tasks: dict[str, StudyTask] = {}
    for rows in session.stages():
        tasks = session.planner.tasks(rows)
        if any(task.state() != "finished" for task in tasks.values()):
            break
    return tasks


def put_away_runs(name: str, options: StudyOptions) -> list[tuple[PlannedRun, int]]:
    """Drop the weights of a finished study's runs, or of the part of it that `only` names; returns the runs, with the
    bytes that each freed. Other studies that share these runs can measure nothing more of them.

    Raises `ValueError` where tasks are left to do.
    """
    tasks = plan_study(name, options)
    left = sum(task.state() != "finished" for task in tasks.values())
    require(left == 0, "--put-away", "of a study, or a part of it by --only, with no task left to do", f"{left} left")
    runs = [task for task in tasks.values() if isinstance(task, PlannedRun)]
    return [(run, put_away(run.path)) for run in runs]


def run_study(
    name: str, options: StudyOptions, told: OnProgress[StudyTask] = lambda word, task: None
) -> tuple[Path, dict[str, Any]]:
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
        session.errors = run_tasks(session.planner.tasks(rows), session.errors, options.workers(), told)
    study, findings = session.study, session.study.show(session.scale, Results.read(rows))
    about = {
        "study": study.name, "title": study.title, "shows": study.shows, "scale": session.scale.name,
        "seeds": list(session.planner.seeds), "command": shlex.join(options.command or ()) or None,
    }  # fmt: skip
    tasks = session.planner.tasks(rows)
    return session.home, write_study_file(session.home, about, rows, tasks, session.errors, findings)


def _require_images(tasks: Mapping[str, StudyTask]) -> None:
    """Read the images that `tasks` need: a mistake shows before anything is trained, and workers get them decoded.

    Raises `ValueError` for images that cannot be read.
    """
    from advmoe.training.run import load_data

    runs = [t.run if isinstance(t, PlannedMeasure) else t for t in tasks.values() if t.state() != "finished"]
    for config in {json.dumps(run.config["data"], sort_keys=True): run.config for run in runs}.values():
        load_data(Config.from_dict(config))

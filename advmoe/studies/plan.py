"""From a study's rows to tasks: which runs, from which others, and what is measured on each. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advmoe.config import Config, merged
from advmoe.errors import InputError
from advmoe.files import read_object
from advmoe.rundir import CONFIG, DONE, MANIFEST, damaged, digest_at, is_put_away, put_away_digest, require_plain, stale
from advmoe.studies.keys import measure_key, run_key
from advmoe.studies.rows import Measure, Row, TrainingRun


@dataclass(frozen=True)
class PlannedRun:
    """A run of one seed, and where it lies."""

    key: str
    name: str
    seed: int
    config: dict[str, dict[str, Any]]
    path: Path
    start: PlannedRun | None
    """The run that it starts from."""
    teacher: PlannedRun | None = None
    """The run that it learns from."""

    @property
    def sources(self) -> tuple[PlannedRun, ...]:
        """The runs that it begins with: whom it starts from, and whom it learns from."""
        return tuple(each for each in (self.start, self.teacher) if each is not None)

    @property
    def lineage(self) -> tuple[PlannedRun, ...]:
        """The run, what it starts from, what that starts from, and so on."""
        return (self, *(() if self.start is None else self.start.lineage))

    @property
    def standard(self) -> bool:
        """Whether it is trained without attacks."""
        return bool(self.config["training"]["method"] == "standard")

    @property
    def id(self) -> str:
        """Its task's name."""
        return self.key

    @property
    def needs(self) -> tuple[str, ...]:
        """Tasks that come before."""
        return tuple(each.id for each in self.sources)

    def state(self) -> str:
        """`finished`, `interrupted` or `missing`."""
        try:
            finished = read_object(self.path / MANIFEST).get("finished") is not None
        except (OSError, ValueError):
            finished = False
        # A damaged one is continued from its best checkpoint.
        if finished and (is_put_away(self.path) or not damaged(self.path)):
            return "finished"
        return "interrupted" if self.path.exists() else "missing"

    def require_same(self) -> None:
        """Raise `ValueError` where another run lies there (trained with other defaults, say), or links do."""
        require_plain(self.path, itself=True)
        file = self.path / CONFIG
        if not file.is_file():
            return
        config = Config.load(file)
        config.data.root = self.config["data"]["root"]  # images that were moved are still the same
        if (key := run_key(config, *_keys(self.start, self.teacher))) != self.key:
            raise InputError(
                f"{self.path} must hold the run {self.key}, got {key} (with other defaults?): move it away"
            )


def _keys(start: PlannedRun | None, teacher: PlannedRun | None) -> tuple[str | None, str | None]:
    return None if start is None else start.key, None if teacher is None else teacher.key


@dataclass(frozen=True)
class PlannedMeasure:
    """A measurement on one run, and where its results lie."""

    run: PlannedRun
    kind: str
    options: dict[str, Any]
    against: PlannedRun | None
    key: str

    @property
    def id(self) -> str:
        """Its task's name."""
        return f"{self.run.key}/{self.key}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Tasks that come before."""
        return (self.run.key,) if self.against is None else (self.run.key, self.against.key)

    @property
    def path(self) -> Path:
        """The folder of its results."""
        return self.run.path / "measures" / self.key

    @property
    def result(self) -> Path:
        """The file that the function which measures writes."""
        names = {"evaluate": "evaluation", "sweep": "sweep", "dissect": "dissection"}
        return self.path / f"{names.get(self.kind, self.kind)}.json"

    @property
    def alone(self) -> bool:
        """Whether nothing else may run meanwhile, as for times."""
        return self.kind in ALONE

    def state(self) -> str:
        """`finished` or `missing`; one of other weights than the run has now is missing."""
        if not (self.path / DONE).is_file():
            return "missing"
        done = dict[str, Any]()
        with suppress(ValueError):  # a measurement that is there, though what it says of itself is damaged
            done = read_object(self.path / DONE)
        return "missing" if stale(done, digest_at(self.run.path) or put_away_digest(self.run.path)) else "finished"


ALONE = ("cost", "pace")
"""Measurements of time."""

StudyTask = PlannedRun | PlannedMeasure


def put_away_source(task: StudyTask) -> PlannedRun | None:
    """The first run that a task needs whose weights `--put-away` dropped."""
    needed = (task.run, task.against) if isinstance(task, PlannedMeasure) else task.sources
    return next((run for run in needed if run is not None and is_put_away(run.path)), None)


def kind_of(task: object) -> str:
    """What a task does: `train`, or what is measured."""
    return task.kind if isinstance(task, PlannedMeasure) else "train"


@dataclass(frozen=True)
class PlannedRow:
    """A row with its run and measurements for each seed."""

    row: Row
    runs: dict[int, PlannedRun]
    measures: dict[int, dict[str, PlannedMeasure]]


@dataclass
class Planner:
    """Resolves runs to configurations and keys."""

    root: Path
    """Where runs lie."""
    seeds: Sequence[int]
    _known: dict[tuple[TrainingRun, int], PlannedRun] = field(default_factory=dict)

    def run(self, run: TrainingRun, seed: int) -> PlannedRun:
        """The run of this seed. Raises `ValueError` for settings that cannot be."""
        known = self._known.get((run, seed))
        if known is not None:
            return known
        start, teacher = (None if each is None else self.run(each, seed) for each in (run.start, run.teacher))
        training = {"seed": seed, "init_from": start and str(start.path)}
        if teacher is not None:
            training["teacher"] = str(teacher.path)
        config = Config.from_dict(merged(run.settings, {"training": training}))
        key = run_key(config, *_keys(start, teacher))
        planned = PlannedRun(key, run.name, seed, config.to_dict(), self.root / key, start, teacher)
        self._known[run, seed] = planned
        return planned

    def measure(self, measure: Measure, on: PlannedRun) -> PlannedMeasure:
        """The measurement of a planned run."""
        against = None if measure.against is None else self.run(measure.against, on.seed)
        options = dict(measure.options)
        if measure.kind not in ALONE:  # a run's key leaves its attack out, a measurement's must not
            options["overrides"] = merged({"attack": on.config["attack"]}, options.get("overrides", {}))
        key = measure_key(measure.kind, options, None if against is None else against.key)
        return PlannedMeasure(on, measure.kind, options, against, key)

    def rows(self, rows: Iterable[Row]) -> list[PlannedRow]:
        """Every row, with a run and its measurements for each seed, those of time for the first alone."""
        planned = []
        for row in rows:
            runs = {seed: self.run(row.run, seed) for seed in self.seeds[: row.seeds]}
            measures = {
                seed: {
                    name: self.measure(each, run)
                    for name, each in row.measures.items()
                    if each.kind not in ALONE or seed == self.seeds[0]  # no time depends on the seed
                }
                for seed, run in runs.items()
            }
            planned.append(PlannedRow(row, runs, measures))
        return planned

    def tasks(self, rows: Iterable[PlannedRow]) -> dict[str, StudyTask]:
        """All tasks of `rows` and of the runs that they start from, each once and after those that it needs."""
        tasks: dict[str, StudyTask] = {}

        def add(run: PlannedRun) -> None:
            for source in run.sources:
                add(source)
            tasks.setdefault(run.id, run)

        for row in rows:
            for seed, run in row.runs.items():
                add(run)
                for measure in row.measures[seed].values():
                    if measure.against is not None:
                        add(measure.against)
                    tasks.setdefault(measure.id, measure)
        return tasks


def only(rows: Iterable[Row], wanted: Sequence[str]) -> list[Row]:
    """The rows whose run's name holds one of `wanted`, in any case; of `a+b` both. All where nothing is wanted."""

    def matches(name: str, words: str) -> bool:
        return all(word.strip().lower() in name.lower() for word in words.split("+"))

    return [row for row in rows if not wanted or any(matches(row.run.name, words) for words in wanted)]

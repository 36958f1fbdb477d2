"""The rows of a study, each a training run and what is measured on it.

Nothing here computes; imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Mapping[str, Any]]
"""Groups of fields, as `Config.from_dict` takes them."""
MeasureKind = Literal["evaluate", "sweep", "dissect", "pathways", "cost", "pace"]
ScaleName = Literal["smoke", "cpu", "paper"]


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A training run, whatever its seed."""

    name: str
    """Method, backbone and data, as tables and `--only` know it."""
    settings: Settings
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What tables and figures sort by: method, backbone, dataset, and whatever a study varies."""
    start: TrainingRun | None = None
    """The run that this one starts from (`training.init_from`), of the same seed."""
    teacher: TrainingRun | None = None
    """The run that this one learns from (`training.teacher`), of the same seed."""

    def behind(self) -> list[TrainingRun]:
        """The runs that this one starts and learns from, with theirs."""
        nearest = [each for each in (self.start, self.teacher) if each is not None]
        return [run for each in nearest for run in (each, *each.behind())]


@dataclass(frozen=True, eq=False)
class Measure:
    """Something measured on a finished run."""

    kind: MeasureKind
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the function that measures, ready for JSON; its result depends on them and the run alone."""
    against: TrainingRun | None = None
    """Of `pathways` and `pace`: the run that it is compared with, of the same seed."""


@dataclass(frozen=True, eq=False)
class Row:
    """A run of a study with its measurements, by the names that the study's results know them by."""

    run: TrainingRun
    measures: Mapping[str, Measure] = field(default_factory=dict)
    seeds: int | None = None
    """With how many of the study's seeds, the first ones; None for all."""

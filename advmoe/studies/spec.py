"""What a study is: a declaration of the runs it needs, of what is measured on each, and of what is made of the results.

Nothing here computes; imports no torch. Accuracies are fractions until a table or figure shows them in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from advmoe.studies.results import Results
    from advmoe.studies.scales import Scale

Settings = Mapping[str, Mapping[str, Any]]
"""Groups of fields, as `Config.from_dict` takes them."""
MeasureKind = Literal["evaluate", "sweep", "dissect", "pathways", "cost", "pace"]
ScaleName = Literal["smoke", "cpu", "paper"]


@dataclass(frozen=True, eq=False)
class Run:
    """A training run, whatever its seed."""

    name: str
    """Method, backbone and data, as tables and `--only` know it."""
    settings: Settings
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What tables and figures sort by: method, backbone, dataset, and whatever a study varies."""
    start: Run | None = None
    """The run that this one starts from (`training.init_from`), of the same seed."""


@dataclass(frozen=True, eq=False)
class Measure:
    """Something measured on a finished run."""

    kind: MeasureKind
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the function that measures, ready for JSON; its result depends on them and the run alone."""
    against: Run | None = None
    """Of `pathways` and `pace`: the run that it is compared with, of the same seed."""


@dataclass(frozen=True, eq=False)
class Row:
    """A run of a study with its measurements, by the names that the study's results know them by."""

    run: Run
    measures: Mapping[str, Measure] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture as data: `kind` names the function of `report.figures` that draws it."""

    id: str
    title: str
    kind: Literal["lines", "bars", "stacked", "histogram"]
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    """Axis labels, references, ...: the other arguments of that function."""
    caption: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a study makes of its results."""

    tables: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Figure] = ()
    claims: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


Stage = Callable[["Scale", "Results"], list[Row]]
"""The rows of one stage, given the results of the stages before; on the same results always the same rows."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or a figure of the paper, or a question beyond it."""

    name: str
    title: str
    shows: str
    """One sentence."""
    stages: tuple[Stage, ...]
    """Most studies have one. The rows of a later one depend on what the earlier ones found."""
    show: Callable[[Scale, Results], Outcome]
    """A pure function of the results."""
    varies: tuple[str, ...] = ()
    """Fields that no override may set, as they are what the study compares."""

"""What a study is: the rows that it needs, and the tables, figures and claims that it makes of their results.

Nothing here computes; imports no torch. Accuracies are fractions until a table or figure shows them in percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.report.pictures import Picture
from advmoe.studies.results import Results
from advmoe.studies.rows import Row
from advmoe.studies.scales import Scale


@dataclass(frozen=True, kw_only=True)
class StudyFindings:
    """What a study shows of its results."""

    tables: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Picture] = ()
    claims: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


Stage = Callable[[Scale, Results], list[Row]]
"""From a scale and the results of the stages before to the rows of this one: a pure function."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or a figure of the paper, or a question beyond it."""

    name: str
    title: str
    shows: str
    """One sentence."""
    stages: tuple[Stage, ...]
    """Most studies have one. The rows of a later one depend on the results of the earlier ones."""
    show: Callable[[Scale, Results], StudyFindings]
    """A pure function of the results."""
    varies: tuple[str, ...] = ()
    """Fields that no override may set, as they are what the study compares."""

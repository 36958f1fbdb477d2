"""The results of a study's runs, as its tables, figures and claims read them. Imports no torch.

Axes: `N` images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.documents import read_arrays
from advmoe.rundir import EXAMPLES, METRICS, SWEPT, Epochs, read_result
from advmoe.studies.plan import PlannedMeasure, PlannedRow, PlannedRun
from advmoe.studies.significance import mean_std

ImageOutcomes = dict[int, dict[int, bool]]
"""Per seed and position of an image in the test set, whether the model was right."""
ImageGains = dict[int, dict[int, int]]
"""The same, whether one model was right less whether another was."""


@dataclass(frozen=True)
class RunResults:
    """A finished run, and what was measured on it."""

    run: PlannedRun
    measures: Mapping[str, PlannedMeasure]

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return Epochs.read(self.run.path / METRICS, strict=True).lines

    def measurement(self, measure: str) -> dict[str, Any] | None:
        """The content of a measurement's JSON file; None where there is none."""
        planned = self._finished(measure)
        return None if planned is None else read_result(planned.result)

    def arrays(self, measure: str, file: str) -> dict[str, NDArray[Any]]:
        """The arrays of an .npz file of a measurement; none where it is not there."""
        planned = self._finished(measure)
        return {} if planned is None or not (path := planned.path / file).is_file() else read_arrays(path)

    def _finished(self, measure: str) -> PlannedMeasure | None:
        planned = self.measures.get(measure)
        return None if planned is None or planned.state() != "finished" else planned


RunNumber = Callable[[RunResults], float | None]
"""A number of a run; None where it was not measured."""


@dataclass(frozen=True)
class RowResults:
    """A row's finished runs, by seed."""

    name: str
    labels: Mapping[str, Any]
    by_seed: Mapping[int, RunResults]

    def values(self, value: RunNumber) -> dict[int, float]:
        """A number of each run that has it, by seed."""
        numbers = {seed: value(run) for seed, run in self.by_seed.items()}
        return {seed: number for seed, number in numbers.items() if number is not None}

    def mean(self, value: RunNumber) -> float | None:
        """A number's mean over seeds; None where no run has it."""
        numbers = self.values(value).values()
        return sum(numbers) / len(numbers) if numbers else None


@dataclass(frozen=True)
class Results:
    """The rows of a study, in its order."""

    rows: Sequence[RowResults] = ()

    @staticmethod
    def read(planned: Iterable[PlannedRow]) -> Results:
        """What is finished of the planned rows."""
        rows = []
        for row in planned:
            runs = {
                seed: RunResults(run, row.measures[seed]) for seed, run in row.runs.items() if run.state() == "finished"
            }
            rows.append(RowResults(row.row.run.name, row.row.run.labels, runs))
        return Results(rows)

    def select(self, **labels: Any) -> Results:
        """The rows with these labels."""
        return Results([row for row in self.rows if all(row.labels.get(name) == v for name, v in labels.items())])

    def one(self, **labels: Any) -> RowResults | None:
        """The first row with these labels; None where there is none."""
        return next(iter(self.select(**labels).rows), None)

    def distinct(self, label: str) -> list[Any]:
        """The values of a label, in the order of the rows."""
        return list(dict.fromkeys(row.labels[label] for row in self.rows if label in row.labels))

    def __iter__(self) -> Iterator[RowResults]:
        return iter(self.rows)


# Numbers of one run


def accuracy_under(attack: str, measure: str = "accuracy") -> RunNumber:
    """Robust accuracy under the attack whose full name matches the expression `attack`."""

    def value(run: RunResults) -> float | None:
        robust = (run.measurement(measure) or {}).get("robust_accuracy", {})
        return next((share for name, share in robust.items() if re.fullmatch(attack, name)), None)

    return value


def of_evaluation(name: str, measure: str = "accuracy") -> RunNumber:
    """`clean_accuracy`, `worst_case` or `masking_gap` of an evaluation."""
    return lambda run: (run.measurement(measure) or {}).get(name)


def of_cost(name: str) -> RunNumber:
    """`gmacs` or `ms_per_image` of a run's model, from `cost`; GMACs from the evaluation where there is no other."""

    def value(run: RunResults) -> float | None:
        cost = run.measurement("cost")
        if cost is None:
            evaluated: Mapping[str, Any] = (run.measurement("accuracy") or {}).get("cost", {})
            return evaluated.get("gmacs") if name == "gmacs" else None
        kind = next(iter(cost["models"]))
        number: float = cost["models"][kind][name] if name == "gmacs" else cost["batches"][-1][name][kind]
        return number

    return value


def pace_bounds(paced: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """Between what the ratio of `pace` lies in every round: the least of one's seconds by the most of the other's, and
    the other way; None where the seconds are not known.
    """
    seconds = list(((paced or {}).get("seconds") or {}).values())
    if not seconds:
        return None
    ours, theirs = seconds[0], seconds[-1]
    return ours["least"] / theirs["most"], ours["most"] / theirs["least"]


def seconds_per_epoch(run: RunResults) -> float | None:
    """The median over epochs, as the machine stood."""
    seconds = [line["seconds"] for line in run.epochs]
    return float(np.median(seconds)) if seconds else None


def best_validation(run: RunResults) -> float | None:
    """Robust accuracy on the validation split of the best epoch: of routed models, in the worst of two."""
    accuracies = [line["val"]["robust_accuracy"] for line in run.epochs if line["val"] is not None]
    return max(accuracies, default=None)


def of_pathways(*path: str) -> RunNumber:
    """A number of `pathways.json`, by the names that lead to it."""

    def value(run: RunResults) -> float | None:
        entry: Any = run.measurement("pathways")
        for name in path:
            entry = entry.get(name) if isinstance(entry, dict) else None
        return entry if isinstance(entry, int | float) else None

    return value


def swept(run: RunResults, curve: str) -> dict[float, float]:
    """Robust accuracy of a run's sweep by radius, in 1/255; `curve`: `pgd`, the first that was swept, or a name."""
    return {_in_255(point["eps"]): point["robust_accuracy"] for point in _swept_curve(run, curve)[1]}


def swept_outcomes(row: RowResults | None, curve: str, radius: float) -> ImageOutcomes | dict[int, float]:
    """Per seed, whether each image was still right at a radius of a sweep, in 1/255 (see `swept`); robust accuracy
    where not every seed's sweep has kept its images.
    """
    by_seed: ImageOutcomes = {}
    for seed, arrays in _arrays_by_seed(row, "sweep", SWEPT):
        name = _swept_curve(row.by_seed[seed], curve)[0] if row is not None else curve
        for key, right in arrays.items():
            attack, _, eps = key.rpartition("/")
            if attack == name and _in_255(float(eps)) == radius:
                by_seed[seed] = dict(zip(arrays["index"].tolist(), right.tolist(), strict=True))
    numbers = row.values(lambda run: swept(run, curve).get(radius)) if row is not None else {}
    return by_seed if by_seed.keys() == numbers.keys() else numbers


def _swept_curve(run: RunResults, curve: str) -> tuple[str, list[dict[str, Any]]]:
    """A sweep's curve: its attack's name, and its points."""
    curves = (run.measurement("sweep") or {}).get("curves") or {}
    name = next(iter(curves), curve) if curve == "pgd" else curve
    return name, curves[name]["points"] if curves else []


def _in_255(eps: float) -> float:
    return round(255 * eps, 4)


PGD = r"pgd-\d+"
"""The full name of plain PGD, whatever its steps."""


# Outcomes of every image


def outcomes(row: RowResults | None, attack: str | None, measure: str = "accuracy") -> ImageOutcomes:
    """Per seed, whether each image was classified right under `attack`, or in the worst case over all (None)."""
    by_seed: ImageOutcomes = {}
    for seed, arrays in _arrays_by_seed(row, measure, EXAMPLES):
        names = [name for name in arrays if name.startswith("robust/")]
        if attack is not None:
            names = [name for name in names if re.fullmatch(attack, name.removeprefix("robust/"))][:1]
        if names:
            right = np.logical_and.reduce([arrays["clean_correct"], *(arrays[name] for name in names)])
            by_seed[seed] = dict(zip(arrays["index"].tolist(), right.tolist(), strict=True))
    return by_seed


def clean_outcomes(row: RowResults | None, measure: str = "accuracy") -> ImageOutcomes:
    """Per seed, whether each image was classified right without an attack."""
    return {
        seed: dict(zip(arrays["index"].tolist(), arrays["clean_correct"].tolist(), strict=True))
        for seed, arrays in _arrays_by_seed(row, measure, EXAMPLES)
    }


def categories(
    row: RowResults | None,
    attacks: Sequence[str],
    wanted: Sequence[int],
    *,
    right: bool = False,
    measure: str = "dissection",
) -> ImageOutcomes:
    """Per seed, whether each image fell into one of the categories 1 to 4 of a dissection, in the worst case over
    `attacks`: what one of them changes has not survived. `right`: of images alone that are right without an attack.
    """
    by_seed: ImageOutcomes = {}
    for seed, arrays in _arrays_by_seed(row, measure, "dissection-examples.npz"):
        found = [next((arrays[name] for name in arrays if re.fullmatch(attack, name)), None) for attack in attacks]
        kept = [each for each in found if each is not None]
        if len(kept) < len(attacks) or (right and "clean_correct" not in arrays):
            continue
        lost = np.logical_or.reduce([np.isin(each, (3, 4)) for each in kept])
        changed = np.logical_or.reduce([np.isin(each, (2, 4)) for each in kept])
        fell = np.isin(1 + changed + 2 * lost, wanted)
        counted = np.flatnonzero(arrays["clean_correct"]) if right else np.arange(len(fell))
        by_seed[seed] = {int(image): bool(fell[image]) for image in counted}
    return by_seed


def unchanged_pathways(row: RowResults | None, measure: str = "pathways") -> ImageOutcomes:
    """Per seed, whether an attack left each image's pathway as it was."""
    return {
        seed: dict(zip(arrays["index"].tolist(), arrays["unchanged"].tolist(), strict=True))
        for seed, arrays in _arrays_by_seed(row, measure, "pathways-examples.npz")
    }


def _arrays_by_seed(row: RowResults | None, measure: str, file: str) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """The arrays of a measurement's file, of each seed that has it."""
    for seed, run in (row.by_seed if row is not None else {}).items():
        if arrays := run.arrays(measure, file):
            yield seed, arrays


# Cells


def cell(
    row: RowResults,
    value: RunNumber,
    factor: float = 1.0,
    paper: Mapping[str, float] | None = None,
    paper_name: str = "",
) -> dict[str, Any] | None:
    """A table's cell: mean and standard deviation over seeds, beside the paper's; None where nothing was measured."""
    numbers = [factor * number for number in row.values(value).values()]
    reported = {"paper": (paper or {}).get(paper_name), "paper_std": (paper or {}).get(f"{paper_name}_std")}
    if not numbers:
        return {"mean": None, "std": None, "n": 0, **reported} if reported["paper"] is not None else None
    mean, std = mean_std(numbers)
    return {"mean": mean, "std": std, "n": len(numbers), **reported}


def point(row: RowResults, value: RunNumber, x: float, factor: float = 100.0) -> dict[str, Any]:
    """A figure's point: the mean over seeds, and one standard deviation to each side."""
    numbers = [factor * number for number in row.values(value).values()]
    if not numbers:
        return {"x": x, "y": None, "low": None, "high": None}
    mean, std = mean_std(numbers)
    return {"x": x, "y": mean, "low": None if std is None else mean - std, "high": None if std is None else mean + std}

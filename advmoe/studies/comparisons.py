"""What several studies declare alike: measured rows, comparisons, the paper's ordering. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.report.pictures import Picture
from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.results import PGD, Results, RunNumber, outcomes, point
from advmoe.studies.rows import Measure, Row, TrainingRun
from advmoe.studies.scales import Scale
from advmoe.studies.tables import Quantity, table, with_heights

MEASURED: dict[str, str | None] = {"PGD": PGD, "worst case": None}
"""How a claim is judged: as the paper measures, and in the worst case over all attacks that were run."""
RA_LABEL = "robust accuracy under PGD (%)"


def named(labels: Mapping[str, Any]) -> str:
    """A row by its method and, where there are several, its variant."""
    return ", ".join(str(labels[name]) for name in ("method", "variant") if name in labels)


def measured(scale: Scale, run: TrainingRun, *, timed: bool = False, **more: Measure) -> Row:
    """A row whose accuracy is measured, and its cost where a table shows time."""
    return Row(run, {"accuracy": scale.accuracy(run), **({"cost": scale.cost()} if timed else {}), **more})


def compared(
    results: Results, more: str, less: str, attack: str | None, measure: str = "accuracy", **labels: Any
) -> Comparison:
    """The comparison that the method `more` is right more often than `less`, all else alike."""
    sides = [outcomes(results.one(method=name, **labels), attack, measure) for name in (more, less)]
    return Comparison(more, less, *sides)


def ordering(results: Results, where: str = "", *, strong: str = "AutoAttack", **labels: Any) -> dict[str, Any]:
    """The claim AT (MoE) < AT (S-Dense) < AdvMoE. `strong`: the name of the attack that stands for AutoAttack."""
    ways: dict[str, tuple[str | None, str]] = {name: (attack, "accuracy") for name, attack in MEASURED.items()}
    if any("autoattack" in run.measures for row in results for run in row.by_seed.values()):
        ways[strong] = ("autoattack.*", "autoattack")
    verdicts = [
        verdict(
            name,
            [
                compared(results, "AT (S-Dense)", "AT (MoE)", *way, **labels),
                compared(results, "AdvMoE", "AT (S-Dense)", *way, **labels),
            ],
        )
        for name, way in ways.items()
    ]
    return claim(f"ordering{where}", f"AT (MoE) < AT (S-Dense) < AdvMoE in robust accuracy{where}.", verdicts)


def orderings(results: Results, strong: str = "AutoAttack") -> list[dict[str, Any]]:
    """The claim of `ordering` for each data set and backbone."""
    claims = []
    for dataset in results.distinct("dataset"):
        for backbone in results.select(dataset=dataset).distinct("backbone"):
            claims.append(
                ordering(results, f", {backbone}, {dataset}", strong=strong, dataset=dataset, backbone=backbone)
            )
    return claims


def overview(title: str, results: Results, quantities: Sequence[Quantity], paper_table: str) -> dict[str, Any]:
    """A row for each data set, backbone and method, beside the paper's."""
    labels = ["dataset", "backbone", "method"]
    caption = "Mean and standard deviation over seeds; the paper's numbers are of its own settings."
    return table(title, results, labels, quantities, caption=caption, paper_table=paper_table)


def method_bars(id: str, title: str, results: Results, value: RunNumber, unit: str) -> Picture:
    """A group of bars for each backbone and data set, a bar for each method."""
    groups = {}
    for dataset in results.distinct("dataset"):
        for backbone in results.select(dataset=dataset).distinct("backbone"):
            rows = results.select(dataset=dataset, backbone=backbone)
            groups[f"{backbone}, {dataset}"] = {str(row.labels["method"]): point(row, value, 0) for row in rows}
    caption = "Mean over seeds, with one standard deviation to each side."
    return Picture("bars", id, title, with_heights(groups), {"ylabel": unit}, caption)


def scales_of(scale: Scale, **choices: Sequence[float]) -> list[tuple[float, dict[str, Any]]]:
    """Model scales with the settings that set them. Experts start independently at each, as overlapping ones must."""
    return [(r, {"model": {"scale": r, "experts_init": "independent"}}) for r in scale.pick(**choices)]

"""What several studies declare alike: measured rows, comparisons, the paper's ordering. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.report.pictures import Picture
from advmoe.studies.claims import MARGIN, Comparison, claim, verdict
from advmoe.studies.results import PGD, Results, RowResults, RunNumber, of_cost, of_evaluation, outcomes, point
from advmoe.studies.rows import Measure, Row, TrainingRun
from advmoe.studies.scales import Scale
from advmoe.studies.tables import Quantity, table, with_heights

MEASURED: dict[str, str | None] = {"PGD": PGD, "worst case": None}
"""How a claim is judged: as the paper measures, and in the worst case over all attacks that were run."""
RA_LABEL = "robust accuracy under PGD (%)"


def named(labels: Mapping[str, Any]) -> str:
    """A row by its method and, where there are several, its variant."""
    return ", ".join(str(labels[name]) for name in ("method", "variant") if name in labels)


def measured(
    scale: Scale, run: TrainingRun, *, timed: bool = False, seeds: int | None = None, experts: int = 1, **more: Measure
) -> Row:
    """A row whose accuracy is measured, and its cost where a table shows time, with all or the first `seeds`; `experts`
    as in `Scale.accuracy`.
    """
    accuracy = scale.accuracy(run, experts)
    return Row(run, {"accuracy": accuracy, **({"cost": scale.cost()} if timed else {}), **more}, seeds)


def under_autoattack(scale: Scale) -> Quantity:
    """Robust accuracy under what stands for AutoAttack at this scale."""
    return Quantity(
        "ra_aa", scale.autoattack[0], "higher", of_evaluation("worst_case", "autoattack"), 100, "ra_autoattack"
    )


def compared(
    results: Results, more: str, less: str, attack: str | None, measure: str = "accuracy", margin: float = 0.0
) -> Comparison:
    """The comparison that the method `more` is right more often than `less` (see `Comparison`)."""
    sides = [outcomes(results.one(method=name), attack, measure) for name in (more, less)]
    return Comparison(more, less, *sides, margin=margin)


def between(more: RowResults | None, less: RowResults | None, names: Sequence[str], attack: str | None) -> Comparison:
    """The comparison that the row `more` is right more often than `less`, called `names` in this order."""
    of_more, of_less = names
    return Comparison(of_more, of_less, outcomes(more, attack), outcomes(less, attack))


def numbered(more: str, less: str, rows: Sequence[RowResults | None], value: RunNumber, unit: str = "") -> Comparison:
    """The comparison that a number of the first of two `rows` exceeds the second's."""
    sides = [row.values(value) if row is not None else {} for row in rows]
    return Comparison(more, less, *sides, unit=unit)


def above(
    results: Results, pairs: Sequence[tuple[str, str]], *, strong: str = "AutoAttack", margin: float = 0.0
) -> list[dict[str, Any]]:
    """The verdicts of whether of each pair of methods the second is more robust, under all that was measured.

    Args:
        strong: the name of the attack that stands for AutoAttack. margin: of each comparison.
    """
    ways: dict[str, tuple[str | None, str]] = {way: (attack, "accuracy") for way, attack in MEASURED.items()}
    if any("autoattack" in run.measures for row in results for run in row.by_seed.values()):
        ways[strong] = ("autoattack.*", "autoattack")
    return [
        verdict(way, [compared(results, more, less, *how, margin) for less, more in pairs]) for way, how in ways.items()
    ]


def ordering(results: Results, where: str = "", strong: str = "AutoAttack") -> dict[str, Any]:
    """The claim AT (MoE) < AT (S-Dense) < AdvMoE. `strong`: the name of the attack that stands for AutoAttack."""
    pairs = [("AT (MoE)", "AT (S-Dense)"), ("AT (S-Dense)", "AdvMoE")]
    statement = f"AT (MoE) < AT (S-Dense) < AdvMoE in robust accuracy{where}."
    return claim(f"ordering{where}", statement, above(results, pairs, strong=strong))


def leads(results: Results, where: str = "", strong: str = "AutoAttack") -> list[dict[str, Any]]:
    """The claims that AdvMoE is above the baselines that `ordering` leaves out, above AT (Dense) and by how much."""
    baselines = [(name, "AdvMoE") for name in ("AT (S-Dense)", "AT (Sparse)", "AT (MoE)")]
    dense, others, more = [("AT (Dense)", "AdvMoE")], "AT (Sparse) and AT (MoE)", "AdvMoE is more robust than"
    claims = [
        ("above-other-baselines", f"{more} {others}", baselines[1:], 0.0),
        ("above-baselines-by-a-point", f"AdvMoE is a point or more above AT (S-Dense), {others}", baselines, -MARGIN),
        ("above-dense", f"{more} AT (Dense)", dense, 0.0),
        ("above-dense-by-a-point", "AdvMoE is a point or more above AT (Dense)", dense, -MARGIN),
    ]
    return [
        claim(
            f"{name}{where}", f"{statement}{where}.", above(results, pairs, strong=strong, margin=margin),
            "Zhang et al., ICCV 2023, sec. 5.2",
        )
        for name, statement, pairs, margin in claims
    ]  # fmt: skip


def saving(dense: float | None, ours: float | None) -> dict[str, Any]:
    """The verdict of whether `ours` costs less than half of `dense`, both in GMACs; undecided where one is None."""
    judgement, numbers = "undecided", {"AT (Dense)": dense, "AdvMoE": ours}
    if dense and ours is not None:
        judgement = "holds" if ours < dense / 2 else "does not hold"
        numbers["share saved"] = 1 - ours / dense
    test = "counted: the same for every seed"
    return {
        "measure": "GMACs", "verdict": judgement, "p_value": None, "test": test, "these_models": None,
        "numbers": numbers, "note": "",
    }  # fmt: skip


def half_the_cost(results: Results, where: str = "") -> dict[str, Any]:
    """The claim that AdvMoE saves more than half of AT (Dense)'s multiply-accumulates, routers included."""
    rows = [results.one(method=name) for name in ("AT (Dense)", "AdvMoE")]
    costs = [None if row is None else row.mean(of_cost("gmacs")) for row in rows]
    statement = f"AdvMoE saves more than half of AT (Dense)'s inference{where}."
    return claim(f"half-the-cost{where}", statement, [saving(*costs)], "Zhang et al., ICCV 2023, sec. 5.2")


def setups(results: Results) -> list[tuple[str, Results]]:
    """Each data set and backbone of a table: in words as a claim's name and statement end, and its rows."""
    return [
        (f", {backbone}, {dataset}", results.select(dataset=dataset, backbone=backbone))
        for dataset in results.distinct("dataset")
        for backbone in results.select(dataset=dataset).distinct("backbone")
    ]


def orderings(results: Results, strong: str = "AutoAttack") -> list[dict[str, Any]]:
    """The claim of `ordering` for each data set and backbone."""
    return [ordering(rows, where, strong) for where, rows in setups(results)]


def overview(title: str, results: Results, quantities: Sequence[Quantity], paper_table: str) -> dict[str, Any]:
    """A row for each data set, backbone and method, beside the paper's."""
    labels = ["dataset", "backbone", "method"]
    caption = "Mean and standard deviation over seeds; the paper's numbers are of its own settings."
    return table(title, results, labels, quantities, caption=caption, paper_table=paper_table)


def method_bars(id: str, title: str, results: Results, value: RunNumber, unit: str) -> Picture:
    """A group of bars for each backbone and data set, a bar for each method."""
    groups = {}
    for where, rows in setups(results):
        groups[where.removeprefix(", ")] = {str(row.labels["method"]): point(row, value, 0) for row in rows}
    caption = "Mean over seeds, with one standard deviation to each side."
    return Picture("bars", id, title, with_heights(groups), {"ylabel": unit}, caption)


def scales_of(scale: Scale, **choices: Sequence[float]) -> list[tuple[float, dict[str, Any]]]:
    """Model scales with the settings that set them. Experts start independently at each, as overlapping ones must."""
    return [(r, {"model": {"scale": r, "experts_init": "independent"}}) for r in scale.pick(**choices)]

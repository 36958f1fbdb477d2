"""AdvMoE at the price of AT: the study `efficiency`, beyond the paper. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advmoe.report.pictures import Picture
from advmoe.studies.claims import LEVEL, Comparison, claim, compare
from advmoe.studies.comparisons import MEASURED, measured, named
from advmoe.studies.results import Results, RunResults, outcomes, point
from advmoe.studies.rows import Row
from advmoe.studies.scales import Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import RA, SA, SECONDS, WORST, Quantity, table, with_points

PRICE = 1.3
"""The most that an epoch of the default may take, in epochs of AT (MoE)."""
LOST = 0.01
"""A variant that loses no more than this mean accuracy to the paper's AdvMoE counts as losing nothing, unless a test
shows a loss."""

VARIANTS = ("both", "shared-attack", "by-iteration", "every-2", "every-3", "every-4", "shared-every-2", "warm-start")
"""Values of `training.alternation`; the first is the paper's."""


def price(run: RunResults) -> float | None:
    """Seconds of an epoch in those of the run that it was timed against, in the same process."""
    return (run.measurement("pace") or {}).get("ratio")


RATIO = Quantity("ratio", "s/epoch, of AT (MoE)", "lower", price)


def _rows(scale: Scale, _: Results) -> list[Row]:
    base = scale.run("AT (MoE)")
    rows = [measured(scale, base, pace=scale.pace(base))]
    for variant in VARIANTS:
        more = {"training": {"alternation": variant}}
        run = scale.run("AdvMoE", more=more, variant=variant)
        rows.append(measured(scale, run, pace=scale.pace(base)))
    return rows


def _losses(results: Results, variant: str) -> dict[str, dict[str, Any]]:
    """What the paper's AdvMoE has over a variant, under each measure."""
    paper, ours = (results.one(method="AdvMoE", variant=name) for name in (VARIANTS[0], variant))
    return {
        name: compare(Comparison(VARIANTS[0], variant, outcomes(paper, attack), outcomes(ours, attack)))
        for name, attack in MEASURED.items()
    }


def loses_nothing(losses: dict[str, dict[str, Any]]) -> bool:
    """Whether, by each measure, no test shows a loss and the mean loss is at most `LOST`."""
    most = LOST + 1e-9  # a loss of just so many images must not fall to rounding
    return all(each["mean_more"] - each["mean_less"] <= most and each["p"] >= LEVEL for each in losses.values())


def _cheapest(prices: Mapping[str, float | None]) -> str:
    lossless = {variant: cost for variant, cost in prices.items() if cost is not None}
    if not prices:
        return "Too little data to say of any variant that it loses nothing."
    if not lossless:
        return "No variant loses nothing at this size: the paper's alternation stays the cheapest that does."
    variant = min(lossless, key=lambda name: lossless[name])
    return f"The cheapest variant that loses nothing at this size: {variant}, {lossless[variant]:.2f} of AT (MoE)."


def _show(scale: Scale, results: Results) -> StudyFindings:
    verdicts: list[dict[str, Any]] = []
    prices: dict[str, float | None] = {}  # of the variants that are decided; None for one that loses something
    for variant in VARIANTS[1:]:
        row = results.one(method="AdvMoE", variant=variant)
        if row is None:
            continue
        cost, losses = row.mean(price), _losses(results, variant)
        judgement = "undecided"
        if cost is not None and not any(each["test"].startswith("none") for each in losses.values()):
            sound = loses_nothing(losses)
            judgement = "holds" if sound and cost <= PRICE else "does not hold"
            prices[variant] = cost if sound else None
        verdicts.append({
            "measure": variant, "verdict": judgement, "p_value": None,
            "test": f"at most {PRICE} of AT (MoE)'s time; at most {100 * LOST:g} point lost on average and no loss "
            "significant at 5 %, under PGD and in the worst case",
            "numbers": {"price": cost, **losses}, "note": "Too little data." if judgement == "undecided" else "",
        })  # fmt: skip
    series = {
        named(row.labels): [point(row, WORST.value, cost)] for row in results if (cost := row.mean(price)) is not None
    }
    return StudyFindings(
        tables=[
            table("What each variant costs and gives", results, ["method", "variant"], [RATIO, SECONDS, RA, WORST, SA])
        ],
        figures=[
            Picture(
                "lines", "efficiency", "Worst-case accuracy against the price of training", with_points(series),
                {"xlabel": "seconds of an epoch, in those of AT (MoE)", "ylabel": "robust accuracy, worst case (%)"},
                "Mean over seeds, with one standard deviation to each side; times of both in one process.",
            )
        ],
        claims=[
            claim(
                "advmoe-at-the-price-of-at",
                f"A variant of Algorithm 1 costs at most {PRICE} of AT (MoE) and loses nothing to the paper's.",
                verdicts, source="beyond the paper: its sec. 6 leaves the doubled cost open",
            )
        ],
        notes=[_cheapest(prices)],
    )  # fmt: skip


EFFICIENCY = Study(
    name="efficiency", title="AdvMoE at the price of AT",
    shows="Seconds of an epoch, robust and worst-case accuracy of each way to alternate, against AT (MoE) and AdvMoE.",
    stages=(_rows,), show=_show, varies=("training.alternation",),
)  # fmt: skip

"""AdvMoE at the price of AT: the study `efficiency`, beyond the paper. Imports no torch."""

from __future__ import annotations

from typing import Any

from advmoe.studies.claims import Comparison, claim, compare
from advmoe.studies.present import RA, SA, SECONDS, WORST, Column, lines, table
from advmoe.studies.results import Found, Results, Trained, outcomes, point
from advmoe.studies.scales import Scale
from advmoe.studies.shared import MEASURED, measured
from advmoe.studies.spec import Outcome, Row, Study

PRICE = 1.3
"""The most that an epoch of the default may take, in epochs of AT (MoE)."""
LOST = 0.01
"""The mean accuracy that a variant may lose to the paper's AdvMoE and still be said to lose nothing, where no test
finds that it lost."""

VARIANTS = ("both", "shared-attack", "by-iteration", "every-2", "every-4", "warm-start")
"""Values of `training.alternation`; the first is the paper's."""


def price(run: Trained) -> float | None:
    """Seconds of an epoch in those of the run that it was timed against, in the same process."""
    return (run.found("pace") or {}).get("ratio")


RATIO = Column("ratio", "s/epoch, of AT (MoE)", "lower", price)


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
    """Whether no measure finds that the variant lost: neither a test nor more than `LOST` on average."""
    return all(
        "mean_more" in each and each["mean_more"] - each["mean_less"] <= LOST and each["p"] >= 0.05
        for each in losses.values()
    )


def _mean_price(row: Found | None) -> float | None:
    found = list(row.values(price).values()) if row is not None else []
    return sum(found) / len(found) if found else None


def _show(scale: Scale, results: Results) -> Outcome:
    verdicts, kept = [], []
    for variant in VARIANTS[1:]:
        row = results.one(method="AdvMoE", variant=variant)
        if row is None:
            continue
        cost, losses = _mean_price(row), _losses(results, variant)
        fits, sound = cost is not None and cost <= PRICE, loses_nothing(losses)
        if cost is not None and sound:
            kept.append((cost, variant))
        few = any(each["test"].startswith("none") for each in losses.values())
        said = "undecided" if few else "holds" if fits and sound else "does not hold"
        verdicts.append({
            "measure": variant, "verdict": said, "p_value": None,
            "test": f"at most {PRICE} of AT (MoE)'s time; at most {100 * LOST:g} point lost on average and no loss "
            "significant at 5 %, under PGD and in the worst case",
            "numbers": {"price": cost, **losses}, "note": "Too few seeds." if few else "",
        })  # fmt: skip
    cheapest = min(kept, default=None)
    notes = ["No variant loses nothing at this size: the paper's alternation stays the cheapest that does."]
    if cheapest is not None:
        notes = [f"The cheapest variant that loses nothing at this size: {cheapest[1]}, {cheapest[0]:.2f} of AT (MoE)."]
    series = {
        f"{row.labels['method']}{f', {v}' if (v := row.labels.get('variant')) else ''}": [
            {**point(row, column.value, 0), "x": _mean_price(row)}
        ]
        for column in (WORST,)
        for row in results
        if _mean_price(row) is not None
    }
    return Outcome(
        tables=[
            table("What each variant costs and gives", results, ["method", "variant"], [RATIO, SECONDS, RA, WORST, SA])
        ],
        figures=[
            lines(
                "efficiency", "Worst-case accuracy against the price of training", series,
                xlabel="seconds of an epoch, in those of AT (MoE)", ylabel="robust accuracy, worst case (%)",
                caption="Mean over seeds, with one standard deviation to each side; times of both in one process.",
            )
        ],
        claims=[
            claim(
                "advmoe-at-the-price-of-at",
                f"A variant of Algorithm 1 costs at most {PRICE} of AT (MoE) and loses nothing to the paper's.",
                verdicts, source="beyond the paper: its sec. 6 leaves the doubled cost open",
            )
        ],
        notes=notes,
    )  # fmt: skip


EFFICIENCY = Study(
    name="efficiency", title="AdvMoE at the price of AT",
    shows="Seconds of an epoch, robust and worst-case accuracy of each way to alternate, against AT (MoE) and AdvMoE.",
    stages=(_rows,), show=_show, varies=("training.alternation",),
)  # fmt: skip

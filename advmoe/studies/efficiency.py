"""AdvMoE at the price of AT: the study `efficiency`, beyond the paper. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.config import Config
from advmoe.report.pictures import Picture
from advmoe.studies.claims import MARGIN, Comparison, claim, verdict
from advmoe.studies.comparisons import MEASURED, measured, named
from advmoe.studies.results import Results, RowResults, RunNumber, RunResults, outcomes, pace_bounds, point
from advmoe.studies.rows import Row
from advmoe.studies.scales import Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import RA, SA, SECONDS, WORST, Quantity, table, with_points

PRICE = 1.3
"""The most that an epoch of the default may take, in epochs of AT (MoE)."""
TWICE = (1.5, 2.5)
"""What counts as roughly twice the time."""

VARIANTS = ("both", "shared-attack", "by-iteration", "every-2", "every-3", "every-4", "shared-every-2", "warm-start")
"""Values of `training.alternation`; the first is the paper's."""
DEFAULT = Config().training.alternation
S_DENSE = "AT (S-Dense)"


def price(run: RunResults) -> float | None:
    """Seconds of an epoch in those of the run that it was timed against, in the same process."""
    return (run.measurement("pace") or {}).get("ratio")


def _bound(side: int) -> RunNumber:
    """The least (0) or the most (1) that the ratio can be in a round."""

    def value(run: RunResults) -> float | None:
        bounds = pace_bounds(run.measurement("pace"))
        return None if bounds is None else bounds[side]

    return value


RATIO = Quantity("ratio", "s/epoch, of AT (MoE)", "lower", price)
LEAST = Quantity("ratio_least", "at least", None, _bound(0))
MOST = Quantity("ratio_most", "at most", None, _bound(1))


def _rows(scale: Scale, _: Results) -> list[Row]:
    base, plain = scale.run("AT (MoE)"), scale.run(S_DENSE)
    rows = [measured(scale, run, pace=scale.pace(base)) for run in (base, plain)]
    for variant in VARIANTS:
        more = {"training": {"alternation": variant}}
        run = scale.run("AdvMoE", more=more, variant=variant)
        rows.append(measured(scale, run, pace=scale.pace(base)))
    return rows


def _beside(results: Results, variant: str, other: RowResults | None, name: str) -> dict[str, Comparison]:
    """A variant beside `other`, called `name`, under each measure: that it is at most `MARGIN` below. Any variant will
    do, so that each counts as one of them all, the paper's among them where that is not `other`.
    """
    row, among = results.one(method="AdvMoE", variant=variant), len(VARIANTS) - (name == VARIANTS[0])
    return {
        measure: Comparison(variant, name, outcomes(row, attack), outcomes(other, attack), margin=MARGIN, among=among)
        for measure, attack in MEASURED.items()
    }


def _spread(row: RowResults) -> str:
    """A row's time in words."""
    cost, least, most = (row.mean(value) for value in (price, LEAST.value, MOST.value))
    if cost is None:
        return "no time measured"
    return f"{cost:.2f} of AT (MoE)" + (f", {least:.2f} to {most:.2f} over rounds" if least and most else "")


def _cheap(row: RowResults, measure: str, comparison: Comparison) -> dict[str, Any]:
    """Whether a variant is cheap and, over seeds, shown to lose nothing under a measure."""
    found = verdict(f"{comparison.more}, {measure}", [comparison], f"{_spread(row)}.")
    prices = {"price": row.mean(price), "price_least": row.mean(LEAST.value), "price_most": row.mean(MOST.value)}
    rule = f"at most {PRICE} of AT (MoE)'s time; non-inferiority with a margin of {100 * MARGIN:g} point"
    found |= cheap(prices) or {}
    return {**found, "test": f"{rule}, {found['test']}", "numbers": {**prices, **found["numbers"]}}


def cheap(numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a variant's times alone make of its verdict: it does not hold where every round takes more than `PRICE`, and
    is undecided where rounds lie to both sides; None where all take at most that.
    """
    middle = numbers.get("price")
    if middle is None:
        return {"verdict": "undecided", "p_value": None}
    bounds = [numbers.get(name) for name in ("price_least", "price_most")]
    least, most = (middle if bound is None else bound for bound in bounds)
    if least > PRICE:
        return {"verdict": "does not hold", "p_value": None}
    return {"verdict": "undecided", "p_value": None} if most > PRICE else None


def _note(results: Results, losses: Mapping[str, Sequence[str]]) -> str:
    """What follows for the default from the verdicts, under each measure, of whether each variant loses nothing."""
    rule = f"loses at most {100 * MARGIN:g} point to `{VARIANTS[0]}`"
    prices = dict[str, float]()
    for name in (name for name, each in losses.items() if set(each) == {"holds"}):
        row = results.one(method="AdvMoE", variant=name)
        if row is not None and (cost := row.mean(price)) is not None:
            prices[name] = cost
    if not prices:
        open_ = [name for name, each in losses.items() if "does not hold" not in each]
        apart = f"; not told apart from it: {', '.join(open_)}" if open_ else ""
        return f"No variant is shown over seeds to be one that {rule}{apart}. The default stays {DEFAULT}."
    best = min(prices, key=lambda name: prices[name])
    cheapest = f"{best}, {prices[best]:.2f} of AT (MoE)"
    return f"The cheapest variant that {rule} at this size: {cheapest}. Default: {DEFAULT}."


def _claims(results: Results) -> tuple[list[dict[str, Any]], str]:
    """The study's claims, and its note."""
    cheap, plain, losses = [], [], dict[str, list[str]]()
    paper, dense = results.one(method="AdvMoE", variant=VARIANTS[0]), results.one(method=S_DENSE)
    for variant in VARIANTS:
        row = results.one(method="AdvMoE", variant=variant)
        if row is None:
            continue
        for measure, each in _beside(results, variant, dense, S_DENSE).items():
            plain.append(verdict(f"{variant}, {measure}", [each]))
        if variant != VARIANTS[0]:
            beside = _beside(results, variant, paper, VARIANTS[0])
            losses[variant] = [verdict(measure, [each])["verdict"] for measure, each in beside.items()]
            cheap += [_cheap(row, measure, each) for measure, each in beside.items()]
    paper_time = twice(None) if paper is None else twice(paper.mean(price), f"{_spread(paper)}.")
    source = "beyond the paper: its sec. 6 leaves the doubled cost open"
    claims = [
        claim(
            "advmoe-at-the-price-of-at",
            f"A variant of Algorithm 1 costs at most {PRICE} of AT (MoE) and loses nothing to the paper's.",
            cheap, source=source,
        ),
        claim(
            "no-worse-than-s-dense",
            f"A way to alternate is at most {100 * MARGIN:g} point below AT (S-Dense).", plain, source=source,
        ),
        claim(
            "twice-the-time", "AdvMoE takes roughly twice the time of AT (MoE).", [paper_time],
            "Zhang et al., ICCV 2023, sec. 6",
        ),
    ]  # fmt: skip
    return claims, _note(results, losses)


def twice(cost: float | None, note: str = "") -> dict[str, Any]:
    """The verdict of whether `cost`, an epoch's time in those of AT (MoE), is roughly twice; undecided of None."""
    judgement = "undecided" if cost is None else "holds" if TWICE[0] <= cost <= TWICE[1] else "does not hold"
    return {
        "measure": "time", "verdict": judgement, "p_value": None, "these_models": None,
        "test": f"median over rounds in one process, from {TWICE[0]} to {TWICE[1]}", "numbers": {"price": cost},
        "note": note,
    }  # fmt: skip


def _show(scale: Scale, results: Results) -> StudyFindings:
    claims, note = _claims(results)
    series = {
        named(row.labels): [point(row, WORST.value, cost)] for row in results if (cost := row.mean(price)) is not None
    }
    quantities = [RATIO, LEAST, MOST, SECONDS, RA, WORST, SA]
    return StudyFindings(
        tables=[table("What each variant costs and gives", results, ["method", "variant"], quantities)],
        figures=[
            Picture(
                "lines", "efficiency", "Worst-case accuracy against the price of training", with_points(series),
                {"xlabel": "seconds of an epoch, in those of AT (MoE)", "ylabel": "robust accuracy, worst case (%)"},
                "Mean over seeds, with one standard deviation to each side; times of both in one process.",
            )
        ],
        claims=claims,
        notes=[note],
    )  # fmt: skip


EFFICIENCY = Study(
    name="efficiency", title="AdvMoE at the price of AT",
    shows="Seconds of an epoch, robust and worst-case accuracy of each way to alternate, beside AT (MoE), AT (S-Dense)"
    " and the paper's.",
    stages=(_rows,), show=_show, varies=("training.alternation",),
)  # fmt: skip

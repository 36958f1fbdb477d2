"""Figure 1b of the paper: every kind of network trained without attacks and with. Imports no torch."""

from __future__ import annotations

from advmoe.studies.claims import MARGIN, SOURCE, Comparison, claim, verdict
from advmoe.studies.comparisons import RA_LABEL, above, measured, method_bars, ordering
from advmoe.studies.results import Results, clean_outcomes
from advmoe.studies.rows import Row
from advmoe.studies.scales import COMPARED, Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import GMACS, RA, SA, WORST, table

KINDS = ("Dense", "S-Dense", "Sparse", "MoE")
"""Of network: each is trained as `standard KIND` and as `AT (KIND)`."""


def _rows(scale: Scale, _: Results) -> list[Row]:
    return [measured(scale, scale.run(method)) for method in (*(f"standard {kind}" for kind in KINDS), *COMPARED)]


def _show(scale: Scale, results: Results) -> StudyFindings:
    source = SOURCE.replace("sec. 4", "fig. 1b")
    names = "standard MoE", "standard S-Dense"
    moe, dense = (clean_outcomes(results.one(method=name)) for name in names)
    claims = [
        *(
            claim(
                f"at-makes-robust, {kind}", f"AT makes {kind} more robust than standard training.",
                above(results, [(f"standard {kind}", f"AT ({kind})")]), source,
            )
            for kind in KINDS
        ),
        claim(
            "s-dense-is-the-lower-bound",
            "Trained without attacks, MoE is at most a point below S-Dense in clean accuracy.",
            [verdict("clean", [Comparison(*names, moe, dense, margin=MARGIN)])], SOURCE.replace("sec. 4", "sec. 3"),
        ),
        ordering(results),
        claim(
            "above-dense", "AdvMoE is more robust than AT (Dense).", above(results, [("AT (Dense)", "AdvMoE")]), source
        ),
    ]  # fmt: skip
    return StudyFindings(
        tables=[table("Standard and robust training", results, ["method"], [SA, RA, WORST, GMACS])],
        figures=[
            method_bars("fig1b-sa", "Clean accuracy", results, SA.value, "accuracy (%)"),
            method_bars("fig1b-ra", "Robust accuracy: PGD", results, RA.value, RA_LABEL),
        ],
        claims=claims,
    )


FIG1B = Study(
    name="fig1b", title="Figure 1b: standard and robust training",
    shows="Clean and robust accuracy of Dense, S-Dense, Sparse and MoE trained without attacks, by AT, and by AdvMoE.",
    stages=(_rows,), show=_show,
)  # fmt: skip

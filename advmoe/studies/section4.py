"""Section 4 of the paper: routers and experts robustified one after the other (figs. 3 to 5). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from advmoe.report.pictures import Picture
from advmoe.report.words import CATEGORIES
from advmoe.studies import paper
from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.comparisons import MEASURED, RA_LABEL, above, compared, measured, scales_of
from advmoe.studies.results import PGD, Results, categories
from advmoe.studies.rows import Row
from advmoe.studies.scales import Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import RA, SA, WORST, by_method, table, with_points

THETA, THETA2, M1, M2, M3 = (
    "router-robustified MoE", "router-robustified MoE, then its experts", "standard MoE", "AT (S-Dense)",
    "robust mask of standard Dense",
)  # fmt: skip
"""Methods by the paper's symbols: theta-bar, theta-double-bar, and what fig. 3 compares them with."""


STATISTICS = ("refresh", "keep")
"""What `training.frozen_norms` is in turn; what is not said to be of either is of the first."""
DISSECTED = (((PGD,), "PGD"), ((PGD, f"{PGD}-soft"), "PGD and PGD through soft routing, the worse of the two"))
"""What is dissected under each of `MEASURED`: attacks, and their name."""
ROBUST_FROM = 0.03
"""Robust accuracy at which a standard model begins to be robust by itself."""
BY_ITSELF = "robust accuracy of the standard model"
"""The name of that, among the numbers of verdicts that compare with it."""


def too_short(judged: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a verdict on a standard model that is robust by itself: nothing is decided."""
    these = judged["these_models"]
    return {"verdict": "undecided", "p_value": None, "these_models": these and {**these, "verdict": "undecided"}}


def _against_standard(rows: Results, measure: str, comparisons: Sequence[Comparison], note: str = "") -> dict[str, Any]:
    """A verdict on comparisons of which some are with the standard MoE, where this is the paper's: at 0, or nearly."""
    found, standard = verdict(measure, comparisons, note), rows.one(method=M1)
    by_itself = None if standard is None else standard.mean(RA.value)
    if by_itself is None:
        return found
    found["numbers"][BY_ITSELF] = by_itself
    return found if by_itself < ROBUST_FROM else {**found, **too_short(found)}


def _conventions(results: Results) -> list[tuple[str, str, Results]]:
    """Under each choice of statistics: what ends a claim's name, and its statement, and the rows, those without a part
    that stays fixed among them.
    """
    ends = {"keep": ("-keep", " Here statistics are kept as they came.")}
    return [
        (
            *ends.get(choice, ("", "")),
            Results([row for row in results if row.labels.get("statistics", choice) == choice]),
        )
        for choice in results.distinct("statistics") or STATISTICS[:1]
    ]


def _shown(results: Results) -> Results:
    """The rows, whose methods say what their statistics are."""
    rows = []
    for row in results:
        method, statistics = row.labels["method"], row.labels.get("statistics")
        name = method if statistics is None else f"{method} ({statistics})"
        rows.append(replace(row, labels={**row.labels, "method": name}))
    return Results(rows)


def _notes(results: Results) -> list[str]:
    """That the standard MoE is not the one of the paper, where it is robust by itself."""
    robust = [
        (row.name, share)
        for row in results.select(method=M1)
        if (share := row.mean(RA.value)) is not None and share >= ROBUST_FROM
    ]
    return [
        f"{name}: {100 * share:.3g}% robust under PGD by itself, so trained too short for these comparisons (the "
        f"paper's is at 0); under {100 * ROBUST_FROM:g}% it is trained long enough (--training.epochs)."
        for name, share in robust
    ]


def _fig3_rows(scale: Scale, _: Results) -> list[Row]:
    choices = scales_of(scale, smoke=(0.5, 0.8), cpu=(0.2, 0.5, 0.8), paper=(0.2, 0.5, 0.8))
    fixed = [
        measured(scale, scale.run(m, more=more, statistics=choice, scale=r))
        for choice in STATISTICS
        for r, more in choices
        for m in (THETA, M3)
    ]
    return fixed + [measured(scale, scale.run(m, more=more, scale=r)) for r, more in choices for m in (M1, M2)]


def _fig3_show(scale: Scale, results: Results) -> StudyFindings:
    reported = paper.figure(3)
    names = {
        THETA: "router_robustified_moe", M1: "standard_moe_M1", M2: "at_s_dense_M2", M3: "sparse_mask_M3",
    }  # fmt: skip

    def verdicts(rows: Results) -> list[dict[str, Any]]:
        return [
            _against_standard(
                rows.select(scale=0.5), name, [compared(rows, THETA, M1, attack), compared(rows, M2, THETA, attack)]
            )
            for name, attack in MEASURED.items()
        ]

    statement = (
        "Robustifying routers improves robustness over the standard MoE, but not as far as AT (S-Dense), at r = 0.5."
    )
    masked = "Robustifying routers makes more robust than a robust mask of the standard Dense network, at r = 0.5."
    shown = table("By model scale", _shown(results), ["scale", "method"], [RA, WORST, SA])
    percents = ", ".join(f"{method} {reported[name]:g}" for method, name in names.items())
    caption = f"Mean over seeds. The paper, percent at r = 0.5: {percents}."
    return StudyFindings(
        tables=[shown],
        figures=[
            Picture(
                "lines",
                "fig3",
                "Routers robustified alone",
                with_points(by_method(_shown(results), "scale", RA.value)),
                {"xlabel": "model scale r", "ylabel": RA_LABEL},
                caption,
            )
        ],
        claims=[
            *(
                claim(f"insight-1{end}", statement + words, verdicts(rows))
                for end, words, rows in _conventions(results)
            ),
            *(
                claim(f"above-the-mask{end}", masked + words, above(rows.select(scale=0.5), [(M3, THETA)]))
                for end, words, rows in _conventions(results)
            ),
        ],
        notes=_notes(results),
    )


def _dissections(results: Results, title: str, id: str, caption: str) -> tuple[dict[str, Any], Picture]:
    """The table and the bars of dissected rows: shares of all images, mean over seeds."""
    rows: list[dict[str, Any]] = []
    shares: dict[str, dict[str, float]] = {}
    for row in _shown(results):
        dissections = [each for run in row.by_seed.values() if (each := run.measurement("dissection")) is not None]
        for attack in dict.fromkeys(name for each in dissections for name in each):
            by_run = [each[attack]["categories"] for each in dissections]
            used = [
                each[attack]["distinct_pathways"]["clean"]
                for each in dissections
                if "distinct_pathways" in each[attack]
            ]
            mean = {part: sum(each[part] for each in by_run) / len(by_run) for part in CATEGORIES}
            name = f"{row.labels['method']}: {attack}"
            shares[name] = {title: mean[part] for part, title in CATEGORIES.items()}
            rows.append({
                "method": row.labels["method"], "attack": attack, "n": len(by_run),
                **{part: 100 * share for part, share in mean.items()},
                "model": 100 * (mean["both_survive"] + mean["only_routing_fails"]),
                "routers": 100 * (mean["both_survive"] + mean["only_prediction_fails"]),
                "pathways": sum(used) / len(used) if used else None,
            })  # fmt: skip
    heads = {"method": "Method", "attack": "Attack", "n": "Seeds", **{k: f"{v} %" for k, v in CATEGORIES.items()}}
    heads |= {"model": "model robust (1 + 2) %", "routers": "routers robust (1 + 3) %", "pathways": "pathways in use"}
    better = {"model": "higher", "routers": "higher"}
    columns = [{"key": key, "title": head, "better": better.get(key)} for key, head in heads.items()]
    shown = {"title": title, "caption": caption, "columns": columns, "rows": rows}
    return shown, Picture("stacked", id, title, shares, {"xlabel": "share of all test images (%)"}, caption)


def _dissected(scale: Scale, *methods: str) -> list[Row]:
    runs = [scale.run(method, statistics=choice) for choice in STATISTICS for method in methods]
    return [measured(scale, run, dissection=scale.dissect()) for run in runs]


def _fig4_rows(scale: Scale, _: Results) -> list[Row]:
    return [*_dissected(scale, THETA), measured(scale, scale.run(M1))]


def _fig4_show(scale: Scale, results: Results) -> StudyFindings:
    reported = paper.figure(4)
    caption = (
        f"The paper (r = 0.5, percent): category 1 {reported['unsuccessful_on_both_1']:g}, "
        f"1 + 3 {reported['unsuccessful_on_routers_1_plus_3']:g}. Every test image is attacked."
    )
    shown, figure = _dissections(results, "What fails where routers alone are robust", "fig4", caption)

    def verdicts(rows: Results) -> list[dict[str, Any]]:
        theta = rows.one(method=THETA)
        return [
            _against_standard(
                rows,
                name,
                [
                    Comparison(
                        "3 only prediction fails, of images right clean",
                        "1 both survive",
                        *(categories(theta, dissected, [k], right=True) for k in (3, 1)),
                    ),
                    compared(rows, THETA, M1, attack),
                ],
                f"The categories are those of images that are right without an attack, under {title}.",
            )
            for (name, attack), (dissected, title) in zip(MEASURED.items(), DISSECTED, strict=True)
        ]

    statement = (
        "Of the attacks that routers withstand more than half fool the prediction (category 3 > 1), though robust "
        "routers help (more robust than the standard MoE)."
    )
    return StudyFindings(
        tables=[shown, table("Accuracy", _shown(results), ["method"], [RA, WORST, SA])], figures=[figure],
        claims=[
            claim(f"insight-2{end}", statement + words, verdicts(rows)) for end, words, rows in _conventions(results)
        ],
        notes=_notes(results),
    )  # fmt: skip


def _fig5_rows(scale: Scale, _: Results) -> list[Row]:
    return _dissected(scale, THETA, THETA2)


def _fig5_show(scale: Scale, results: Results) -> StudyFindings:
    caption = "Before and after the experts are robustified too. Every test image is attacked."
    shown, figure = _dissections(results, "What fails once experts are robustified after routers", "fig5", caption)

    def verdicts(rows: Results) -> list[dict[str, Any]]:
        first, second = rows.one(method=THETA), rows.one(method=THETA2)
        judged = []
        for (name, attack), (dissected, title) in zip(MEASURED.items(), DISSECTED, strict=True):
            routers = Comparison(
                "routers robust before",
                "routers robust after",
                *(categories(row, dissected, [1, 3]) for row in (first, second)),
            )
            note = f"The routers' robustness is that under {title}."
            judged.append(verdict(name, [compared(rows, THETA2, THETA, attack), routers], note))
        return judged

    statement = (
        "Robustifying experts after routers makes the model more robust, while the routers' robustness drops: the two "
        "do not adapt to each other."
    )
    return StudyFindings(
        tables=[shown, table("Accuracy", _shown(results), ["method"], [RA, WORST, SA])], figures=[figure],
        claims=[
            claim(f"insight-3{end}", statement + words, verdicts(rows)) for end, words, rows in _conventions(results)
        ],
    )  # fmt: skip


FIG3 = Study(
    name="fig3", title="Figure 3: routers robustified alone",
    shows="The standard MoE with routers trained robustly, against the standard MoE (M1), AT (S-Dense) (M2) and a "
    "robust mask (M3), over model scales.",
    stages=(_fig3_rows,), show=_fig3_show, varies=("model.scale", "training.finetune_epochs", "training.frozen_norms"),
)  # fmt: skip
FIG4 = Study(
    name="fig4", title="Figure 4: what fails where routers alone are robust",
    shows="Attacks on the router-robustified model, dissected into the four categories.",
    stages=(_fig4_rows,), show=_fig4_show, varies=("training.frozen_norms",),
)  # fmt: skip
FIG5 = Study(
    name="fig5", title="Figure 5: what fails once experts are robustified after routers",
    shows="The dissection before and after the experts are trained robustly too.",
    stages=(_fig5_rows,), show=_fig5_show, varies=("training.frozen_norms",),
)  # fmt: skip

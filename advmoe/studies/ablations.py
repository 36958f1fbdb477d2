"""The paper's ablations: attack steps in training, and convergence. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from advmoe.config import Config
from advmoe.report.pictures import Picture
from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.comparisons import measured, ordering
from advmoe.studies.results import Results, RunNumber, RunResults, best_validation
from advmoe.studies.rows import Row
from advmoe.studies.scales import Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import RA, SA, SECONDS, WORST, Quantity, by_method, mean_series, table, with_points


def _attack_steps_rows(scale: Scale, _: Results) -> list[Row]:
    rows = []
    for steps in (1, 2, 5, 10):
        for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE"):
            plain = scale.run(method)
            # The step shrinks as steps are added, so that all can go as far.
            size, usual = 1.25 * scale.eps(plain) / steps, Config.from_dict(plain.settings).training.step_size
            step = usual if math.isclose(size, usual) else size  # one number, so that the runs of other studies serve
            more = {"training": {"attack_steps": steps, "step_size": step}}
            rows.append(measured(scale, scale.run(method, more=more, K=steps)))
    return rows


def _attack_steps_show(scale: Scale, results: Results) -> StudyFindings:
    caption = "Mean over seeds. The steps of an attack of K go 1.25 times the radius in all."
    figures = [
        Picture(
            "lines", f"attack-steps-{id}", f"Training with K attack steps: {title}",
            with_points(by_method(results, "K", quantity.value)),
            {"xlabel": "attack steps K in training", "ylabel": f"robust accuracy, {title} (%)"}, caption,
        )
        for quantity, id, title in ((RA, "ra", "PGD"), (WORST, "worst", "worst case"))
    ]  # fmt: skip
    claims = [ordering(results.select(K=steps), f", K = {steps}") for steps in results.distinct("K")]
    return StudyFindings(
        tables=[table("Attack steps in training", results, ["K", "method"], [RA, WORST, SA])], figures=figures,
        claims=claims,
    )  # fmt: skip


def _convergence_rows(scale: Scale, _: Results) -> list[Row]:
    return [Row(scale.run(method)) for method in _LEVELS]


def _trades(part: str) -> Callable[[RunResults], list[float | None]]:
    """TRADES' loss of a level in each epoch."""

    def of(run: RunResults) -> list[float | None]:
        losses = [line["train"].get(part) for line in run.epochs]
        return [None if each is None else each["ce"] + each.get("kl", 0.0) for each in losses]

    return of


def _loss(part: str, epoch: int) -> RunNumber:
    """TRADES' loss of a level in the first (0) or the last (-1) of the epochs that have it."""

    def value(run: RunResults) -> float | None:
        known = [loss for loss in _trades(part)(run) if loss is not None]
        return known[epoch] if known else None

    return value


def _converges(results: Results) -> dict[str, Any]:
    """The claim that the loss of both of AdvMoE's levels falls."""
    row, verdicts = results.one(method="AdvMoE"), []
    for part in _LEVELS["AdvMoE"]:
        ends = [row.values(_loss(part, epoch)) if row is not None else {} for epoch in (0, -1)]
        verdicts.append(verdict(part, [Comparison("first epoch", "last epoch", *ends, unit="loss")]))
    statement = "The training losses of AdvMoE's two levels fall from the first epoch to the last."
    return claim("converges", statement, verdicts, "Zhang et al., ICCV 2023, sec. 4, app. C")


def _validated(run: RunResults) -> list[float | None]:
    return [None if line["val"] is None else line["val"]["robust_accuracy"] for line in run.epochs]


def _accurate(part: str) -> Callable[[RunResults], list[float | None]]:
    def of(run: RunResults) -> list[float | None]:
        return [(line["train"].get(part) or {}).get("accuracy") for line in run.epochs]

    return of


def _convergence_show(scale: Scale, results: Results) -> StudyFindings:
    losses: dict[str, list[dict[str, Any]]] = {}
    accuracies: dict[str, list[dict[str, Any]]] = {}
    validation: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        method = str(row.labels["method"])
        for part in _LEVELS[method]:
            name = f"{method}: {part}" if len(_LEVELS[method]) > 1 else method
            losses[name] = mean_series([row], _trades(part))
            accuracies[name] = mean_series([row], _accurate(part), 100)
        validation[method] = mean_series([row], _validated, 100)
    caption = "Mean over seeds; the range over seeds where there are several."
    drawn = [
        ("loss", "TRADES' loss of each level", losses, "training loss"),
        ("accuracy", "Clean accuracy in training, of each level", accuracies, "training accuracy (%)"),
        ("validation", "Robust accuracy on the validation split", validation, "robust accuracy (%)"),
    ]
    figures = [
        Picture("lines", f"convergence-{id}", title, with_points(series), {"xlabel": "epoch", "ylabel": unit}, caption)
        for id, title, series, unit in drawn
    ]
    validated = Quantity("val", "best validation RA %", "higher", best_validation, 100)
    shown = table("After training", results, ["method"], [validated, SECONDS])
    return StudyFindings(tables=[shown], figures=figures, claims=[_converges(results)])


_LEVELS = {"AdvMoE": ("routers", "experts"), "AT (MoE)": ("all",)}
"""What each method's levels are called in `metrics.jsonl`."""

ATTACK_STEPS = Study(
    name="attack-steps", title="Attack steps in training",
    shows="Robust accuracy of AT (S-Dense), AT (MoE) and AdvMoE trained with attacks of K = 1, 2, 5 and 10 steps.",
    stages=(_attack_steps_rows,), show=_attack_steps_show, varies=("training.attack_steps", "training.step_size"),
)  # fmt: skip
CONVERGENCE = Study(
    name="convergence", title="Convergence of the two levels",
    shows="Losses and accuracies of both levels of AdvMoE, and robust validation accuracy, epoch by epoch.",
    stages=(_convergence_rows,), show=_convergence_show,
)  # fmt: skip

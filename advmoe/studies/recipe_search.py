"""Robust when the attacker sees the routing: the study `recipes`, beyond the paper. Imports no torch.

First every change alone, then the best ones together. Which are best is decided on validation images alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.config import Config, merged
from advmoe.report.pictures import Picture
from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.comparisons import MEASURED, measured, named
from advmoe.studies.results import Results, RowResults, best_validation, outcomes, point
from advmoe.studies.rows import Row, Settings, TrainingRun
from advmoe.studies.scales import Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import GAP, RA, SA, VALIDATED, WORST, table, with_heights


@dataclass(frozen=True)
class Change:
    """One change to AdvMoE's training."""

    of: str
    """What is changed; of changes to the same thing one at most is combined."""
    settings: Settings
    plain: bool = False
    """Whether a plain model can be trained so too: then the baseline gets it as well."""


CHANGES: Mapping[str, Change] = {
    "soft inner attack": Change("attack", {"training": {"attack_routing": "soft"}}),
    "mixed inner attack": Change("attack", {"training": {"attack_routing": "mixed"}}),
    "image router": Change("router", {"model": {"router": "image"}}),
    "image router, mod codes": Change(
        "router", {"model": {"router": "image"}, "training": {"router_objective": "codes", "codes": "mod"}}
    ),
    "embedding router": Change("router", {"model": {"router": "embedding"}}),
    "embedding router, random codes": Change(
        "router", {"model": {"router": "embedding"}, "training": {"router_objective": "codes", "codes": "random"}}
    ),
    "independent start": Change("start", {"model": {"experts_init": "independent"}}),
    "shared start": Change("start", {"model": {"experts_init": "shared"}}),
    "balance": Change("balance", {"training": {"balance": 0.1}}),
    "margin": Change("margin", {"training": {"margin": 1.0}}),
    "EMA": Change("average", {"training": {"ema": 0.99}}, plain=True),
    "AWP": Change("weights", {"training": {"awp": 0.005}}, plain=True),
}
BASE, BEST = "AdvMoE as it is", "the best together"
MOST = 3
"""Changes that are combined at most."""


def _recipe(scale: Scale, settings: Settings, **labels: Any) -> TrainingRun:
    """AdvMoE with changed settings."""
    return scale.run("AdvMoE", more=settings, **labels)


def _single(scale: Scale, _: Results) -> list[Row]:
    usual = merged(Config().to_dict(), _recipe(scale, {}).settings)
    # Which start is no change depends on the scale.
    changes = {name: each.settings for name, each in CHANGES.items() if merged(usual, each.settings) != usual}
    if scale.name == "smoke":
        changes = {name: changes[name] for name in ("soft inner attack", "EMA")}
    rows = [measured(scale, scale.run("AT (S-Dense)"))]
    for name, settings in {BASE: {}, **changes}.items():
        rows.append(measured(scale, _recipe(scale, settings, variant=name)))
    return rows


def chosen(results: Results) -> list[str]:
    """The changes that are combined: of each thing changed the best one, the `MOST` best that beat the base."""
    scores = {
        row.labels["variant"]: score
        for row in results.select(method="AdvMoE")
        if (score := row.mean(best_validation)) is not None
    }
    best: dict[str, str] = {}
    for name in sorted((name for name in scores if name in CHANGES), key=lambda name: -scores[name]):
        best.setdefault(CHANGES[name].of, name)
    return [name for name in best.values() if scores[name] > scores.get(BASE, 1.0)][:MOST]


def combined(names: Sequence[str]) -> dict[str, Any]:
    """The settings of several changes."""
    return merged(*(CHANGES[name].settings for name in names))


def _together(scale: Scale, results: Results) -> list[Row]:
    names = chosen(results)
    rows = []
    if len(names) > 1:
        run = _recipe(scale, combined(names), variant=f"{BEST}: {', '.join(names)}")
        rows.append(measured(scale, run))
    plain = [name for name in names if CHANGES[name].plain]
    if plain:  # what helps any network is given to the baseline too
        run = scale.run("AT (S-Dense)", more=combined(plain), variant=", ".join(plain))
        rows.append(measured(scale, run))
    return rows


def _show(scale: Scale, results: Results) -> StudyFindings:
    routed = results.select(method="AdvMoE")
    scored = [(score, row) for row in routed if (score := row.mean(best_validation)) is not None]
    shown = table("Changes to the recipe", results, ["method", "variant"], [VALIDATED, RA, WORST, GAP, SA])
    groups = {
        str(row.labels["variant"]) if row.labels["method"] == "AdvMoE" else named(row.labels): {
            each.title: point(row, each.value, 0) for each in (RA, WORST)
        }
        for row in results
    }
    caption = "Mean over seeds, with one standard deviation to each side."
    figure = Picture(
        "bars", "recipes", "Changes to the recipe", with_heights(groups), {"ylabel": "robust accuracy (%)"}, caption
    )
    if not scored:
        return StudyFindings(tables=[shown], figures=[figure], notes=["No routed model was trained."])

    _, best = max(scored, key=lambda each: each[0])
    label = str(best.labels["variant"])
    baselines = results.select(method="AT (S-Dense)").rows
    picked = {seed: _best_of_others(results, seed) for seed in best.by_seed}
    told = "; ".join(f"seed {seed}: {row.labels['variant']}" for seed, row in picked.items())
    verdicts = []
    for name, attack in MEASURED.items():
        of_picked = {
            seed: each for seed, row in picked.items() if (each := outcomes(row, attack).get(seed)) is not None
        }
        compared = [
            Comparison("AdvMoE, as the others choose", named(base.labels), of_picked, outcomes(base, attack))
            for base in baselines
        ]
        if compared:
            verdicts.append(verdict(name, compared, f"For each seed the recipe best on the others' ({told})."))
    statement = "The recipe best on validation images, of the other seeds, is more robust than AT (S-Dense)."
    judgements = {each["measure"]: each["verdict"] for each in verdicts}
    sentences = {
        "holds": " What the other seeds choose is above AT (S-Dense) in the worst case at this size.",
        "does not hold": " What the other seeds choose is below AT (S-Dense) in the worst case at this size.",
        "undecided": " What the other seeds choose is not told apart from AT (S-Dense) in the worst case at this size.",
    }
    note = f"The best recipe by validation, over all seeds: {label}." + (
        sentences[judgements["worst case"]] if judgements else ""
    )
    source = "beyond the paper"
    return StudyFindings(
        tables=[shown], figures=[figure], claims=[claim("worst-case-recipe", statement, verdicts, source)], notes=[note]
    )


def _best_of_others(results: Results, seed: int) -> RowResults:
    """The recipe of `seed` that the other seeds' validation images choose: its own, where there is no other seed, so
    that no model is tested for having been lucky. What the best together is made of, all seeds have chosen.
    """
    rows = [row for row in results.select(method="AdvMoE") if seed in row.by_seed]

    def score(row: RowResults) -> float:
        runs = [run for other, run in row.by_seed.items() if other != seed] or list(row.by_seed.values())
        scores = [each for run in runs if (each := best_validation(run)) is not None]
        return sum(scores) / len(scores) if scores else -1.0

    return max(rows, key=score)


RECIPES = Study(
    name="recipes", title="Robust when the attacker sees the routing",
    shows="AdvMoE with one change at a time (inner attack, router, codes, start, routers' terms, averaging, weight "
    "perturbation), then with the best together, in the worst case.",
    stages=(_single, _together), show=_show,
    varies=(
        "training.attack_routing", "model.router", "training.router_objective", "training.codes", "model.experts_init",
        "training.balance", "training.margin", "training.ema", "training.awp",
    ),
)  # fmt: skip

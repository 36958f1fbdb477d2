"""A pathway that pays: the study `pathway`, beyond the paper. Imports no torch.

Registered in `docs/results/pathway/README.md`, which says what is asked, measured and tested. Its stages are the gate
(does capacity bind here at all), one seed of every arm, then those that the answer needs with all seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from advmoe.config import merged
from advmoe.report.pictures import Picture
from advmoe.studies.claims import claim, compare, verdict
from advmoe.studies.comparisons import MEASURED, between, measured, under_autoattack
from advmoe.studies.results import (
    Results,
    RowResults,
    best_validation,
    point,
)
from advmoe.studies.rows import Row, Settings, TrainingRun
from advmoe.studies.scales import Scale, scale_named
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import GAP, GMACS, MS, RA, SA, VALIDATED, WORST, Quantity, table, with_heights
from advmoe.tables import BACKBONES

GATE = 0.015
"""By how much Dense must exceed S-Dense for a mixture to have something to gain."""
SOURCE = "beyond the paper"


@dataclass(frozen=True)
class Arm:
    """A way to train a network of a pathway's cost."""

    method: str
    """One of `scales.PAPER_METHODS`."""
    settings: Settings
    started: bool = False
    """Whether its experts are copies of an S-Dense network that was trained for the first half of the epochs."""


def _router(name: str, **training: Any) -> Settings:
    return {"model": {"router": name}, "training": training}


ARMS: Mapping[str, Arm] = {
    "AT (MoE)": Arm("AT (MoE)", {}),
    "AdvMoE": Arm("AdvMoE", {}),
    "AdvMoE, image router, codes": Arm("AdvMoE", _router("image", router_objective="codes", codes="mod")),
    "fixed-top": Arm("AT (MoE)", _router("fixed-top")),
    "fixed-top-bottom": Arm("AT (MoE)", _router("fixed-top-bottom")),
    "fixed-late": Arm("AT (MoE)", _router("fixed-late")),
    "linear": Arm("AT (MoE)", _router("linear", radius=1.0)),
    "fixed-top, from S-Dense": Arm("AT (MoE)", _router("fixed-top", lr=0.05), started=True),
}
"""Routed arms of one seed, by name."""
LEARNT = ("AT (MoE)", "AdvMoE", "AdvMoE, image router, codes", "linear")
"""Those whose router learns: the best of them is trained to forgive a flip."""
FORGIVING: Settings = {"training": {"runner_up": 0.25}}
SMOOTH: Settings = {"training": {"label_smoothing": 0.1}}
S_DENSE, DENSE, TAUGHT = "AT (S-Dense)", "AT (Dense)", "S-Dense, taught"
SMOOTHED, RESTARTED, LONGER = "AT (S-Dense), label smoothing", "S-Dense, from S-Dense", "S-Dense, twice the epochs"
"""Other ways to train S-Dense: the baseline is the best of them on validation images, as the routed arm is of the arms;
the last for an arm that costs twice as much to train.
"""


def _size(scale: Scale) -> Settings:
    """What all runs share: the setting that the study is registered with."""
    if scale.name == "smoke":
        return {"training": {"schedule": "one-cycle", "ema": 0.9}}
    shared = {"batch_size": 128, "lr": 0.1, "schedule": "one-cycle", "ema": 0.999, "precision": "bf16-mixed"}
    if scale.name == "paper":
        return {"training": shared}
    return {
        "model": {"width": 32}, "data": {"train_examples": None, "val_fraction": 0.02},
        "training": {**shared, "epochs": 20},
    }  # fmt: skip


def _plain(scale: Scale, method: str, arm: str, more: Settings | None = None, **sources: Any) -> TrainingRun:
    return scale.run(method, more=merged(_size(scale), more or {}), variant=arm, **sources)


def s_dense(scale: Scale) -> TrainingRun:
    """The baseline: a pathway's cost without routing."""
    return _plain(scale, "AT (S-Dense)", S_DENSE)


def dense(scale: Scale) -> TrainingRun:
    """Whose cost a pathway is to save, and who teaches."""
    return _plain(scale, "AT (Dense)", DENSE)


def routed(scale: Scale, arm: str, *, forgiving: bool = False, taught: bool = False) -> TrainingRun:
    """A routed arm by its name in `ARMS`, trained to forgive a flip, or by the dense network."""
    this = ARMS[arm]
    name = arm + ", forgiving" * forgiving + ", taught" * taught
    more = merged(this.settings, FORGIVING if forgiving else {})
    teacher = dense(scale) if taught else None
    if not this.started:
        return _plain(scale, this.method, name, more, teacher=teacher)
    start = _half(_plain(scale, "AT (S-Dense)", "S-Dense, half of the epochs", teacher=teacher))
    return _half(_plain(scale, this.method, name, more, start=start, teacher=teacher))


def _epochs(run: TrainingRun, factor: float) -> TrainingRun:
    """A run of so many times the epochs."""
    epochs = max(1, int(run.settings["training"]["epochs"] * factor))
    return replace(run, settings=merged(run.settings, {"training": {"epochs": epochs}}))


def _half(run: TrainingRun) -> TrainingRun:
    """A run of half the epochs, of which two together cost what others do."""
    return _epochs(run, 0.5)


def baseline(scale: Scale, arm: str) -> TrainingRun:
    """S-Dense, trained in the way of that name."""
    if arm == SMOOTHED:
        return _plain(scale, "AT (S-Dense)", arm, SMOOTH)
    if arm == LONGER:
        return _epochs(_plain(scale, "AT (S-Dense)", arm), 2)
    if arm == RESTARTED:
        start = _half(_plain(scale, "AT (S-Dense)", "S-Dense, half of the epochs"))
        return _half(_plain(scale, "AT (S-Dense)", arm, {"training": {"lr": 0.05}}, start=start))
    return s_dense(scale)


def _half_width(scale: Scale) -> list[TrainingRun]:
    """The baseline and a routed arm of half the channels, at a quarter of the cost, for what capacity is worth."""
    model = s_dense(scale).settings["model"]
    width = (model.get("width") or BACKBONES[model["name"]].width) // 2
    narrow = replace(scale, overrides=merged(scale.overrides, {"model": {"width": width}}))
    runs = s_dense(narrow), routed(narrow, "fixed-top")
    return [replace(run, labels={**run.labels, "variant": f"{run.labels['variant']}, half width"}) for run in runs]


def _attacked(scale: Scale) -> Scale:
    """The scale with the images that this study attacks, unless the user said how many."""
    if scale.name != "cpu" or scale.examples != scale_named(scale.name).examples:
        return scale
    return replace(scale, examples=2_000, autoattack=(*scale.autoattack[:2], 1_000))


def _measured(scale: Scale, runs: Iterable[TrainingRun], seeds: int | None = None) -> list[Row]:
    return [measured(_attacked(scale), run, seeds=seeds, timed=True) for run in runs]


def _gate(scale: Scale, _: Results) -> list[Row]:
    runs = [s_dense(scale), dense(scale)]
    if scale.name != "smoke":
        runs += [baseline(scale, SMOOTHED), _plain(scale, "AT (Dense)", "AT (Dense), label smoothing", SMOOTH)]
    return _measured(scale, runs, seeds=1)


def _names(scale: Scale) -> list[str]:
    return scale.pick(smoke=["AdvMoE", "fixed-top"], cpu=list(ARMS), paper=list(ARMS))


def _arms(scale: Scale, _: Results) -> list[Row]:
    others = [baseline(scale, name) for name in (RESTARTED, LONGER)]
    return _measured(scale, [*(routed(scale, name) for name in _names(scale)), *others, *_half_width(scale)], seeds=1)


def unmeasured(scale: Scale, results: Results) -> list[str]:
    """The arms that have no validation yet: one that failed is not left out in silence."""
    rows = {name: results.one(variant=name) for name in _names(scale)}
    return [name for name, row in rows.items() if row is None or row.mean(best_validation) is None]


def best(results: Results, names: Any) -> str | None:
    """Of the arms `names` the one of the best worst case on the validation split; None before any is trained."""
    scores = {
        name: score
        for name in names
        if (row := results.one(variant=name)) is not None and (score := row.mean(best_validation)) is not None
    }
    return max(scores, key=lambda name: scores[name], default=None)


def _taught(scale: Scale, results: Results) -> list[Row]:
    learnt, any_arm = best(results, LEARNT), best(results, ARMS)
    runs = [_plain(scale, "AT (S-Dense)", TAUGHT, teacher=dense(scale))]
    if learnt is not None:
        runs.append(routed(scale, learnt, forgiving=True))
    if any_arm is not None:
        runs.append(routed(scale, any_arm, taught=True))
    return _measured(scale, runs, seeds=1)


def chosen(scale: Scale, results: Results) -> tuple[str, bool] | None:
    """The best routed arm that nobody taught, by validation, and whether it forgives flips; None before every arm is
    measured.
    """
    every = [name + end for name in ARMS for end in ("", ", forgiving")]
    name = None if unmeasured(scale, results) else best(results, every)
    return None if name is None else (name.removesuffix(", forgiving"), name.endswith(", forgiving"))


def against(scale: Scale, results: Results) -> str:
    """The way to train S-Dense that the chosen arm is compared with: the best on validation images."""
    choice = chosen(scale, results)
    twice = choice is not None and ARMS[choice[0]].method == "AdvMoE"
    return best(results, [S_DENSE, SMOOTHED, RESTARTED, *([LONGER] if twice else [])]) or S_DENSE


def _finals(scale: Scale, results: Results) -> list[Row]:
    choice = chosen(scale, results)
    names = dict.fromkeys([S_DENSE, against(scale, results), best(results, [SMOOTHED, RESTARTED, LONGER]) or S_DENSE])
    runs = [*(baseline(scale, name) for name in names), _plain(scale, "AT (S-Dense)", TAUGHT, teacher=dense(scale))]
    runs.append(routed(scale, "AdvMoE"))
    if choice is not None and choice != ("AdvMoE", False):
        runs.append(routed(scale, choice[0], forgiving=choice[1]))
    if choice is not None:
        runs.append(routed(scale, choice[0], forgiving=choice[1], taught=True))
    attacked = _attacked(scale)
    return [
        *_measured(scale, runs),
        # AutoAttack is of the first seed: an hour of it for each of the others would tell little more.
        *(Row(run, {"autoattack": attacked.under_autoattack()}, seeds=1) for run in runs),
    ]


def _best_rows(results: Results) -> dict[str, RowResults]:
    """Of each arm its row with most seeds, of those whose accuracy is measured."""
    rows: dict[str, RowResults] = {}
    for row in results:
        name = str(row.labels["variant"])
        if not any("accuracy" in run.measures for run in row.by_seed.values()):
            continue
        if name not in rows or len(row.by_seed) >= len(rows[name].by_seed):
            rows[name] = row
    return rows


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost, accuracy) that no other beats in one and equals in the other."""
    return [
        name
        for name, (cost, accuracy) in points.items()
        if not any(
            (c <= cost and a >= accuracy) and (c < cost or a > accuracy)
            for other, (c, a) in points.items()
            if other != name
        )
    ]


def _show(scale: Scale, results: Results) -> StudyFindings:
    rows = _best_rows(results)
    shown = table(
        "Every arm", Results(list(rows.values())), ["variant"], [VALIDATED, SA, RA, WORST, GAP, GMACS, MS],
        caption="Mean and standard deviation over seeds, where there are several.",
    )  # fmt: skip
    groups = {name: {q.title: point(row, q.value, 0) for q in (RA, WORST)} for name, row in rows.items()}
    figures = [Picture("bars", "pathway", "Every arm", with_heights(groups), {"ylabel": "robust accuracy (%)"})]
    figures += [_by_cost(rows, each) for each in (GMACS, MS)]
    notes, claims = [_gate_note(results)], []
    if missing := unmeasured(scale, results):
        notes.append(f"No arm is chosen before all are measured: {', '.join(missing)} missing.")
    choice = chosen(scale, results)
    if choice is not None:
        arm, plain = choice[0] + ", forgiving" * choice[1], against(scale, results)
        claims = [
            _above(rows, arm, plain, "worst-case-pathway", f"The routed arm best on validation images ({arm})"),
            _above(rows, f"{arm}, taught", TAUGHT, "worst-case-taught", f"Taught by Dense, that arm ({arm})"),
        ]
        notes.append(
            f"On validation images of the first seed, which the tests leave out, {arm} is the best routed arm and "
            f"{plain} the best way to train S-Dense."
        )
    for each in (GMACS, MS):
        if points := _costs(rows, each):
            notes.append(f"Worst case against {each.title}: on the front are {'; '.join(front(points))}.")
    return StudyFindings(tables=[shown, *_strong(scale, results)], figures=figures, claims=claims, notes=notes)


def _strong(scale: Scale, results: Results) -> list[dict[str, Any]]:
    """The table of AutoAttack on the first seed's models, where any was attacked so."""
    attacked = [row for row in results if any("autoattack" in run.measures for run in row.by_seed.values())]
    if not attacked:
        return []
    return [table("Under AutoAttack, first seed", Results(attacked), ["variant"], [under_autoattack(scale)])]


def _costs(rows: Mapping[str, RowResults], cost: Quantity) -> dict[str, tuple[float, float]]:
    """What each arm costs and its worst case, where both are known. A mean of equal costs is off by rounding."""
    return {
        name: (round(each, 9), accuracy)
        for name, row in rows.items()
        if (each := row.mean(cost.value)) is not None and (accuracy := row.mean(WORST.value)) is not None
    }


def _by_cost(rows: Mapping[str, RowResults], cost: Quantity) -> Picture:
    """The worst case against a cost, a point for each arm."""
    series = {name: [point(rows[name], WORST.value, at)] for name, (at, _) in _costs(rows, cost).items()}
    labels = {"xlabel": cost.title, "ylabel": "robust accuracy, worst case (%)"}
    return Picture("lines", f"pathway-{cost.key}", f"Worst case against {cost.title}", series, labels)


def _gate_note(results: Results) -> str:
    """Whether capacity binds at this size, by the seed that the gate is run with."""
    first = (results.one(variant=name) for name in (S_DENSE, DENSE))
    small, large = (None if row is None else row.mean(WORST.value) for row in first)
    if small is None or large is None:
        return "The gate is not measured yet."
    opened = "is passed" if large - small >= GATE else "is not passed: capacity does not bind here"
    return (
        f"The gate {opened}. In the worst case Dense is {100 * (large - small):+.1f} points from S-Dense (one seed; "
        f"{100 * GATE:g} were asked for)."
    )


def _above(rows: Mapping[str, RowResults], more: str, less: str, name: str, who: str) -> dict[str, Any]:
    """The claim that the arm `more` is more robust than `less`, over the seeds that chose neither."""
    pair = [_fresh(rows.get(name)) for name in (more, less)]
    verdicts = []
    for way, attack in MEASURED.items():
        compared = between(pair[0], pair[1], (more, less), attack)
        signs = compare(compared).get("p_seeds")
        note = "" if signs is None else f"By the signs of the seeds alone, as registered first: p = {signs:.2g}."
        verdicts.append(verdict(way, [compared], note))
    return claim(name, f"{who} is more robust than {less}.", verdicts, SOURCE)


def _fresh(row: RowResults | None) -> RowResults | None:
    """A row without its first seed."""
    return row and replace(row, by_seed={seed: run for seed, run in row.by_seed.items() if seed > 0})


PATHWAY = Study(
    name="pathway", title="A pathway that pays",
    shows="Routed networks of a pathway's cost, with routing that learns, that is proved, that forgives a flip, taught "
    "by a dense network or not, against S-Dense of the same cost, in the worst case.",
    stages=(_gate, _arms, _taught, _finals), show=_show,
    varies=(
        "model.router", "training.router_objective", "training.codes", "training.radius", "training.runner_up",
        "training.label_smoothing", "training.teacher",
    ),
)  # fmt: skip

"""The studies that regenerate the paper's tables, figures and ablations. Imports no torch.

Each is what its rows are and what is made of them; what studies have in common is in `scales` and `present`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from advmoe.studies import paper
from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.present import (
    GMACS,
    MS,
    RA,
    SA,
    WORST,
    Column,
    bars,
    by_method,
    lines,
    stacked,
    table,
)
from advmoe.studies.results import (
    PGD,
    Found,
    Results,
    Trained,
    categories,
    of_evaluation,
    outcomes,
    point,
)
from advmoe.studies.scales import COMPARED, Scale
from advmoe.studies.spec import Figure, Measure, Outcome, Row, Run

MEASURED: dict[str, str | None] = {"PGD": PGD, "worst case": None}
"""How a claim is judged: as the paper measures, and in the worst case over all attacks that were run."""
_R = {"xlabel": "model scale r", "ylabel": "robust accuracy under PGD (%)"}
BAR_PARTS = {
    "both_survive": "1 both survive", "only_routing_fails": "2 only routing fails",
    "only_prediction_fails": "3 only prediction fails", "both_fail": "4 both fail",
}  # fmt: skip


def measured(scale: Scale, run: Run, *, timed: bool = False, **more: Measure) -> Row:
    """A row whose accuracy is measured, and its cost where a table shows time."""
    return Row(run, {"accuracy": scale.accuracy(run), **({"cost": scale.cost()} if timed else {}), **more})


def compared(
    results: Results, more: str, less: str, attack: str | None, measure: str = "accuracy", **labels: Any
) -> Comparison:
    """That one method is right more often than another, all else alike."""
    sides = [outcomes(results.one(method=name, **labels), attack, measure) for name in (more, less)]
    return Comparison(more, less, *sides)


def ordering(results: Results, where: str = "", **labels: Any) -> dict[str, Any]:
    """The claim AT (MoE) < AT (S-Dense) < AdvMoE."""
    ways: dict[str, tuple[str | None, str]] = {name: (attack, "accuracy") for name, attack in MEASURED.items()}
    if any("autoattack" in run.measures for row in results for run in row.by_seed.values()):
        ways["AutoAttack"] = ("autoattack.*", "autoattack")
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


def _orderings(results: Results) -> list[dict[str, Any]]:
    """One for each data set and backbone."""
    found = []
    for dataset in results.distinct("dataset"):
        for backbone in results.select(dataset=dataset).distinct("backbone"):
            found.append(ordering(results, f", {backbone}, {dataset}", dataset=dataset, backbone=backbone))
    return found


# Tables 1 to 3


def _grid(scale: Scale, datasets: Sequence[str], backbones: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """Every method on every data set and backbone that the scale has; on ImageNet the paper has no VGG and DenseNet."""
    return [
        scale.run(method, dataset=dataset, backbone=backbone)
        for dataset in datasets
        if dataset in scale.datasets
        for backbone in backbones
        if dataset in ("CIFAR-10", "CIFAR-100") or backbone in ("ResNet-18", "WRN-28-10", "DeiT-Tiny")
        for method in methods
    ]


def _overview(title: str, results: Results, columns: Sequence[Column], paper_table: str) -> dict[str, Any]:
    caption = "Mean and standard deviation over seeds; the paper's numbers in brackets, at the paper's own size."
    return table(title, results, ["dataset", "backbone", "method"], columns, caption=caption, paper_table=paper_table)


def _method_bars(id: str, title: str, results: Results, value: Callable[[Trained], float | None], unit: str) -> Figure:
    groups = {}
    for dataset in results.distinct("dataset"):
        for backbone in results.select(dataset=dataset).distinct("backbone"):
            rows = results.select(dataset=dataset, backbone=backbone)
            groups[f"{backbone}, {dataset}"] = {str(row.labels["method"]): point(row, value, 0) for row in rows}
    return bars(id, title, groups, ylabel=unit, caption="Mean over seeds, with one standard deviation to each side.")


def _table1_rows(scale: Scale, _: Results) -> list[Row]:
    datasets, backbones = list(scale.datasets), ["ResNet-18", "WRN-28-10", "VGG-16", "DenseNet"]
    return [measured(scale, run, timed=True) for run in _grid(scale, datasets, backbones, COMPARED)]


def _table1_show(scale: Scale, results: Results) -> Outcome:
    title = "AdvMoE beside the baselines"
    return Outcome(
        tables=[_overview(title, results, [RA, WORST, SA, GMACS, MS], "table1")],
        figures=[
            _method_bars("table1-ra", f"{title}: PGD", results, RA.value, "robust accuracy under PGD (%)"),
            _method_bars(
                "table1-worst", f"{title}: worst case", results, WORST.value, "robust accuracy, worst case (%)"
            ),
        ],
        claims=_orderings(results),
    )


def _table2_rows(scale: Scale, _: Results) -> list[Row]:
    runs = _grid(scale, ["CIFAR-10", "CIFAR-100"], ["ResNet-18", "WRN-28-10"], COMPARED)
    return [measured(scale, run, timed=True, autoattack=scale.under_autoattack()) for run in runs]


def _table2_show(scale: Scale, results: Results) -> Outcome:
    title, value = scale.autoattack[0], of_evaluation("worst_case", "autoattack")
    column = Column("ra_aa", title, "higher", value, 100, "ra_autoattack")
    return Outcome(
        tables=[_overview("Under AutoAttack", results, [RA, column, WORST, SA, GMACS, MS], "table2")],
        figures=[_method_bars("table2-aa", "Under AutoAttack", results, value, title)],
        claims=_orderings(results),
    )


def _table3_rows(scale: Scale, _: Results) -> list[Row]:
    dataset = scale.pick(smoke="CIFAR-10", cpu="CIFAR-10", paper="ImageNet")
    return [
        measured(scale, scale.run(method, dataset=dataset, backbone="DeiT-Tiny"), timed=True)
        for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE")
    ]


def _table3_show(scale: Scale, results: Results) -> Outcome:
    reported = {row["method"]: row for row in paper.reported()["rows"] if row["table"] == "table3"}
    said = "; ".join(f"{name}: RA {row['ra_pgd50']}, SA {row['sa']}" for name, row in reported.items())
    return Outcome(
        tables=[_overview("A vision transformer", results, [RA, WORST, SA, GMACS, MS], "table3")],
        figures=[_method_bars("table3-ra", "A vision transformer", results, RA.value, "robust accuracy under PGD (%)")],
        notes=[f"The paper's table 3 (ImageNet, DeiT-Tiny, percent): {said}."],
    )


# Figures


def _fig2_rows(scale: Scale, _: Results) -> list[Row]:
    runs = [scale.run(method) for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE")]
    return [measured(scale, run, sweep=scale.sweep(run)) for run in runs]


def _curve(row: Found, curve: str) -> list[dict[str, Any]]:
    """Mean robust accuracy (%) of a sweep at each radius, in 1/255."""
    found = [sweep for run in row.by_seed.values() if (sweep := run.found("sweep")) is not None]
    names = [next(iter(each["curves"])) if curve == "pgd" else curve for each in found]
    points = [
        {p["eps"]: 100 * p["robust_accuracy"] for p in each["curves"][name]["points"]}
        for each, name in zip(found, names, strict=True)
    ]
    radii = sorted({eps for each in points for eps in each})
    series = []
    for eps in radii:
        values = [each[eps] for each in points if eps in each]
        spread = len(values) > 1
        series.append({
            "x": round(255 * eps, 4), "y": sum(values) / len(values), "low": min(values) if spread else None,
            "high": max(values) if spread else None,
        })  # fmt: skip
    return series


def _fig2_show(scale: Scale, results: Results) -> Outcome:
    caption = "Mean over seeds; the range over seeds where there are several. Clean accuracy at radius 0."
    figures = [
        lines(
            f"fig2-{curve.replace(' ', '-')}", f"Robust accuracy against the attack's strength: {title}",
            {str(row.labels["method"]): _curve(row, curve) for row in results},
            xlabel="radius (1/255)", ylabel="robust accuracy (%)", caption=caption,
        )
        for curve, title in (("pgd", "PGD"), ("worst case", "the worst of two attacks"))
    ]  # fmt: skip
    suspected = [
        f"Gradient masking suspected in {row.name}, seed {seed}: {reason}"
        for row in results
        for seed, run in row.by_seed.items()
        for curve in ((run.found("sweep") or {}).get("curves") or {}).values()
        for reason in curve["masking"]["reasons"]
    ]
    claims = [ordering(results)]
    return Outcome(
        tables=[table("At the radius trained for", results, ["method"], [RA, WORST, SA])],
        figures=figures, claims=claims, notes=list(dict.fromkeys(suspected)),
    )  # fmt: skip


THETA, THETA2, M1, M2, M3 = (
    "router-robustified MoE", "router-robustified MoE, then its experts", "standard MoE", "AT (S-Dense)",
    "robust mask of standard Dense",
)  # fmt: skip


def scales_of(scale: Scale, **choices: Sequence[float]) -> list[tuple[float, dict[str, Any]]]:
    """Model scales with the settings that set them."""
    return [(r, {"model": {"scale": r}}) for r in scale.pick(**choices)]


def _fig3_rows(scale: Scale, _: Results) -> list[Row]:
    choices = scales_of(scale, smoke=(0.5, 0.8), cpu=(0.2, 0.5, 0.8), paper=(0.2, 0.5, 0.8))
    return [measured(scale, scale.run(m, more=more, scale=r)) for r, more in choices for m in (THETA, M1, M2, M3)]


def _fig3_show(scale: Scale, results: Results) -> Outcome:
    said = paper.figure(3)
    names = {
        THETA: "router_robustified_moe", M1: "standard_moe_M1", M2: "at_s_dense_M2", M3: "sparse_mask_M3",
    }  # fmt: skip
    verdicts = [
        verdict(
            name, [compared(results, THETA, M1, attack, scale=0.5), compared(results, M2, THETA, attack, scale=0.5)]
        )
        for name, attack in MEASURED.items()
    ]
    statement = (
        "Robustifying routers improves robustness over the standard MoE, but not as far as AT (S-Dense), at r = 0.5."
    )
    shown = table("By model scale", results, ["scale", "method"], [RA, WORST, SA])
    caption = f"Mean over seeds. The paper, percent at r = 0.5: {_percents({k: said[v] for k, v in names.items()})}."
    return Outcome(
        tables=[shown],
        figures=[
            lines("fig3", "Routers robustified alone", by_method(results, "scale", RA.value), caption=caption, **_R)
        ],
        claims=[claim("insight-1", statement, verdicts)],
    )


def _percents(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:g}" for name, number in numbers.items())


def _dissections(results: Results, title: str, id: str, caption: str) -> tuple[dict[str, Any], Figure]:
    """The table and the bars of dissected rows: shares of all images, mean over seeds."""
    rows: list[dict[str, Any]] = []
    shares: dict[str, dict[str, float]] = {}
    for row in results:
        runs = [found for run in row.by_seed.values() if (found := run.found("dissection")) is not None]
        for attack in dict.fromkeys(name for found in runs for name in found):
            each = [found[attack]["categories"] for found in runs]
            mean = {part: sum(one[part] for one in each) / len(each) for part in BAR_PARTS}
            name = f"{row.labels['method']}: {attack}"
            shares[name] = {title: mean[part] for part, title in BAR_PARTS.items()}
            rows.append({
                "method": row.labels["method"], "attack": attack, "n": len(each),
                **{part: 100 * share for part, share in mean.items()},
                "model": 100 * (mean["both_survive"] + mean["only_routing_fails"]),
                "routers": 100 * (mean["both_survive"] + mean["only_prediction_fails"]),
            })  # fmt: skip
    heads = {"method": "Method", "attack": "Attack", "n": "Seeds", **{k: f"{v} %" for k, v in BAR_PARTS.items()}}
    heads |= {"model": "model robust (1 + 2) %", "routers": "routers robust (1 + 3) %"}
    better = {"model": "higher", "routers": "higher"}
    columns = [{"key": key, "title": head, "better": better.get(key)} for key, head in heads.items()]
    shown = {"title": title, "caption": caption, "columns": columns, "rows": rows}
    return shown, stacked(id, title, shares, xlabel="share of all test images (%)", caption=caption)


def _dissected(scale: Scale, method: str) -> Row:
    return measured(scale, scale.run(method), dissection=scale.dissect())


def _fig4_rows(scale: Scale, _: Results) -> list[Row]:
    return [_dissected(scale, THETA), measured(scale, scale.run(M1))]


def _fig4_show(scale: Scale, results: Results) -> Outcome:
    said = paper.figure(4)
    caption = (
        f"The paper (r = 0.5, percent): category 1 {said['unsuccessful_on_both_1']:g}, "
        f"1 + 3 {said['unsuccessful_on_routers_1_plus_3']:g}. Every test image is attacked."
    )
    shown, figure = _dissections(results, "What fails where routers alone are robust", "fig4", caption)
    theta = results.one(method=THETA)
    verdicts = [
        verdict(
            name,
            [
                Comparison(
                    "3 only prediction fails", "1 both survive", *(categories(theta, dissected, [k]) for k in (3, 1))
                ),
                compared(results, THETA, M1, attack),
            ],
            f"The categories are those of {title}.",
        )
        for (name, attack), (dissected, title) in zip(
            MEASURED.items(), ((PGD, "PGD"), (f"{PGD}-soft", "PGD through soft routing")), strict=True
        )
    ]
    statement = (
        "Of the attacks that routers withstand more than half fool the prediction (category 3 > 1), though robust routers "
        "help (more robust than the standard MoE)."
    )
    return Outcome(
        tables=[shown, table("Accuracy", results, ["method"], [RA, WORST, SA])], figures=[figure],
        claims=[claim("insight-2", statement, verdicts)],
    )  # fmt: skip


def _fig5_rows(scale: Scale, _: Results) -> list[Row]:
    return [_dissected(scale, THETA), _dissected(scale, THETA2)]


def _fig5_show(scale: Scale, results: Results) -> Outcome:
    caption = "Before and after the experts are robustified too. Every test image is attacked."
    shown, figure = _dissections(results, "What fails once experts are robustified after routers", "fig5", caption)
    first, second = results.one(method=THETA), results.one(method=THETA2)
    verdicts = []
    for (name, attack), (dissected, title) in zip(
        MEASURED.items(), ((PGD, "PGD"), (f"{PGD}-soft", "PGD through soft routing")), strict=True
    ):
        kept = Comparison(
            "routers robust before",
            "routers robust after",
            *(categories(row, dissected, [1, 3]) for row in (first, second)),
        )
        note = f"The routers' robustness is that under {title}."
        verdicts.append(verdict(name, [compared(results, THETA2, THETA, attack), kept], note))
    statement = (
        "Robustifying experts after routers makes the model more robust, while the routers' robustness drops: the two do "
        "not adapt to each other."
    )
    return Outcome(
        tables=[shown, table("Accuracy", results, ["method"], [RA, WORST, SA])], figures=[figure],
        claims=[claim("insight-3", statement, verdicts)],
    )  # fmt: skip


def _fig7_rows(scale: Scale, _: Results) -> list[Row]:
    experts = scale.pick(smoke=(2, 4), cpu=(2, 4, 8), paper=(2, 4, 6, 8, 10))
    ratios = scales_of(scale, smoke=(0.5, 0.8), cpu=(0.2, 0.5, 0.8), paper=(0.2, 0.35, 0.5, 0.65, 0.8, 0.9))
    rows = [measured(scale, scale.run("AT (Dense)"))]
    for number in experts:
        for r, more in ratios:
            settings = {"model": {**more["model"], "num_experts": number}}
            rows.append(measured(scale, scale.run("AdvMoE", more=settings, experts=number, scale=r)))
    return rows


def _fig7_show(scale: Scale, results: Results) -> Outcome:
    moe = results.select(method="AdvMoE")
    caption = (
        "AdvMoE; mean over seeds. The dashed line is AT (Dense), which is what r = 1 is for any number of experts."
    )
    figures = []
    for column, id in ((RA, "fig7-ra"), (WORST, "fig7-worst")):
        dense = [value for row in results.select(method="AT (Dense)") for value in row.values(column.value).values()]
        references = [("AT (Dense)", 100 * sum(dense) / len(dense))] if dense else []
        series = {f"N = {n}": p for n, p in by_method(moe, "scale", column.value, series="experts").items()}
        title = "Experts and their size: " + ("PGD" if column is RA else "worst case")
        label = f"robust accuracy, {'PGD' if column is RA else 'worst case'} (%)"
        figures.append(
            lines(id, title, series, xlabel="model scale r", ylabel=label, caption=caption, references=references)
        )
    return Outcome(
        tables=[table("Experts N and model scale r", results, ["method", "experts", "scale"], [RA, WORST, SA, GMACS])],
        figures=figures,
    )


def _fig8_rows(scale: Scale, _: Results) -> list[Row]:
    backbones = scale.pick(smoke=("ResNet-18",), cpu=("ResNet-18",), paper=("ResNet-18", "WRN-28-10"))
    choices = scales_of(scale, smoke=(0.5, 0.8), cpu=(0.2, 0.5, 0.8), paper=(0.2, 0.5, 0.8))
    rows = []
    for backbone in backbones:
        rows.append(measured(scale, scale.run("AT (Dense)", backbone=backbone)))
        for r, more in choices:
            for method in COMPARED[1:]:
                rows.append(measured(scale, scale.run(method, backbone=backbone, more=more, scale=r)))
    return rows


def _fig8_show(scale: Scale, results: Results) -> Outcome:
    figures = []
    for backbone in results.distinct("backbone"):
        rows = results.select(backbone=backbone)
        dense = [value for row in rows.select(method="AT (Dense)") for value in row.values(RA.value).values()]
        references = [("AT (Dense)", 100 * sum(dense) / len(dense))] if dense else []
        figures.append(
            lines(
                f"fig8-{len(figures) + 1}",
                f"Methods by model scale, {backbone}",
                by_method(rows, "scale", RA.value),
                caption="Mean over seeds, with one standard deviation to each side.",
                references=references,
                **_R,
            )  # fmt: skip
        )
    ratios, backbones = results.distinct("scale"), results.distinct("backbone")
    claims = [ordering(results, f", {b}, r = {r}", scale=r, backbone=b) for b in backbones for r in ratios]
    columns = [RA, WORST, SA, GMACS]
    return Outcome(
        tables=[table("Methods by model scale", results, ["backbone", "scale", "method"], columns)],
        figures=figures, claims=claims,
    )  # fmt: skip


def _fig6_rows(scale: Scale, _: Results) -> list[Row]:
    dataset = scale.pick(smoke="CIFAR-10", cpu="CIFAR-10", paper="CIFAR-100")
    mask = scale.run("AT (Sparse)", dataset=dataset)
    runs = [scale.run(method, dataset=dataset) for method in ("AdvMoE", "AT (MoE)")]
    rows = [measured(scale, run, pathways=scale.pathways(mask)) for run in runs]
    return [*rows, measured(scale, mask)]


# Ablations


def _attack_steps_rows(scale: Scale, _: Results) -> list[Row]:
    rows = []
    for steps in (1, 2, 5, 10):
        for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE"):
            eps = scale.eps(scale.run(method))
            size = round(1.25 * eps / steps, 8)
            # The step shrinks as steps are added, so that all can go as far; with two it is the default's.
            more = {"training": {"attack_steps": steps, **({} if steps == 2 else {"step_size": size})}}
            rows.append(measured(scale, scale.run(method, more=more, K=steps)))
    return rows


def _attack_steps_show(scale: Scale, results: Results) -> Outcome:
    caption = "Mean over seeds. The steps of an attack of K go 1.25 times the radius in all."
    figures = [
        lines(
            f"attack-steps-{id}", f"Training with K attack steps: {title}", by_method(results, "K", column.value),
            xlabel="attack steps K in training", ylabel=f"robust accuracy, {title} (%)", caption=caption,
        )
        for column, id, title in ((RA, "ra", "PGD"), (WORST, "worst", "worst case"))
    ]  # fmt: skip
    claims = [ordering(results, f", K = {steps}", K=steps) for steps in results.distinct("K")]
    return Outcome(
        tables=[table("Attack steps in training", results, ["K", "method"], [RA, WORST, SA])], figures=figures,
        claims=claims,
    )  # fmt: skip


def _convergence_rows(scale: Scale, _: Results) -> list[Row]:
    return [Row(scale.run(method)) for method in ("AdvMoE", "AT (MoE)")]


def _trades(part: str, beta: float) -> Callable[[Trained], list[float | None]]:
    """TRADES' loss of a level in each epoch."""

    def of(run: Trained) -> list[float | None]:
        found = [line["train"].get(part) for line in run.epochs]
        return [None if each is None else each["ce"] + each.get("kl", 0.0) for each in found]

    return of


def _validated(run: Trained) -> list[float | None]:
    return [None if line["val"] is None else line["val"]["robust_accuracy"] for line in run.epochs]


def _accurate(part: str) -> Callable[[Trained], list[float | None]]:
    def of(run: Trained) -> list[float | None]:
        return [(line["train"].get(part) or {}).get("accuracy") for line in run.epochs]

    return of

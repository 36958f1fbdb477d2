"""Figures 2, 6, 7 and 8 of the paper. Imports no torch."""

from __future__ import annotations

from typing import Any

from advmoe.report.pictures import Picture
from advmoe.studies.comparisons import RA_LABEL, measured, ordering, scales_of
from advmoe.studies.figure_claims import by_scale, drops, pathway_claims, regimes
from advmoe.studies.results import Results, RowResults, RunNumber, of_pathways, swept
from advmoe.studies.rows import Row
from advmoe.studies.scales import COMPARED, Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import GMACS, RA, SA, WORST, Quantity, by_method, table, with_points


def _fig2_rows(scale: Scale, _: Results) -> list[Row]:
    runs = [scale.run(method) for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE")]
    return [measured(scale, run, sweep=scale.sweep(run)) for run in runs]


def _curve(row: RowResults, curve: str) -> list[dict[str, Any]]:
    """Mean robust accuracy (%) of a sweep at each radius, in 1/255."""
    points = [swept(run, curve) for run in row.by_seed.values()]
    series = []
    for radius in sorted({radius for each in points for radius in each}):
        values = [100 * each[radius] for each in points if radius in each]
        spread = len(values) > 1
        series.append({
            "x": radius, "y": sum(values) / len(values), "low": min(values) if spread else None,
            "high": max(values) if spread else None,
        })  # fmt: skip
    return series


def _fig2_show(scale: Scale, results: Results) -> StudyFindings:
    caption = "Mean over seeds; the range over seeds where there are several. Clean accuracy at radius 0."
    figures = [
        Picture(
            "lines", f"fig2-{curve.replace(' ', '-')}", f"Robust accuracy against the attack's strength: {title}",
            with_points({str(row.labels["method"]): _curve(row, curve) for row in results}),
            {"xlabel": "radius (1/255)", "ylabel": "robust accuracy (%)"}, caption,
        )
        for curve, title in (("pgd", "PGD"), ("worst case", "the worst of three attacks"))
    ]  # fmt: skip
    suspected = [
        f"Gradient masking suspected in {row.name}, seed {seed}: {reason}"
        for row in results
        for seed, run in row.by_seed.items()
        for curve in ((run.measurement("sweep") or {}).get("curves") or {}).values()
        for reason in curve["masking"]["reasons"]
    ]
    claims = [ordering(results), *drops(results)]
    return StudyFindings(
        tables=[table("At the radius trained for", results, ["method"], [RA, WORST, SA])],
        figures=figures, claims=claims, notes=list(dict.fromkeys(suspected)),
    )  # fmt: skip


def _fig6_rows(scale: Scale, _: Results) -> list[Row]:
    dataset = scale.pick(smoke="CIFAR-10", cpu="CIFAR-10", paper="CIFAR-100")
    mask = scale.run("AT (Sparse)", dataset=dataset)
    runs = [scale.run(method, dataset=dataset) for method in ("AdvMoE", "AT (MoE)")]
    rows = [measured(scale, run, pathways=scale.pathways(mask)) for run in runs]
    return [*rows, measured(scale, mask)]


_FIG6 = [
    Quantity("clean", "IoU with the mask, clean", None, of_pathways("against", "clean", "mean")),
    Quantity("attacked", "attacked", None, of_pathways("against", "adversarial", "mean")),
    Quantity("spread", "std, clean", None, of_pathways("against", "clean", "std")),
    Quantity("chance", "random pathways", None, of_pathways("against", "random_pathways", "mean")),
    Quantity("distinct", "distinct pathways", None, of_pathways("clean", "distinct")),
    Quantity("entropy", "their entropy (bits)", None, of_pathways("clean", "entropy")),
    Quantity("kept", "pathways that survive the attack %", "higher", of_pathways("attack", "unchanged"), 100),
]


def _histogram(row: RowResults, kind: str) -> dict[str, list[float]] | None:
    """The distribution of the IoU with the mask, mean over seeds."""
    results = [each for run in row.by_seed.values() if (each := run.measurement("pathways")) and each.get("against")]
    if not results:
        return None
    shares = [each["against"][kind]["histogram"]["shares"] for each in results]
    mean = [sum(column) / len(column) for column in zip(*shares, strict=True)]
    return {"edges": results[0]["against"][kind]["histogram"]["edges"], "shares": mean}


def _fig6_show(scale: Scale, results: Results) -> StudyFindings:
    caption = "Mean over seeds. The mask is that of AT (Sparse), trained from AT (Dense) of the same seed."
    figures: list[Picture] = []
    for row in results:
        series = {kind: histogram for kind in ("clean", "adversarial") if (histogram := _histogram(row, kind))}
        if series:
            method = str(row.labels["method"])
            title = f"Pathways against the static mask: {method}"
            options = {"xlabel": "IoU", "ylabel": "share of images (%)", "bins": 50}
            figures.append(Picture("histogram", f"fig6-{len(figures) + 1}", title, series, options, caption))
    routed = Results([row for row in results if row.labels["routed"]])
    return StudyFindings(
        tables=[
            table("Pathways and the mask", routed, ["method"], _FIG6),
            table("Accuracy", results, ["method"], [RA, WORST, SA]),
        ],
        figures=figures, claims=pathway_claims(results),
    )  # fmt: skip


def _fig7_rows(scale: Scale, _: Results) -> list[Row]:
    experts = scale.pick(smoke=(2, 4), cpu=(2, 4, 8), paper=(2, 4, 6, 8, 10))
    ratios = scales_of(scale, smoke=(0.5, 0.8), cpu=(0.2, 0.5, 0.8), paper=(0.2, 0.35, 0.5, 0.65, 0.8, 0.9))
    rows = []
    for number in experts:
        # The same run each time, attacked with as many gradient steps as the networks beside it.
        rows.append(measured(scale, scale.run("AT (Dense)", experts=number), experts=number))
        for r, more in ratios:
            settings = {"model": {**more["model"], "num_experts": number}}
            rows.append(measured(scale, scale.run("AdvMoE", more=settings, experts=number, scale=r)))
    return rows


def _of_dense(results: Results, value: RunNumber) -> list[list[Any]]:
    """The dashed line of AT (Dense), the last row of it: its mean over seeds (%); none where it was not measured."""
    rows = results.select(method="AT (Dense)").rows
    mean = rows[-1].mean(value) if rows else None
    return [] if mean is None else [["AT (Dense)", 100 * mean]]


def _fig7_show(scale: Scale, results: Results) -> StudyFindings:
    moe = results.select(method="AdvMoE")
    caption = (
        "AdvMoE; mean over seeds. The dashed line is AT (Dense), which is what r = 1 is for any number of experts, "
        "in the worst case attacked with as many steps as the largest N."
    )
    figures = []
    for quantity, id, attack in ((RA, "fig7-ra", "PGD"), (WORST, "fig7-worst", "worst case")):
        series = {f"N = {n}": p for n, p in by_method(moe, "scale", quantity.value, series="experts").items()}
        options = {
            "xlabel": "model scale r", "ylabel": f"robust accuracy, {attack} (%)",
            "references": _of_dense(results, quantity.value),
        }  # fmt: skip
        title = f"Experts and their size: {attack}"
        figures.append(Picture("lines", id, title, with_points(series), options, caption))
    return StudyFindings(
        tables=[table("Experts N and model scale r", results, ["method", "experts", "scale"], [RA, WORST, SA, GMACS])],
        figures=figures,
        claims=regimes(results),
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


def _fig8_show(scale: Scale, results: Results) -> StudyFindings:
    figures: list[Picture] = []
    for backbone in results.distinct("backbone"):
        rows = results.select(backbone=backbone)
        figures.append(
            Picture(
                "lines", f"fig8-{len(figures) + 1}", f"Methods by model scale, {backbone}",
                with_points(by_method(rows, "scale", RA.value)),
                {"xlabel": "model scale r", "ylabel": RA_LABEL, "references": _of_dense(rows, RA.value)},
                "Mean over seeds, with one standard deviation to each side.",
            )
        )  # fmt: skip
    ratios, backbones = results.distinct("scale"), results.distinct("backbone")
    claims = [ordering(results.select(scale=r, backbone=b), f", {b}, r = {r}") for b in backbones for r in ratios]
    for b in backbones:
        claims += by_scale(results.select(backbone=b), f", {b}")
    columns = [RA, WORST, SA, GMACS]
    return StudyFindings(
        tables=[table("Methods by model scale", results, ["backbone", "scale", "method"], columns)],
        figures=figures, claims=claims,
    )  # fmt: skip


FIG2 = Study(
    name="fig2", title="Figure 2: robust accuracy against the attack's strength",
    shows="Robust accuracy of AT (S-Dense), AT (MoE) and AdvMoE against the radius of the attack.",
    stages=(_fig2_rows,), show=_fig2_show,
)  # fmt: skip
FIG6 = Study(
    name="fig6", title="Figure 6: pathways against the static mask",
    shows="IoU of each image's pathway with the mask of AT (Sparse), clean and attacked, for AdvMoE and AT (MoE).",
    stages=(_fig6_rows,), show=_fig6_show,
)  # fmt: skip
FIG7 = Study(
    name="fig7", title="Figure 7: experts and their size",
    shows="AdvMoE over the number of experts N and the model scale r, beside AT (Dense).",
    stages=(_fig7_rows,), show=_fig7_show, varies=("model.scale", "model.num_experts"),
)  # fmt: skip
FIG8 = Study(
    name="fig8", title="Figure 8: methods by model scale",
    shows="Every method over model scales, beside AT (Dense).",
    stages=(_fig8_rows,), show=_fig8_show, varies=("model.scale",),
)  # fmt: skip

"""What the paper reads off its figures 2, 6, 7 and 8, as claims to be judged. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from advmoe.studies.claims import Comparison, claim, verdict
from advmoe.studies.comparisons import MEASURED, between, leads, numbered
from advmoe.studies.labels import in_name
from advmoe.studies.results import (
    ImageGains,
    Results,
    RowResults,
    RunNumber,
    RunResults,
    of_pathways,
    outcomes,
    swept,
    swept_outcomes,
    unchanged_pathways,
)

_PLACE = "Zhang et al., ICCV 2023, "


def drops(results: Results) -> list[dict[str, Any]]:
    """Figure 2: AT (MoE) is less robust than AT (S-Dense), at each radius that was swept."""
    names = "AT (S-Dense)", "AT (MoE)"
    rows = [results.one(method=name) for name in names]
    runs = [run for row in rows if row is not None for run in row.by_seed.values()]
    claims = []
    for radius in sorted({radius for run in runs for radius in swept(run, "pgd")} - {0.0}):
        verdicts = [
            verdict(way, [Comparison(*names, *(swept_outcomes(row, curve, radius) for row in rows))])
            for way, curve in (("PGD", "pgd"), ("worst of three", "worst case"))
        ]
        statement = f"AT (MoE) is less robust than AT (S-Dense) at a radius of {radius:g}/255."
        claims.append(claim(f"drop, {radius:g}/255", statement, verdicts, f"{_PLACE}sec. 3, fig. 2"))
    return claims


# Figure 6


def _shares(run: RunResults, kind: str) -> list[float]:
    """The distribution of the IoU with the mask over bins, of `clean` or `adversarial` images; empty where unknown."""
    against = (run.measurement("pathways") or {}).get("against")
    return against[kind]["histogram"]["shares"] if against else []


def _peak(run: RunResults) -> float | None:
    """The largest share of clean images in one bin."""
    return max(_shares(run, "clean"), default=None)


def _shift(run: RunResults) -> float | None:
    """The share of images that clean and attacked distributions do not have in common."""
    clean, attacked = (_shares(run, kind) for kind in ("clean", "adversarial"))
    return 1 - sum(map(min, clean, attacked)) if clean else None


def pathway_claims(results: Results) -> list[dict[str, Any]]:
    """Figure 6: whose routers are fragile, whose pathways are far from the mask, and whose are diverse."""
    ours, theirs = (results.one(method=name) for name in ("AdvMoE", "AT (MoE)"))

    def more(value: RunNumber, unit: str = "") -> list[Comparison]:
        return [numbered("AdvMoE", "AT (MoE)", (ours, theirs), value, unit)]

    def less(value: RunNumber, unit: str = "") -> list[Comparison]:
        return [numbered("AT (MoE)", "AdvMoE", (theirs, ours), value, unit)]

    fragile = Comparison("AdvMoE's pathways", "AT (MoE)'s", unchanged_pathways(ours), unchanged_pathways(theirs))
    source = f"{_PLACE}sec. 5, fig. 6"
    return [
        claim(
            "routers-of-at-moe-are-fragile",
            "The routers of AT (MoE) are more fragile than those of AdvMoE: an attack changes more of its pathways.",
            [
                verdict("PGD", [fragile], "Whether the attack leaves every choice as it was."),
                verdict("shift of the IoU under PGD", less(_shift)),
            ],
            source,
        ),
        claim(
            "far-from-the-mask", "AdvMoE's pathways have less in common with the static mask than AT (MoE)'s.",
            [
                verdict("IoU, clean", less(of_pathways("against", "clean", "mean"), "IoU")),
                verdict("IoU under PGD", less(of_pathways("against", "adversarial", "mean"), "IoU")),
            ],
            source,
        ),
        claim(
            "diverse-pathways", "AdvMoE sends images along more diverse pathways than AT (MoE).",
            [
                verdict("spread of the IoU", more(of_pathways("against", "clean", "std"), "IoU")),
                verdict("peak of the IoU", less(_peak)),
                verdict("distinct pathways", more(of_pathways("clean", "distinct"), "pathways")),
                verdict("entropy", more(of_pathways("clean", "entropy"), "bits")),
            ],
            source,
        ),
    ]  # fmt: skip


# Figures 7 and 8


def _called(row: RowResults | None, otherwise: str) -> str:
    """A row by its method and, unless it is AT (Dense)'s, N and r."""
    labels: Mapping[str, Any] = row.labels if row is not None else {"method": otherwise}
    given = [in_name(name, labels[name]) for name in ("experts", "scale") if "scale" in labels]
    return ", ".join([str(labels["method"]), *given])


def regimes(results: Results) -> list[dict[str, Any]]:
    """Figure 7: where AdvMoE is above AT (Dense), where below, and that more experts are harder to make robust."""
    moe, source = results.select(method="AdvMoE"), f"{_PLACE}sec. 5, fig. 7"

    def judged(name: str, statement: str, more: RowResults | None, less: RowResults | None) -> dict[str, Any]:
        names = _called(more, "AT (Dense)"), _called(less, "AT (Dense)")
        return claim(
            name, statement, [verdict(way, [between(more, less, names, attack)]) for way, attack in MEASURED.items()],
            source,
        )  # fmt: skip

    claims = []
    for row in moe:
        number, r = row.labels["experts"], row.labels["scale"]
        where, dense = f"N = {number}, r = {r}", results.one(method="AT (Dense)", experts=number)
        if number < 8 and 0.5 <= r <= 0.9:
            statement = f"AdvMoE is more robust than AT (Dense), {where}."
            claims.append(judged(f"moe-regime, {where}", statement, row, dense))
        if number >= 8 and r < 0.5:
            statement = f"AdvMoE is less robust than AT (Dense), {where}."
            claims.append(judged(f"ineffective-regime, {where}", statement, dense, row))
    experts = moe.distinct("experts")
    for r in moe.distinct("scale"):
        few, many = (moe.one(experts=number, scale=r) for number in (min(experts), max(experts)))
        if few is not many and few is not None and many is not None:
            statement = f"With {max(experts)} experts AdvMoE is less robust than with {min(experts)}, r = {r}."
            claims.append(judged(f"more-experts-are-harder, r = {r}", statement, few, many))
    return claims


def by_scale(results: Results, where: str) -> list[dict[str, Any]]:
    """Figure 8, of one backbone: AdvMoE is above all baselines at each r, and the more so the larger r is."""
    claims: list[dict[str, Any]] = []
    ratios, dense = results.distinct("scale"), results.select(method="AT (Dense)").rows
    for r in ratios:
        claims += leads(Results([*dense, *results.select(scale=r)]), f"{where}, r = {r}")
    if len(ratios) > 1:
        least, most = min(ratios), max(ratios)
        names = f"gain at r = {most}", f"gain at r = {least}"
        verdicts = [
            verdict(way, [Comparison(*names, _gains(results, attack, most), _gains(results, attack, least))])
            for way, attack in MEASURED.items()
        ]
        statement = f"What AdvMoE gains over AT (S-Dense) rises from r = {least} to {most}{where}."
        claims.append(claim(f"gain-rises{where}", statement, verdicts, f"{_PLACE}sec. 5, fig. 8"))
    return claims


def _gains(results: Results, attack: str | None, r: float) -> ImageGains:
    """By seed and image, whether AdvMoE is right less whether AT (S-Dense) is."""
    ours, theirs = (outcomes(results.one(method=name, scale=r), attack) for name in ("AdvMoE", "AT (S-Dense)"))
    return {
        seed: {image: right - theirs[seed][image] for image, right in ours[seed].items() if image in theirs[seed]}
        for seed in ours.keys() & theirs.keys()
    }

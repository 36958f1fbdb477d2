"""Tables 1 to 3 of the paper. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advmoe.studies import paper
from advmoe.studies.claims import MARGIN, Comparison, claim, verdict
from advmoe.studies.comparisons import (
    above,
    half_the_cost,
    leads,
    measured,
    method_bars,
    orderings,
    overview,
    setups,
    under_autoattack,
)
from advmoe.studies.results import Results, clean_outcomes
from advmoe.studies.rows import Row, TrainingRun
from advmoe.studies.scales import COMPARED, Scale
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import GMACS, MS, RA, SA, WORST


def _grid(scale: Scale, datasets: Sequence[str], backbones: Sequence[str]) -> list[TrainingRun]:
    """The methods compared on every data set and backbone that the scale has; VGG and DenseNet on CIFAR alone."""
    return [
        scale.run(method, dataset=dataset, backbone=backbone)
        for dataset in datasets
        if dataset in scale.datasets
        for backbone in backbones
        if dataset in ("CIFAR-10", "CIFAR-100") or backbone in ("ResNet-18", "WRN-28-10")
        for method in COMPARED
    ]


def _table1_rows(scale: Scale, _: Results) -> list[Row]:
    datasets, backbones = list(scale.datasets), ["ResNet-18", "WRN-28-10", "VGG-16", "DenseNet"]
    return [measured(scale, run, timed=True) for run in _grid(scale, datasets, backbones)]


def _table1_show(scale: Scale, results: Results) -> StudyFindings:
    title = "AdvMoE beside the baselines"
    return StudyFindings(
        tables=[overview(title, results, [RA, WORST, SA, GMACS, MS], "table1")],
        figures=[
            method_bars("table1-ra", f"{title}: PGD", results, RA.value, "robust accuracy under PGD (%)"),
            method_bars(
                "table1-worst", f"{title}: worst case", results, WORST.value, "robust accuracy, worst case (%)"
            ),
        ],
        claims=[
            *orderings(results, scale.strong),
            *(each for where, rows in setups(results) for each in leads(rows, where, scale.strong)),
            *(half_the_cost(rows, where) for where, rows in setups(results)),
        ],
    )


def _table2_rows(scale: Scale, _: Results) -> list[Row]:
    runs = _grid(scale, ["CIFAR-10", "CIFAR-100"], ["ResNet-18", "WRN-28-10"])
    return [measured(scale, run, timed=True, autoattack=scale.under_autoattack()) for run in runs]


def _table2_show(scale: Scale, results: Results) -> StudyFindings:
    strong = under_autoattack(scale)
    return StudyFindings(
        tables=[overview("Under AutoAttack", results, [RA, strong, WORST, SA, GMACS, MS], "table2")],
        figures=[method_bars("table2-aa", "Under AutoAttack", results, strong.value, strong.title)],
        claims=[
            *orderings(results, scale.strong),
            *(each for where, rows in setups(results) for each in leads(rows, where, scale.strong)),
        ],
    )


def _table3_rows(scale: Scale, _: Results) -> list[Row]:
    dataset = scale.pick(smoke="CIFAR-10", cpu="CIFAR-10", paper="ImageNet")
    return [
        measured(scale, scale.run(method, dataset=dataset, backbone="DeiT-Tiny"), timed=True)
        for method in ("AT (S-Dense)", "AT (MoE)", "AdvMoE")
    ]


def _table3_claims(results: Results) -> list[dict[str, Any]]:
    pair, source = [("AT (MoE)", "AdvMoE")], "Zhang et al., ICCV 2023, sec. 5.2, table 3"
    ours, theirs = (results.one(method=name) for name in ("AdvMoE", "AT (MoE)"))
    alike = Comparison("AdvMoE", "AT (MoE)", clean_outcomes(ours), clean_outcomes(theirs), margin=MARGIN)
    return [
        claim("vit-above-at", "On a ViT AdvMoE is more robust than AT (MoE).", above(results, pair), source),
        claim(
            "vit-by-a-point", "On a ViT AdvMoE is a point or more above AT (MoE).",
            above(results, pair, margin=-MARGIN), source,
        ),
        claim(
            "vit-keeps-accuracy", "On a ViT AdvMoE loses no more than a point of AT (MoE)'s clean accuracy.",
            [verdict("clean", [alike])], source,
        ),
    ]  # fmt: skip


def _table3_show(scale: Scale, results: Results) -> StudyFindings:
    reported = {row["method"]: row for row in paper.reported()["rows"] if row["table"] == "table3"}
    rows = "; ".join(f"{name}: RA {row['ra_pgd50']}, SA {row['sa']}" for name, row in reported.items())
    return StudyFindings(
        tables=[overview("A vision transformer", results, [RA, WORST, SA, GMACS, MS], "table3")],
        figures=[method_bars("table3-ra", "A vision transformer", results, RA.value, "robust accuracy under PGD (%)")],
        claims=_table3_claims(results),
        notes=[
            f"The paper's table 3 (ImageNet, DeiT-Tiny, percent): {rows}.",
            "Its 0.27 GMACs are not those of DeiT-Tiny at 224 pixels (about 1.25 Dense): here what runs is counted.",
        ],
    )


TABLE1 = Study(
    name="table1", title="Table 1: AdvMoE beside the baselines",
    shows="Robust and clean accuracy, cost and time of AT (Dense), AT (S-Dense), AT (Sparse), AT (MoE) and AdvMoE "
    "under PGD and in the worst case.",
    stages=(_table1_rows,), show=_table1_show,
)  # fmt: skip
TABLE2 = Study(
    name="table2", title="Table 2: under AutoAttack",
    shows="The methods of table 1 under AutoAttack.",
    stages=(_table2_rows,), show=_table2_show,
)  # fmt: skip
TABLE3 = Study(
    name="table3", title="Table 3: a vision transformer",
    shows="AT and AdvMoE on DeiT-Tiny, whose MLPs are the MoE layers.",
    stages=(_table3_rows,), show=_table3_show,
)  # fmt: skip

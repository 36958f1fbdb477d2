"""What studies declare alike: the paper's ordering, judged on made-up results."""

import pytest

from advmoe.studies.comparisons import (
    half_the_cost,
    leads,
    measured,
    method_bars,
    named,
    ordering,
    orderings,
    overview,
    saving,
    scales_of,
    setups,
)
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named
from advmoe.studies.tables import RA


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of six seeds, each with the same outcomes under PGD and under a second attack."""

    def make(method, pgd, second=None, autoattack=None, **labels):
        attacks = {"pgd-10": pgd, "pgd-10-margin": second or pgd}
        measurements = {"accuracy": evaluated("1" * len(pgd), attacks)}
        if autoattack:
            measurements["autoattack"] = evaluated("1" * len(pgd), {"autoattack:apgd-ce": autoattack})
        where = {"dataset": "digits", "backbone": "ResNet-18", **labels}
        return row({"method": method, **where}, dict.fromkeys(range(6), measurements))

    return make


LOW, MIDDLE, HIGH = "0" * 1000, "1" * 500 + "0" * 500, "1" * 1000


def verdicts(claim):
    return {each["measure"]: each["verdict"] for each in claim["verdicts"]}


def test_the_ordering_is_judged_under_pgd_and_in_the_worst_case(row_of):
    # Under the second attack the routed models fall behind.
    results = Results([row_of("AT (MoE)", LOW), row_of("AT (S-Dense)", MIDDLE), row_of("AdvMoE", HIGH, second=LOW)])
    claim = ordering(results)
    assert (claim["name"], claim["statement"]) == (
        "ordering", "AT (MoE) < AT (S-Dense) < AdvMoE in robust accuracy.",
    )  # fmt: skip
    assert verdicts(claim) == {"PGD": "holds", "worst case": "does not hold"}
    pgd, worst = claim["verdicts"]
    assert set(pgd["numbers"]) == {"AT (MoE) < AT (S-Dense)", "AT (S-Dense) < AdvMoE"}
    assert pgd["p_value"] < 0.05 and worst["p_value"] < 0.05
    assert pgd["numbers"]["AT (S-Dense) < AdvMoE"]["mean_more"] == 1.0


def test_the_ordering_is_judged_under_autoattack_where_that_was_run(row_of):
    rows = [row_of("AT (MoE)", LOW, autoattack=LOW), row_of("AT (S-Dense)", MIDDLE, autoattack=MIDDLE)]
    assert verdicts(ordering(Results([*rows, row_of("AdvMoE", HIGH, autoattack=HIGH)])))["AutoAttack"] == "holds"
    assert verdicts(ordering(Results([*rows, row_of("AdvMoE", HIGH)])))["AutoAttack"] == "undecided"


def test_what_else_advmoe_is_above_and_by_how_much(row_of):
    """By half of the images of every baseline, but level with AT (Dense)."""
    rows = [row_of(method, LOW) for method in ("AT (S-Dense)", "AT (Sparse)", "AT (MoE)")]
    rows += [row_of(method, MIDDLE) for method in ("AT (Dense)", "AdvMoE")]
    claims = {claim["name"]: claim for claim in leads(Results(rows), ", here")}
    assert {name: verdicts(claim)["PGD"] for name, claim in claims.items()} == {
        "above-other-baselines, here": "holds", "above-baselines-by-a-point, here": "holds",
        "above-dense, here": "undecided", "above-dense-by-a-point, here": "does not hold",
    }  # fmt: skip
    first = claims["above-other-baselines, here"]["verdicts"][0]
    assert set(first["numbers"]) == {"AT (Sparse) < AdvMoE", "AT (MoE) < AdvMoE"}
    assert first["these_models"]["verdict"] == "holds"
    (by,) = claims["above-dense-by-a-point, here"]["verdicts"][0]["numbers"].values()
    assert (by["margin"], by["p_seeds_opposite"]) == (-0.01, 1 / 64)


def test_what_an_inference_saves_is_counted(row, evaluated):
    def costing(method, gmacs):
        measured = evaluated("11", {"pgd-10": "10"}, cost={"gmacs": gmacs})
        return row({"method": method, "dataset": "d", "backbone": "b"}, {0: {"accuracy": measured}})

    results = Results([costing("AT (Dense)", 0.54), costing("AdvMoE", 0.15)])
    assert setups(results) == [(", b, d", results)]
    (verdict,) = half_the_cost(results)["verdicts"]
    assert verdict["verdict"] == "holds" and verdict["numbers"]["share saved"] == pytest.approx(0.7222, abs=1e-4)
    assert saving(0.5, 0.25)["verdict"] == "does not hold" and saving(0.5, 0.249)["verdict"] == "holds"
    assert saving(None, 0.1)["verdict"] == saving(0.5, None)["verdict"] == "undecided"


def test_an_ordering_for_each_data_set_and_backbone(row_of):
    methods = {"AT (MoE)": LOW, "AT (S-Dense)": MIDDLE, "AdvMoE": HIGH}
    rows = [row_of(method, marks) for method, marks in methods.items()]
    rows += [row_of(method, LOW, backbone="VGG-16") for method in methods]
    claims = orderings(Results(rows))
    assert [claim["name"] for claim in claims] == ["ordering, ResNet-18, digits", "ordering, VGG-16, digits"]
    assert [verdicts(claim)["PGD"] for claim in claims] == ["holds", "undecided"]
    assert ordering(Results(rows), " here")["name"] == "ordering here"


def test_bars_and_overview_have_a_place_for_each_method(row_of):
    results = Results([row_of("AT (MoE)", LOW), row_of("AdvMoE", HIGH), row_of("AdvMoE", MIDDLE, backbone="VGG-16")])
    figure = method_bars("f", "Title", results, RA.value, "RA (%)")
    heights = {group: {name: bar["y"] for name, bar in each.items()} for group, each in figure.data.items()}
    assert heights == {
        "ResNet-18, digits": {"AT (MoE)": 0.0, "AdvMoE": 100.0}, "VGG-16, digits": {"AdvMoE": 50.0},
    }  # fmt: skip
    shown = overview("Title", results, [RA], "table1")
    assert [(row["backbone"], row["method"], row["ra_pgd"]["mean"]) for row in shown["rows"]] == [
        ("ResNet-18", "AT (MoE)", 0.0), ("ResNet-18", "AdvMoE", 100.0), ("VGG-16", "AdvMoE", 50.0),
    ]  # fmt: skip


def test_rows_scales_and_names():
    scale = scale_named("smoke")
    run = scale.run("AdvMoE")
    assert list(measured(scale, run).measures) == ["accuracy"]
    row = measured(scale, run, timed=True, sweep=scale.sweep(run))
    assert {name: each.kind for name, each in row.measures.items()} == {
        "accuracy": "evaluate", "cost": "cost", "sweep": "sweep",
    }  # fmt: skip
    choices = scales_of(scale, smoke=(0.5,), cpu=(0.2, 0.8), paper=())
    assert choices == [(0.5, {"model": {"scale": 0.5, "experts_init": "independent"}})]
    assert named({"method": "AdvMoE", "variant": "EMA", "scale": 1}) == "AdvMoE, EMA"
    assert named({"method": "AT (S-Dense)"}) == "AT (S-Dense)"

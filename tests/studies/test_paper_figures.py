"""Figures 2, 6, 7 and 8 on made-up results."""

import pytest

from advmoe.studies.catalogue import STUDIES
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named

SMOKE = scale_named("smoke")


def show(name, *rows):
    return STUDIES[name].show(SMOKE, Results(rows))


def points(series):
    return {name: [(point["x"], point["y"]) for point in each] for name, each in series.items()}


def swept(robust, reasons=()):
    """A sweep: robust accuracy under PGD by radius in 1/255, ten points less in the worst case."""

    def curve(less):
        numbers = [{"eps": radius / 255, "robust_accuracy": share - less} for radius, share in robust.items()]
        return {"points": numbers, "masking": {"reasons": list(reasons)}}

    return "sweep", {"curves": {"pgd-10": curve(0.0), "pgd-10-soft": curve(0.1), "worst case": curve(0.1)}}, {}


def test_fig2_is_robust_accuracy_over_the_radius_in_steps_of_a_pixel(row):
    seeds = {
        0: {"sweep": swept({0: 0.8, 2: 0.6, 8: 0.4})},
        1: {"sweep": swept({0: 0.6, 2: 0.5, 8: 0.1}, ["It rises."])},
    }
    outcome = show("fig2", row({"method": "AdvMoE"}, seeds), row({"method": "AT (MoE)"}, {0: {}}))
    pgd, worst = outcome.figures
    assert (pgd.name, worst.name) == ("fig2-pgd", "fig2-worst-case")
    assert [point["x"] for point in pgd.data["AdvMoE"]] == [0, 2, 8]
    assert [point["y"] for point in pgd.data["AdvMoE"]] == pytest.approx([70, 55, 25])
    assert [point["y"] for point in worst.data["AdvMoE"]] == pytest.approx([60, 45, 15])
    assert pgd.data["AdvMoE"][2]["low"] == pytest.approx(10) and pgd.data["AdvMoE"][2]["high"] == pytest.approx(40)
    assert list(pgd.data) == ["AdvMoE"]  # the other was not swept
    assert outcome.notes == ["Gradient masking suspected in AdvMoE, seed 1: It rises."]  # once, though on three curves


def test_radii_of_a_sweep_are_whole_pixels_in_the_figure(row):
    scale = scale_named("cpu")
    radii = scale.sweep(scale.run("AdvMoE")).options["epsilons"]
    sweep_row = row({"method": "AdvMoE"}, {0: {"sweep": swept({255 * eps: 0.5 for eps in radii})}})
    assert [point["x"] for point in show("fig2", sweep_row).figures[0].data["AdvMoE"]] == [0, 2, 4, 6, 8, 12, 16]


def traced(shares, unchanged):
    """Pathways: two bins of the IoU with the mask, and whether each image's pathway survived the attack."""
    kinds = {"clean": shares, "adversarial": shares[::-1], "random_pathways": [0.5, 0.5]}
    against = {
        kind: {"mean": each[1], "std": 0.1, "histogram": {"edges": [0, 0.5, 1], "shares": each}}
        for kind, each in kinds.items()
    }
    arrays = {"index": list(range(len(unchanged))), "unchanged": [mark == "1" for mark in unchanged]}
    content = {
        "clean": {"distinct": 3, "entropy": 1.5}, "against": against,
        "attack": {"unchanged": unchanged.count("1") / len(unchanged)},
    }  # fmt: skip
    return "pathways", content, {"pathways_examples": arrays}


def test_fig6_is_the_mean_distribution_and_whose_pathways_survive(row):
    steady = {
        seed: {"pathways": traced([0.25 + 0.25 * (seed == 1), 0.75 - 0.25 * (seed == 1)], "111111")}
        for seed in range(5)
    }
    fragile = {seed: {"pathways": traced([1.0, 0.0], "000000")} for seed in range(5)}
    rows = [row({"method": "AdvMoE", "routed": True}, steady), row({"method": "AT (MoE)", "routed": True}, fragile)]
    outcome = show("fig6", *rows, row({"method": "AT (Sparse)", "routed": False}, {0: {}}))
    first, second = outcome.figures
    assert first.kind == "histogram" and first.data["clean"]["shares"] == pytest.approx([0.3, 0.7])
    assert first.data["adversarial"]["shares"] == pytest.approx([0.7, 0.3])
    assert second.data["clean"] == {"edges": [0, 0.5, 1], "shares": [1.0, 0.0]}
    claim = outcome.claims[0]
    assert [each["verdict"] for each in claim["verdicts"]] == ["holds", "holds"]
    assert claim["verdicts"][0]["p_value"] == 1 / 32 and claim["verdicts"][0]["these_models"]["p_value"] == 1 / 64
    pathways = outcome.tables[0]["rows"]
    assert [line["method"] for line in pathways] == ["AdvMoE", "AT (MoE)"]
    assert [line["kept"]["mean"] for line in pathways] == [100.0, 0.0]
    assert [line["clean"]["mean"] for line in pathways] == pytest.approx([0.7, 0.0])
    swapped = show(
        "fig6", row({"method": "AdvMoE", "routed": True}, fragile), row({"method": "AT (MoE)", "routed": True}, steady)
    )
    assert [each["verdict"] for each in swapped.claims[0]["verdicts"]] == ["does not hold", "does not hold"]


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of one seed that is right on so many of ten images, on one less in the worst case."""

    def make(method, right, **labels):
        attacks = {"pgd-10": "1" * right + "0" * (10 - right), "pgd-10-margin": "0" + "1" * 9}
        labels = {"method": method, "backbone": "ResNet-18", **labels}
        return row(labels, {0: {"accuracy": evaluated("1" * 10, attacks)}})

    return make


def test_fig7_is_a_line_for_each_number_of_experts_beside_dense(row_of):
    moe = [row_of("AdvMoE", right, experts=n, scale=r) for n, r, right in ((2, 0.5, 4), (2, 0.8, 5), (4, 0.5, 6))]
    outcome = show("fig7", row_of("AT (Dense)", 7), *moe)
    pgd, worst = outcome.figures
    assert points(pgd.data) == {"N = 2": [(0.5, 40), (0.8, 50)], "N = 4": [(0.5, 60)]}
    assert points(worst.data) == {"N = 2": [(0.5, 30), (0.8, 40)], "N = 4": [(0.5, 50)]}
    assert pgd.options["references"] == [["AT (Dense)", pytest.approx(70)]]
    assert worst.options["references"] == [["AT (Dense)", pytest.approx(60)]]
    assert show("fig7", *moe).figures[0].options["references"] == []


def test_fig7_attacks_dense_as_long_as_each_network_beside_it():
    scale = scale_named("cpu")
    (rows,) = (stage(scale, Results()) for stage in STUDIES["fig7"].stages)
    dense = [row for row in rows if row.run.labels["method"] == "AT (Dense)"]
    third = {row.run.labels["experts"]: row.measures["accuracy"].options["attacks"][2] for row in dense}
    assert third == {2: "restarts", 4: "restarts:48", 8: "restarts:112"}


def test_fig8_is_a_figure_for_each_backbone(row_of):
    def rows(backbone, more):
        dense = row_of("AT (Dense)", 7 + more, backbone=backbone)
        return [dense, *(row_of(name, 3 + more, backbone=backbone, scale=0.5) for name in ("AT (S-Dense)", "AdvMoE"))]

    outcome = show("fig8", *rows("ResNet-18", 0), *rows("WRN", 1))
    first, second = outcome.figures
    assert points(first.data) == {"AT (S-Dense)": [(0.5, 30)], "AdvMoE": [(0.5, 30)]}
    assert points(second.data) == {"AT (S-Dense)": [(0.5, 40)], "AdvMoE": [(0.5, 40)]}
    assert second.options["references"] == [["AT (Dense)", pytest.approx(80)]]
    assert "WRN" in second.title
    names = [claim["name"] for claim in outcome.claims]
    assert [name for name in names if name.startswith("ordering")] == [
        "ordering, ResNet-18, r = 0.5",
        "ordering, WRN, r = 0.5",
    ]

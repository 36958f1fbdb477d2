"""A pathway that pays: what is compared, who is chosen by which images, what is said of the gate and the front."""

import pytest

from advmoe.studies.catalogue import STUDIES
from advmoe.studies.pathway import (
    ARMS,
    DENSE,
    LONGER,
    RESTARTED,
    S_DENSE,
    SMOOTHED,
    TAUGHT,
    against,
    baseline,
    best,
    chosen,
    front,
    routed,
    s_dense,
)
from advmoe.studies.plan import Planner
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named

CPU, SMOKE = scale_named("cpu"), scale_named("smoke")
GATE, EVERY, AFTER, FINALS = STUDIES["pathway"].stages


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of an arm: its robust accuracy on validation images and the test images it gets right, of ten."""

    def make(arm, validated, right, seeds=1):
        marks = "1" * right + "0" * (10 - right)
        epochs = [{"seconds": 1.0, "val": {"robust_accuracy": share}} for share in (validated, 0.0)]
        accuracy = evaluated("1" * 10, {"pgd-50": marks}, cost={"gmacs": 0.5 if arm == DENSE else 0.1})
        return row({"variant": arm}, {key: {"epochs": epochs, "accuracy": accuracy} for key in range(seeds)})

    return make


def names(rows):
    return [row.run.labels["variant"] for row in rows]


def test_the_first_stages_are_of_one_seed_and_the_last_of_all(row_of):
    rows = Results(
        [row_of(name, share, 1) for name, share in zip(ARMS, (0.1, 0.2, 0.3, 0.5, 0.4, 0.1, 0.2, 0.1), strict=True)]
    )
    gate, arms, after, finals = (stage(CPU, rows) for stage in (GATE, EVERY, AFTER, FINALS))
    assert (
        names(gate)[:2] == [S_DENSE, DENSE]
        and len(gate) == 4
        and names(arms) == [*ARMS, RESTARTED, LONGER, f"{S_DENSE}, half width", "fixed-top, half width"]
    )
    assert {row.seeds for row in (*gate, *arms, *after)} == {1}
    assert [row.run.settings["model"]["width"] for row in arms[-3:]] == [32, 16, 16]
    # Of learnt routers the image router is best, of all fixed-top.
    assert names(after) == [TAUGHT, "AdvMoE, image router, codes, forgiving", "fixed-top, taught"]
    measured = [row for row in finals if "accuracy" in row.measures]
    assert names(measured) == [S_DENSE, TAUGHT, "AdvMoE", "fixed-top", "fixed-top, taught"]
    assert {row.seeds for row in measured} == {None}
    assert {(row.seeds, *row.measures) for row in finals if row not in measured} == {(1, "autoattack")}
    attacked = measured[0].measures["accuracy"].options, finals[-1].measures["autoattack"].options
    assert [each["num_examples"] for each in attacked] == [2_000, 1_000]


def test_every_arm_can_be_and_costs_a_pathway(tmp_path):
    planner = Planner(tmp_path, [0])
    keys = set()
    for name in ARMS:
        for forgiving in (False, True):
            run = planner.run(routed(CPU, name, forgiving=forgiving, taught=True), 0)
            keys.add(run.key)
            model = run.config["model"]
            assert (model["kind"], model["scale"], model["width"]) == ("moe", 0.5, 32)
            teacher, training = run.config["training"]["teacher"], run.config["training"]
            assert teacher == str(planner.run(routed(CPU, name, taught=True).teacher, 0).path)
            assert training["runner_up"] == (0.25 if forgiving else 0)
            epochs = training["epochs"] + (run.start.config["training"]["epochs"] if run.start else 0)
            assert epochs == planner.run(s_dense(CPU), 0).config["training"]["epochs"] == 20
    assert len(keys) == 2 * len(ARMS)


def test_the_best_is_chosen_on_validation_images_among_those_that_nobody_taught(row_of):
    rows = [row_of("AdvMoE", 0.3, 1), row_of("fixed-top", 0.2, 9), row_of("AdvMoE, taught", 0.9, 9)]
    assert chosen(SMOKE, Results(rows)) == ("AdvMoE", False) and best(Results(rows), ["fixed-top"]) == "fixed-top"
    assert chosen(SMOKE, Results([*rows, row_of("fixed-top, forgiving", 0.4, 1)])) == ("fixed-top", True)
    assert chosen(SMOKE, Results()) is None and best(Results(rows), ["linear"]) is None
    assert names(FINALS(CPU, Results()))[:3] == [S_DENSE, TAUGHT, "AdvMoE"]


def test_autoattack_is_shown_of_whom_it_was_run_on(row, evaluated):
    strong = {"autoattack": evaluated("1" * 10, {"autoattack": "1" * 3 + "0" * 7})}
    found = STUDIES["pathway"].show(CPU, Results([row({"variant": "fixed-top"}, {0: strong})]))
    (line,) = found.tables[1]["rows"]
    assert (line["variant"], line["ra_aa"]["mean"]) == ("fixed-top", pytest.approx(30))
    assert found.tables[0]["rows"] == []


def test_the_baseline_is_chosen_as_the_arm_is_and_may_cost_what_that_costs(row_of):
    rows = [row_of(S_DENSE, 0.3, 1), row_of(SMOOTHED, 0.32, 1), row_of(RESTARTED, 0.31, 1), row_of(LONGER, 0.4, 1)]
    arms = every_arm(row_of)
    assert against(CPU, Results([*rows, row_of("fixed-top", 0.5, 1), *arms])) == SMOOTHED
    assert against(CPU, Results([*rows, row_of("AdvMoE", 0.5, 1), *arms])) == LONGER  # an epoch of it costs two of AT
    assert against(CPU, Results([row_of("fixed-top", 0.5, 1), *arms])) == S_DENSE
    finals = FINALS(CPU, Results([*rows, row_of("AdvMoE", 0.5, 1), *arms]))
    assert names(finals)[:5] == [S_DENSE, LONGER, TAUGHT, "AdvMoE", "AdvMoE, taught"]


def test_no_arm_is_chosen_before_all_are_measured(row_of):
    """One whose training diverged is told, not left out."""
    rows = [row_of("AdvMoE", 0.5, 1), *every_arm(row_of, "linear")]
    found = STUDIES["pathway"].show(CPU, Results(rows))
    assert chosen(CPU, Results(rows)) is None and found.claims == []
    assert "No arm is chosen before all are measured: linear missing." in found.notes


def every_arm(row_of, *but):
    """The registered arms, not good ones."""
    return [row_of(name, 0.01, 1) for name in ARMS if name not in but]
    epochs = [baseline(CPU, name).settings["training"]["epochs"] for name in (S_DENSE, SMOOTHED, RESTARTED, LONGER)]
    assert epochs == [20, 20, 10, 40] and baseline(CPU, RESTARTED).start.settings["training"]["epochs"] == 10


def test_the_front():
    points = {"a": (1.0, 0.5), "b": (2.0, 0.5), "c": (2.0, 0.6), "d": (0.5, 0.1), "e": (0.6, 0.05), "f": (1.0, 0.5)}
    assert front(points) == ["a", "c", "d", "f"]


@pytest.mark.parametrize(("dense", "said"), [(6, "is passed. In the worst case Dense is +20.0"), (4, "is not passed")])
def test_what_is_said_of_the_gate_and_of_the_arm_that_is_best(row_of, dense, said):
    rows = [
        row_of(S_DENSE, 0.3, 4), row_of(DENSE, 0.3, dense), row_of("AdvMoE", 0.2, 9), row_of("fixed-top", 0.3, 8),
        row_of(S_DENSE, 0.3, 3, seeds=6), row_of("fixed-top", 0.3, 8, seeds=6),
        *every_arm(row_of, "AdvMoE", "fixed-top"),
    ]  # fmt: skip
    found = STUDIES["pathway"].show(CPU, Results(rows))
    assert any(said in note for note in found.notes)
    (own, taught) = found.claims
    assert [each["verdict"] for each in own["verdicts"]] == ["holds", "holds"]  # 8 of 10 against 3, over five seeds
    assert own["verdicts"][0]["numbers"][f"{S_DENSE} < fixed-top"]["seeds"] == [1, 2, 3, 4, 5]  # not the one that chose
    assert [each["verdict"] for each in taught["verdicts"]] == ["undecided", "undecided"]  # not trained
    (shown,) = found.tables  # and no other, as nobody ran AutoAttack
    assert [(line["variant"], line["worst"]["n"]) for line in shown["rows"]][:2] == [(S_DENSE, 6), (DENSE, 1)]
    assert any("against GMACs" in note and note.endswith("AdvMoE.") for note in found.notes)

"""What the files of runs say, as numbers, outcomes of images, and cells of tables."""

from dataclasses import replace
from math import sqrt

import pytest

from advmoe.studies.plan import PlannedMeasure
from advmoe.studies.results import (
    PGD,
    Results,
    accuracy_under,
    best_validation,
    categories,
    cell,
    clean_outcomes,
    of_cost,
    of_evaluation,
    outcomes,
    pace_bounds,
    point,
    seconds_per_epoch,
    unchanged_pathways,
)
from advmoe.studies.significance import mean_std

ATTACKS = {"pgd-10-margin": "1100", "pgd-10": "1010", "pgd-10-soft": "1000", "routed": "1001"}
COST = {
    "models": {"moe": {"gmacs": 0.15}, "dense": {"gmacs": 0.56}},
    "batches": [
        {"batch": 1, "ms_per_image": {"dense": 9.0, "moe": 8.0}},
        {"batch": 64, "ms_per_image": {"dense": 5.0, "moe": 3.0}},
    ],
}


def epoch(seconds, robust):
    return {"seconds": seconds, "val": None if robust is None else {"robust_accuracy": robust}}


@pytest.fixture
def run(row, evaluated):
    """A run with everything, of 4 images of which the third is wrong without an attack."""
    measurements = {
        "accuracy": evaluated("1101", ATTACKS, cost={"gmacs": 0.2}, masking_gap=0.25),
        "cost": ("cost", COST, {}),
        "epochs": [epoch(3.0, 0.1), epoch(9.0, 0.4), epoch(2.0, 0.3)],
    }
    return row({"method": "AT (MoE)"}, {0: measurements}).by_seed[0]


def test_a_ratio_of_times_has_bounds():
    """The least of one by the most of the other; a run timed against itself has one entry."""
    timed = {"a": {"least": 2.0, "most": 3.0}, "b": {"least": 1.0, "most": 4.0}}
    assert pace_bounds({"seconds": timed}) == (0.5, 3.0)
    assert pace_bounds({"seconds": {"a": timed["a"]}}) == (2 / 3, 1.5)
    assert pace_bounds({"ratio": 1.0}) is None and pace_bounds(None) is None


def test_numbers_of_a_run(run):
    assert accuracy_under(PGD)(run) == 0.25  # 1010 and right without an attack: the first alone
    assert accuracy_under(rf"{PGD}-margin")(run) == 0.5
    assert accuracy_under("pgd-20")(run) is None and accuracy_under(PGD, "autoattack")(run) is None
    assert of_evaluation("clean_accuracy")(run) == 0.75
    assert of_evaluation("worst_case")(run) == 0.25
    assert of_evaluation("masking_gap")(run) == 0.25
    assert of_evaluation("worst_case", "autoattack")(run) is None
    assert of_cost("gmacs")(run) == 0.15 and of_cost("ms_per_image")(run) == 3.0  # its own kind, the largest batch
    assert seconds_per_epoch(run) == 3.0  # the median
    assert best_validation(run) == 0.4


def test_numbers_of_a_run_that_was_measured_in_part(row, evaluated):
    bare = row({}, {0: {"epochs": [epoch(1.0, None), epoch(2.0, None)]}}).by_seed[0]
    assert best_validation(bare) is None and seconds_per_epoch(bare) == 1.5
    assert accuracy_under(PGD)(bare) is None and of_cost("gmacs")(bare) is None
    assert bare.measurement("accuracy") is None and bare.arrays("accuracy", "evaluation-examples.npz") == {}
    no_cost = row({}, {0: {"accuracy": evaluated("1", {}, cost={"gmacs": 0.2})}}).by_seed[0]
    assert of_cost("gmacs")(no_cost) == 0.2 and of_cost("ms_per_image")(no_cost) is None
    assert seconds_per_epoch(no_cost) is None


def test_an_unfinished_measurement_is_as_none(run):
    planned: PlannedMeasure = run.measures["accuracy"]
    (planned.path / "done.json").unlink()
    assert run.measurement("accuracy") is None and run.arrays("accuracy", "evaluation-examples.npz") == {}
    assert of_cost("gmacs")(run) == 0.15


def test_outcomes_of_images_under_one_attack_and_in_the_worst_case(row, evaluated):
    result = row(
        {},
        {
            3: {"accuracy": evaluated("1101", ATTACKS, first=7)},
            5: {"accuracy": evaluated("1111", {"pgd-10": "0110"}, first=7)},
            6: {},
        },
    )
    # Positions in the test set; the attack's name is matched whole, and an image wrong without it is wrong.
    assert outcomes(result, PGD) == {
        3: {7: True, 8: False, 9: False, 10: False},
        5: {7: False, 8: True, 9: True, 10: False},
    }
    assert outcomes(result, rf"{PGD}-margin") == {3: {7: True, 8: True, 9: False, 10: False}}
    # All attacks there are, which is PGD alone for the second seed.
    assert outcomes(result, None) == outcomes(result, PGD)
    assert outcomes(result, PGD, "autoattack") == {} and outcomes(None, PGD) == {}


def test_categories_of_a_dissection(row):
    attacks = {"pgd-10-soft": [4, 4, 1, 2], "pgd-10": [1, 2, 3, 1], "clean_correct": [True, True, True, False]}
    arrays = {"dissection_examples": attacks}
    result = row({}, {0: {"dissection": ("dissect", {}, arrays)}, 1: {}})
    assert categories(result, [PGD], [1]) == {0: {0: True, 1: False, 2: False, 3: True}}
    assert categories(result, [PGD], [1, 3]) == {0: {0: True, 1: False, 2: True, 3: True}}
    assert categories(result, [PGD], [3], right=True) == {0: {0: False, 1: False, 2: True}}
    # Of two attacks what either changes is changed: 4, 4, 3, 2.
    both = [PGD, rf"{PGD}-soft"]
    assert categories(result, both, [4]) == {0: {0: True, 1: True, 2: False, 3: False}}
    assert categories(result, both, [3]) == {0: {0: False, 1: False, 2: True, 3: False}}
    assert categories(result, ["routed"], [1]) == {} and categories(None, [PGD], [1]) == {}


def test_pathways_that_an_attack_left_alone(row):
    arrays = {"pathways_examples": {"index": [4, 9], "unchanged": [True, False]}}
    result = row({}, {0: {"pathways": ("pathways", {}, arrays)}, 1: {}})
    assert unchanged_pathways(result) == {0: {4: True, 9: False}}
    assert unchanged_pathways(result, "others") == {} and unchanged_pathways(None) == {}


@pytest.fixture
def three(row, evaluated):
    """Robust accuracies of 50, 75 and 25 % under PGD, of a fourth seed nothing."""
    attacks = {0: "1100", 1: "1110", 2: "1000"}
    measurements = {seed: {"accuracy": evaluated("1111", {"pgd-10": marks})} for seed, marks in attacks.items()}
    return row({"method": "AdvMoE"}, {**measurements, 3: {}})


def test_cells_hold_mean_and_deviation_beside_the_paper_s(three):
    value = accuracy_under(PGD)
    assert three.values(value) == {0: 0.5, 1: 0.75, 2: 0.25}
    mean, std = mean_std([50.0, 75.0, 25.0])
    assert (mean, std) == (50.0, 25.0)  # sqrt((0 + 625 + 625) / 2)
    paper = {"ra_pgd50": 51.83, "ra_pgd50_std": 0.12}
    assert cell(three, value, 100, paper, "ra_pgd50") == {
        "mean": 50.0, "std": 25.0, "n": 3, "paper": 51.83, "paper_std": 0.12,
    }  # fmt: skip
    assert cell(three, value) == {"mean": 0.5, "std": 0.25, "n": 3, "paper": None, "paper_std": None}
    single = replace(three, by_seed={1: three.by_seed[1]})
    assert cell(single, value, 100) == {"mean": 75.0, "std": None, "n": 1, "paper": None, "paper_std": None}


def test_a_cell_of_nothing_measured_still_shows_the_paper_s(three):
    nothing = accuracy_under("autoattack")
    assert cell(three, nothing) is None and cell(three, nothing, 100, {"sa": 80.0}, "ra_pgd50") is None
    assert cell(three, nothing, 100, {"sa": 80.0}, "sa") == {
        "mean": None, "std": None, "n": 0, "paper": 80.0, "paper_std": None,
    }  # fmt: skip


def test_points_reach_one_deviation_to_each_side(three):
    value = accuracy_under(PGD)
    assert point(three, value, 0.5) == {"x": 0.5, "y": 50.0, "low": 25.0, "high": 75.0}
    single = replace(three, by_seed={1: three.by_seed[1]})
    assert point(single, value, 2, 1.0) == {"x": 2, "y": 0.75, "low": None, "high": None}
    assert point(three, accuracy_under("autoattack"), 1) == {"x": 1, "y": None, "low": None, "high": None}
    spread = replace(three, by_seed={seed: three.by_seed[seed] for seed in (0, 1)})
    assert point(spread, value, 1)["high"] == pytest.approx(62.5 + 25 / sqrt(2))


def test_rows_by_their_labels(row):
    rows = [row({"method": method, "scale": r}, {}) for r in (0.5, 0.8) for method in ("AT", "AdvMoE")]
    results = Results([*rows, row({"method": "AT"}, {})])
    assert [each.labels for each in results.select(method="AT", scale=0.8)] == [{"method": "AT", "scale": 0.8}]
    assert results.one(method="AdvMoE") is rows[1] and results.one(method="none") is None
    assert results.distinct("scale") == [0.5, 0.8] and results.distinct("method") == ["AT", "AdvMoE"]
    assert list(results) == [*rows, results.rows[-1]] and list(Results()) == []


def test_outcomes_without_an_attack(row, evaluated):
    results = row({"method": "a"}, {0: {"accuracy": evaluated("110", {"pgd-10": "100"}, first=5)}, 1: {}})
    assert clean_outcomes(results) == {0: {5: True, 6: True, 7: False}} and clean_outcomes(None) == {}

"""What sizes are called: from the settings of runs, as far as these are alike."""

import pytest

from advmoe.studies.labels import shared
from advmoe.studies.plan import Planner
from advmoe.studies.rows import Measure, Row
from advmoe.studies.study_file import of_size, unfinished


def rows(tiny_run, *changes, measures=None):
    return [Row(tiny_run(f"run {k}", **change), measures or {}) for k, change in enumerate(changes)]


def test_what_all_runs_share_is_told(tiny_run, planner):
    routed = {"model": {"kind": "moe", "scale": 0.25}, "training": {"method": "at", "attack_steps": 3}}
    few = {"accuracy": Measure("evaluate", {"num_examples": 1500}), "strong": Measure("evaluate", {"num_examples": 20})}
    size = of_size(planner.rows(rows(tiny_run, routed, {"data": {"train_examples": 1000}}, measures=few)))
    # How many images they are trained on differs, and so is not told; K, r and N are the routed run's.
    assert size == (
        "1 epoch, linf, eps 0.1, K = 3, r = 0.25, N = 2; PGD of 2 steps, 1,500 test images (accuracy), "
        "20 test images (strong)"
    )


@pytest.mark.parametrize(("number", "images"), [(None, "all training images"), (1000, "1,000 training images")])
def test_numbers_of_images(tiny_run, planner, number, images):
    size = of_size(planner.rows(rows(tiny_run, {"data": {"train_examples": number}})))
    assert size == f"1 epoch, {images}, linf, eps 0.1; PGD of 2 steps"


def test_a_longer_standard_training_is_told_where_another_run_starts_from_it(tiny_run, planner):
    first = tiny_run("standard", training={"method": "standard", "epochs": 6})
    then = tiny_run("robust", start=first, training={"method": "at", "attack_steps": 3})
    assert of_size(planner.rows([Row(then, {})])).startswith("1 epoch, 6 without attacks, ")


def test_nothing_is_told_of_nothing():
    assert of_size([]) == "" and shared([]) == {}


def test_seeds_that_are_not_finished_are_told(tiny_run, tmp_path):
    (first,) = Planner(tmp_path / "runs", range(3)).rows(
        [Row(tiny_run("some"), {"accuracy": Measure("evaluate", {"num_examples": 20})})]
    )
    assert unfinished([first]) == []  # none is: there is no row to speak of
    runs = list(first.runs.values())
    for run in runs[:-1]:
        run.path.mkdir(parents=True)
        (run.path / "manifest.json").write_text('{"finished": "then"}')
        (run.path / "put-away.json").write_text('{"model_sha256": "x"}')
        measure = first.measures[run.seed]["accuracy"]
        measure.path.mkdir(parents=True)
        (measure.path / "done.json").write_text('{"model_sha256": "x"}')
    said = "Not finished, and left out of means and verdicts: some, seed {}."
    assert unfinished([first]) == [said.format(runs[-1].seed)]
    (first.measures[runs[0].seed]["accuracy"].path / "done.json").unlink()
    assert unfinished([first]) == [said.format("0, 2")]


def test_shared_settings_are_those_that_all_runs_have():
    several = [{"a": {"x": 1, "y": 2}, "b": {"z": 3}}, {"a": {"x": 1, "y": 5}}]
    assert shared(several) == {"a": {"x": 1}}

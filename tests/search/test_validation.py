"""Trials are measured on validation images: the numbers of an evaluation on these, and no test image is looked at."""

from dataclasses import replace

import pytest

from advmoe import ThreatModel, evaluate, load_run
from advmoe.rundir import DIGEST, digest_at
from advmoe.search import validation
from advmoe.search.trials import UNDER_WAY
from advmoe.search.validation import validate
from advmoe.training.run import load_data, train

HERE = {"threads": 1, "accelerator": "cpu"}


@pytest.fixture
def run(make_settings, tmp_path):
    settings = make_settings({"training": {"epochs": 1, "method": "standard"}}, objective="clean_accuracy")
    return train(settings.config, run_dir=tmp_path / "run", **HERE)


def test_a_measurement_is_an_evaluation_of_the_validation_images_alone(make_settings, run, monkeypatch):
    groups = {"training": {"epochs": 1, "method": "standard"}}
    settings = make_settings(groups, objective="clean_accuracy", attacks=["pgd", "pgd-3-margin"])
    images = load_data(settings.config).val

    def without_test(config):
        return replace(load_data(config), test=None)

    monkeypatch.setattr(validation, "load_data", without_test)
    ours = validate(run, settings, **HERE)
    theirs = evaluate(
        load_run(run), images, attacks=["pgd-2", "pgd-3-margin"], threat=ThreatModel("linf", 0.1), steps=2,
        step_size=0.025, allow=["gradients"], device="cpu",
    )  # fmt: skip
    for name in ("num_examples", "clean_accuracy", "robust_accuracy", "worst_case"):
        assert ours[name] == theirs[name], name
    assert ours["num_examples"] == 40 and ours["data"] == {"name": "digits", "split": "val"}
    assert ours[DIGEST] == digest_at(run) and not (run / UNDER_WAY).exists()


def test_a_number_of_images_may_be_drawn(make_settings, run):
    groups = {"training": {"epochs": 1, "method": "standard"}}
    settings = make_settings(groups, objective="clean_accuracy", num_examples=7, attacks=["pgd-1"])
    assert validate(run, settings, **HERE)["num_examples"] == 7

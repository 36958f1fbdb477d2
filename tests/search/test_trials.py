"""Trials: how they end, and that one that was killed goes on with what it has."""

import json

import pytest

from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.pool import Preempted
from advmoe.search import trials, validation
from advmoe.search.storage import known, open_study
from advmoe.search.trials import do
from advmoe.training.preemption import Requests

HERE = {"threads": 1, "accelerator": "cpu"}


def lines(task):
    return [json.loads(line) for line in (task.path / "metrics.jsonl").read_text().splitlines()]


def test_a_trial_is_trained_with_what_it_draws_and_measured_on_validation_images(make_settings, make_trial):
    task = make_trial(make_settings())
    assert task.state() == "missing" and task.ended() is None
    do(task, **HERE)
    end, frozen = task.ended(), known(open_study(task.folder, task.settings), 0)
    measured = json.loads((task.path / "validation.json").read_text())
    assert (end["state"], frozen.state.name, task.state()) == ("finished", "COMPLETE", "finished")
    assert end["value"] == frozen.value == measured["worst_case"] == end["measured"]["worst_case"]
    assert measured["data"]["split"] == "val" and measured["num_examples"] == 40
    assert Config.load(task.path / "config.yaml").training.lr == end["parameters"]["training.lr"]
    assert end["epochs"] == {str(line["epoch"]): line["val"]["robust_accuracy"] for line in lines(task)}
    assert len(end["epochs"]) == 2 and end["seconds"] > 0
    before = task.result.stat().st_mtime_ns
    task.result.unlink()  # killed between the journal and this file
    do(task, **HERE)
    assert task.ended() == end and task.result.stat().st_mtime_ns != before


def test_a_trial_told_to_stop_goes_on_where_it_was(make_settings, make_trial, monkeypatch):
    task = make_trial(make_settings())
    with monkeypatch.context() as patched:
        patched.setattr(Requests, "reason", lambda self: "stopped by SIGTERM")
        with pytest.raises(Preempted, match="stopped by SIGTERM within epoch 1"):
            do(task, **HERE)
    assert task.state() == "interrupted"
    drawn = known(open_study(task.folder, task.settings), 0)
    assert drawn.state.name == "RUNNING"
    with monkeypatch.context() as patched:  # killed once it was trained
        patched.setattr(validation, "validate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            do(task, **HERE)
    trained = lines(task)
    do(task, **HERE)
    assert task.ended()["state"] == "finished" and task.ended()["parameters"] == drawn.params
    assert lines(task) == trained and [line["epoch"] for line in trained] == [1, 2]


def test_a_pruned_trial_stops_after_the_epoch(make_settings, make_trial, monkeypatch):
    task = make_trial(make_settings(pruner="median"))
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda self: True)
    do(task, **HERE)
    end = task.ended()
    assert (end["state"], end["value"], list(end["epochs"])) == ("pruned", None, ["1"])
    assert len(lines(task)) == 1 and not (task.path / "validation.json").exists()


def test_a_trial_that_cannot_be_is_failed_and_not_tried_again(make_settings, make_trial):
    varied = {"training.balance": {"choices": [0.1, 0.2]}}  # of routers, which a plain model lacks
    task = make_trial(make_settings(varied=varied))
    with pytest.raises(InputError, match=r"model\.kind must be moe"):
        do(task, **HERE)
    assert task.ended()["state"] == "failed" and task.ended()["error"].startswith("model.kind must be moe")
    do(task, **HERE)  # is over


def test_a_failure_of_the_machine_leaves_the_trial_to_be_gone_on_with(make_settings, make_trial, monkeypatch):
    task = make_trial(make_settings())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trials, "_train", full)
    with pytest.raises(OSError, match="No space left"):
        do(task, **HERE)
    assert task.ended() is None and known(open_study(task.folder, task.settings), 0).state.name == "RUNNING"

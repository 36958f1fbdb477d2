"""The work of a search that nobody has begun."""

import pytest

from advmoe.search.trials import TrialTask
from advmoe.search.work import works


def test_trials_are_as_much_as_the_mean_of_the_space_s_ends(make_settings, tmp_path):
    def trained(varied, trials=1):
        settings = make_settings(varied=varied)
        found = works([TrialTask(number, tmp_path, settings) for number in range(trials)])
        assert [work.id for work in found] == [f"{number:04d}" for number in range(trials)]
        return [sum(n for (_, kind), n in work.passes.items() if kind == "train") for work in found]

    # 160 images, of which 40 are held out, in batches of 40: 120 an epoch.
    assert trained({"training.lr": {"low": 0.1, "high": 0.2}}, trials=2) == [240, 240]
    assert trained({"training.epochs": {"low": 1, "high": 5}}) == [360]
    # A plain network has no routers to balance: that end is left out.
    varied = {"training.balance": {"choices": [0.0, 0.1]}, "training.epochs": {"low": 1, "high": 5}}
    assert trained(varied) == [120]


def test_what_has_ended_is_no_more_work(make_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(TrialTask, "state", lambda self: "finished" if self.number == 0 else "missing")
    (left,) = works([TrialTask(number, tmp_path, make_settings()) for number in range(2)])
    assert left.id == "0001" and sum(left.weights.values()) == pytest.approx(8)

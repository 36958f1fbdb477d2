"""The journal: each trial is found by its number, with what it has drawn, whoever opens it."""

import sys

import pytest

from advmoe.errors import InputError
from advmoe.search.storage import begun, known, open_study, ready, require_optuna


def test_trials_are_put_into_the_journal_once(make_settings, tmp_path):
    settings = make_settings()
    for _ in range(2):
        ready(open_study(tmp_path, settings), 3)
    states = [trial.state.name for trial in open_study(tmp_path, settings).trials]
    assert states == ["WAITING"] * 3
    ready(open_study(tmp_path, settings), 5)
    assert [trial.number for trial in open_study(tmp_path, settings).trials] == [0, 1, 2, 3, 4]


def test_a_trial_begun_again_has_the_values_that_it_had(make_settings, tmp_path):
    varied = {
        "training.lr": {"low": 0.01, "high": 0.2, "log": True}, "training.epochs": {"low": 1, "high": 9},
        "data.augment": {"choices": [True, False]}, "training.beta": {"low": 1, "high": 9, "step": 4},
    }  # fmt: skip
    settings = make_settings(varied=varied)
    ready(open_study(tmp_path, settings), 2)
    second = begun(open_study(tmp_path, settings, 1), 1, settings.space)
    assert second.number == 1 and set(second.params) == set(varied)
    assert 0.01 <= second.params["training.lr"] <= 0.2 and second.params["training.epochs"] in range(1, 10)
    assert second.params["training.beta"] in (1, 5, 9) and second.params["data.augment"] in (True, False)
    again = begun(open_study(tmp_path, settings, 7), 1, settings.space)
    assert again.params == second.params
    assert known(open_study(tmp_path, settings), 0).state.name == "WAITING"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_what_is_drawn_follows_from_seed_and_number(make_settings, tmp_path, sampler):
    def drawn(folder, seed, number):
        settings = make_settings(sampler=sampler, seed=seed)
        (tmp_path / folder).mkdir(exist_ok=True)
        ready(open_study(tmp_path / folder, settings), 2)
        return begun(open_study(tmp_path / folder, settings, number), number, settings.space).params["training.lr"]

    first = drawn("a", 0, 0)
    assert drawn("b", 0, 0) == first
    assert len({first, drawn("a", 0, 1), drawn("c", 1, 0)}) == 3


def test_without_optuna_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"search needs the extra search: pip install 'advmoe\[search\]'"):
        require_optuna()


def test_a_damaged_journal_is_named(make_settings, tmp_path):
    ready(open_study(tmp_path, make_settings()), 2)
    journal = tmp_path / "optuna.journal"
    journal.write_text(journal.read_text() + "x\n{}\n")
    with pytest.raises(InputError, match=r"optuna\.journal must be a journal of Optuna's, got JSONDecodeError"):
        open_study(tmp_path, make_settings())

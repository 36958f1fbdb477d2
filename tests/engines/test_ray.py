"""A real Ray on this machine does a study and an evaluation, and a process of it is killed."""

import pytest
from clusters import EVALUATE, assert_same_evaluation, finish, kill_one, search_with_a_death, start, study_with_a_death

from advmoe.engines import EngineOptions, Ledger
from advmoe.errors import InputError
from advmoe.pool import Place

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray", reason="needs Ray (extra ray): make ray")


def test_a_study_of_which_a_worker_is_killed_has_the_tables_of_local(tmp_path):
    study_with_a_death(tmp_path, "ray")


def test_a_search_of_which_a_worker_is_killed_has_the_trials_of_local(tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna (extra search)")
    search_with_a_death(tmp_path, "ray")


def test_an_evaluation_of_which_a_worker_is_killed_has_the_numbers_of_one_process(tmp_path, make_digits_run):
    run = make_digits_run(tmp_path / "run")
    finish(start("evaluate", run, *EVALUATE, "--workers", 1, "--out", "local", cwd=tmp_path))
    process = start("evaluate", run, *EVALUATE, "--workers", 2, "--out", "ray", "--engine", "ray", cwd=tmp_path)
    kill_one(tmp_path / "ray" / ".evaluation-tasks")
    _, err = finish(process)
    assert "; tried again" in err
    assert_same_evaluation(tmp_path, "local", "ray")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 1000}, "--task-gpus must be <= "),
        ({"ray_address": "127.0.0.1:1"}, "--ray-address must be that of a Ray cluster that runs, got '127.0.0.1:1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_a_line(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        EngineOptions(engine="ray", **options).open(print, (), places=[Place(1)], ledger=Ledger(tmp_path))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value) and not ray.is_initialized()

"""A whole search: trials that fail do not stop it, what is finished is not done again, a killed worker's goes on."""

import json
import multiprocessing
import os
import threading

import pytest
from waiting import until

from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.locks import hold
from advmoe.search import session
from advmoe.search.session import SearchOptions, run_search
from advmoe.search.storage import open_study
from advmoe.search.trials import TrialTask, do

HERE = {"threads": 1, "accelerator": "cpu"}


@pytest.fixture
def here(monkeypatch):
    """Has trials done by this process, one after another: starting others takes seconds."""

    def run_tasks(tasks, errors, workers, told):
        errors = {}
        for name, task in tasks.items():
            if task.state() == "finished":
                continue
            told(session.Step("starts"), task)
            try:
                do(task, **HERE)
            except Exception as error:
                errors[name] = str(error)
            told(session.Step(errors.get(name, "done")), task)
        return errors

    monkeypatch.setattr(session, "run_tasks", run_tasks)


def test_trials_that_fail_do_not_stop_it_and_the_best_is_kept(make_settings, tmp_path, here):
    varied = {"training.balance": {"choices": [0.0, 0.1]}, "training.lr": {"low": 0.05, "high": 0.2}}  # 0.1 cannot be
    settings, heard = make_settings({"training": {"epochs": 1}}, varied=varied, attacks=["pgd-1"], seed=1), []

    def told(step, task, standing):
        heard.append((str(step)[:6], task.id, standing.best))

    options = SearchOptions(out=tmp_path / "out", trials=3, **HERE)
    standing, errors = run_search(settings, options, told)
    states = {name: each["state"] for name, each in standing.ends.items()}
    assert len(states) == 3 and {"failed", "finished"} == set(states.values())
    assert set(errors) == {name for name, state in states.items() if state == "failed"}
    values = {name: each["value"] for name, each in standing.ends.items() if each["value"] is not None}
    assert values[standing.best] == max(values.values())
    best = Config.load(options.out / "best.yaml")
    assert best.training.lr == standing.ends[standing.best]["parameters"]["training.lr"]
    assert best.training.epochs == 1 and best.data == settings.config.data
    assert len(json.loads((options.out / "study.json").read_text())["runs"]) == 3
    assert [word for word, *_ in heard].count("starts") == 3

    heard.clear()  # called again it asks for one more, and does that alone
    more, _ = run_search(settings, SearchOptions(out=tmp_path / "out", trials=4, **HERE), told)
    assert [task for word, task, _ in heard if word == "starts"] == ["0003"]
    assert {name: more.ends[name] for name in standing.ends} == dict(standing.ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"trials": 0}, "--trials must be >= 1, got 0"), ({"jobs": 0}, "--jobs must be >= 1, got 0")],
)
def test_a_number_that_cannot_be_is_one_line(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        SearchOptions(out=tmp_path, **options)


def test_nothing_is_written_for_what_cannot_be_run(make_settings, tmp_path, here):
    lost = make_settings({"data": {"name": "folder", "root": str(tmp_path / "nowhere"), "image_size": 8}})
    with pytest.raises(InputError, match=r"data\.root must "):
        run_search(lost, SearchOptions(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(make_settings, tmp_path, here):
    (tmp_path / "out").mkdir()
    held = hold(tmp_path / "out", folder=True)
    assert held is not None
    with pytest.raises(InputError, match="--out must be free of other searches"):
        run_search(make_settings(), SearchOptions(out=tmp_path / "out"))
    held.close()


@pytest.mark.slow
def test_a_trial_whose_worker_is_killed_goes_on(make_settings, tmp_path):
    settings = make_settings({"training": {"epochs": 3}}, attacks=["pgd-1"], pruner="median")
    options = SearchOptions(out=tmp_path / "out", trials=2, jobs=2, **HERE)
    first = TrialTask(0, options.out, settings)
    killed = []

    def kill():
        until(lambda: (first.path / "last").is_dir())
        number = options.workers().ledger.read("0000")["process"]
        killed.append(open_study(options.out, settings).trials[0].params)
        for process in multiprocessing.active_children():
            if process.pid == number:
                os.kill(process.pid, 9)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    standing, errors = run_search(settings, options)
    watcher.join()
    assert errors == {} and {each["state"] for each in standing.ends.values()} <= {"finished", "pruned"}
    assert len(standing.ends) == 2 and standing.ends["0000"]["parameters"] == killed[0]

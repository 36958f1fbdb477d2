"""One task done: a run trained or continued, a measurement made, in this process."""

import fcntl
import json
import threading

import numpy as np
import pytest
from PIL import Image

from advmoe.config import Config
from advmoe.errors import OtherSettings
from advmoe.pool import Preempted
from advmoe.signals import Ended
from advmoe.studies import tasks
from advmoe.studies.plan import Planner
from advmoe.studies.rows import Measure, Row
from advmoe.training.preemption import Stopped

HOW = {"threads": 1, "accelerator": "cpu"}
PGD = Measure("evaluate", {"attacks": ["pgd"], "num_examples": 12})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder of two classes, eight pixels wide: dark and light."""
    root = tmp_path_factory.mktemp("pictures")
    for split, number in (("train", 16), ("test", 8)):
        for name, light in (("dark", 40), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for image in range(number):
                Image.new("RGB", (8, 8), (light + image, light, light)).save(root / split / name / f"{image}.png")
    return root


def written(task):
    return json.loads((task.path / "done.json").read_text())


def test_a_run_is_trained_once_and_anew_where_nothing_can_be_continued(planner, tiny_run):
    run = planner.run(tiny_run("a name"), 0)
    run.path.mkdir(parents=True)
    (run.path / ".config.yaml.0123.partial").touch()  # killed before there was a checkpoint
    tasks.do(run, **HOW)
    assert run.state() == "finished" and not (run.path / ".config.yaml.0123.partial").exists()
    assert Config.load(run.path / "config.yaml") == Config.from_dict(run.config)
    manifest = (run.path / "manifest.json").read_text()
    assert json.loads(manifest)["name"] == "a name" and json.loads(manifest)["threads"] == 1
    tasks.do(run, **HOW)
    assert (run.path / "manifest.json").read_text() == manifest


def test_damaged_weights_of_a_finished_run_are_made_again(planner, tiny_run):
    run = planner.run(tiny_run("run"), 0)
    tasks.do(run, **HOW)
    weights = run.path / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert run.state() == "interrupted"
    tasks.do(run, **HOW)
    assert run.state() == "finished" and weights.read_bytes() == sound


def test_measurements_are_of_the_same_images_whatever_the_seed(tmp_path, tiny_run):
    planner = Planner(tmp_path / "runs", [0, 1])
    (row,) = planner.rows([Row(tiny_run("run"), {"accuracy": PGD})])
    indices = []
    for seed in (0, 1):
        tasks.do(row.runs[seed], **HOW)
        task = row.measures[seed]["accuracy"]
        tasks.do(task, **HOW)
        with np.load(task.path / "evaluation-examples.npz") as arrays:
            indices.append(arrays["index"].tolist())
        assert json.loads(task.result.read_text())["num_examples"] == 12
        assert not (row.runs[seed].path / "evaluation.json").exists()
        done = written(task)
        assert (done["kind"], done["against"], done["threads"]) == ("evaluate", None, 1) and done["seconds"] >= 0
        assert done["options"] == task.options and done["options"]["overrides"]["attack"]["steps"] == 2
    assert indices[0] == indices[1] and len(set(indices[0])) == 12


def test_a_measurement_takes_the_images_from_where_they_are_now(tmp_path, planner, tiny_run, pictures):
    def planned(root, measures=None):
        data = {"name": "folder", "root": str(root)}
        (row,) = planner.rows([Row(tiny_run("run", data=data, training={"batch_size": 8}), measures or {})])
        return row

    here, there = tmp_path / "here", tmp_path / "there"
    here.symlink_to(pictures)
    tasks.do(planned(here).runs[0], **HOW)
    here.rename(there)
    row = planned(there, {"accuracy": PGD, "cost": Measure("cost", {"batches": [2], "seconds": 0.0})})
    assert row.runs[0].state() == "finished"
    for task in row.measures[0].values():
        tasks.do(task, **HOW)
    assert json.loads(row.measures[0]["accuracy"].result.read_text())["num_examples"] == 12
    cost = json.loads(row.measures[0]["cost"].result.read_text())
    assert next(iter(cost["models"])) == "dense" and cost["batches"][-1]["ms_per_image"]["dense"] > 0


def test_an_evaluation_that_cannot_be_continued_is_made_anew(planner, tiny_run, monkeypatch):
    run = planner.run(tiny_run("run"), 0)
    task = planner.measure(PGD, run)
    calls = []

    def evaluate_run(target, *, resume=False, **_):
        calls.append(resume)
        if resume:
            raise OtherSettings("the evaluation must be continued with the same torch, got another")

    monkeypatch.setattr("advmoe.evaluation.runs.evaluate_run", evaluate_run)
    tasks.do(task, **HOW)
    assert calls == [True, False] and task.state() == "finished"

    other = planner.measure(Measure("evaluate", {"attacks": ["pgd-3"]}), run)
    monkeypatch.setattr(
        "advmoe.evaluation.runs.evaluate_run", lambda *_, **__: (_ for _ in ()).throw(ValueError("bad"))
    )
    with pytest.raises(ValueError, match=r"^bad$"):
        tasks.do(other, **HOW)
    assert other.state() == "missing"


def test_a_training_that_stopped_as_it_was_told_to_can_go_on(planner, tiny_run, monkeypatch):
    def stop(*given, **more):
        raise Stopped("stopped by SIGTERM", "within epoch 1")

    monkeypatch.setattr("advmoe.training.run.train", stop)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM within epoch 1$"):
        tasks.do(planner.run(tiny_run("run"), 0), **HOW)


@pytest.mark.parametrize(("kept", "error"), [(1, Preempted), (0, Ended)])
def test_an_evaluation_that_is_told_to_stop_goes_on_where_it_kept_something(
    planner, tiny_run, monkeypatch, kept, error
):  # fmt: skip
    task = planner.measure(PGD, planner.run(tiny_run("run"), 0))

    def evaluate(*given, **more):
        (task.path / ".evaluation").mkdir(exist_ok=True)
        for number in range(kept):
            (task.path / ".evaluation" / f"pgd-2.{number}.json").touch()
        raise Ended(15)

    monkeypatch.setattr("advmoe.evaluation.runs.evaluate_run", evaluate)
    with pytest.raises(error):
        tasks.do(task, **HOW)
    with pytest.raises(Ended):  # and nothing more the second time
        tasks.do(task, **HOW)


def test_two_measurements_of_a_run_do_not_wait_for_each_other(planner, tiny_run, write_weights, monkeypatch):
    run = planner.run(tiny_run("run"), 0)
    run.path.mkdir(parents=True)
    (run.path / "manifest.json").write_text(json.dumps({"finished": "now"}))
    write_weights(run.path)
    first, second = (planner.measure(Measure("evaluate", {"attacks": [name]}), run) for name in ("pgd-1", "pgd-2"))
    at_once = threading.Barrier(2, timeout=20)  # broken unless both are inside
    monkeypatch.setattr("advmoe.evaluation.runs.evaluate_run", lambda *_, **__: at_once.wait())
    threads = [threading.Thread(target=tasks.do, args=(each,), kwargs=HOW) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first.state() == second.state() == "finished"


def test_of_two_that_want_the_same_the_second_waits(planner, tiny_run, write_weights):
    run = planner.run(tiny_run("run"), 0)
    run.path.parent.mkdir(parents=True)
    with run.path.with_name(f".{run.key}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=tasks.do, args=(run,), kwargs=HOW)
        second.start()
        second.join(0.3)
        assert second.is_alive() and run.state() == "missing"
        run.path.mkdir()  # the first finishes it meanwhile
        (run.path / "manifest.json").write_text(json.dumps({"finished": "now"}))
        write_weights(run.path)
    second.join()
    assert sorted(path.name for path in run.path.iterdir()) == ["manifest.json", "model.json", "model.safetensors"]

"""What is told of a study's tasks as they end: what they came to, how long they took, how much is left."""

import json

import pytest

from advmoe.cli.study import _told
from advmoe.studies import task_pool
from advmoe.studies.brief import brief
from advmoe.studies.plan import PlannedMeasure, PlannedRun
from advmoe.studies.task_pool import Step, _Clock


def planned(folder, name="run"):
    return PlannedRun(name, f"{name}, digits", 0, {}, folder / name, None)


def measure(run, kind):
    return PlannedMeasure(run, kind, {}, None, f"{kind}-1")


ROBUST = {"clean_accuracy": 0.95, "robust_accuracy": {"pgd-50": 0.7, "routed": 0.625}, "worst_case": 0.61}
CURVE = {"points": [{"robust_accuracy": 0.9}, {"robust_accuracy": 0.5}], "masking": {"suspected": False}}
DISSECTED = {"robust_accuracy": 0.25, "router_robustness": 0.5}
RESULTS = {
    "evaluate": (ROBUST, "clean 95.0 %, pgd-50 70.0 %, routed 62.5 %, worst case 61.0 %"),
    "sweep": ({"curves": {"pgd-50": CURVE, "worst case": CURVE}}, "worst case over 2 radii 90.0 50.0 %"),
    "dissect": ({"pgd-50": DISSECTED}, "pgd-50 25.0 %, routers 50.0 %"),
    "pathways": (
        {"clean": {"distinct": 7}, "attack": {"unchanged": 0.5}}, "7 pathways, unchanged by the attack 50.0 %"
    ),
    "cost": (
        {"models": {"moe": {"gmacs": 0.0312}}, "batches": [{"ms_per_image": {"moe": 0.25}}]},
        "31.2 MMACs, 0.25 ms/image",
    ),
    "pace": (
        {"ratio": 1.254, "seconds": {"a": {"least": 1.0, "most": 1.5}, "b": {"least": 0.75, "most": 2.0}}},
        "1.25 of the other's time (0.50 to 2.00)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_a_measurement_in_a_few_words(kind, tmp_path):
    task = measure(planned(tmp_path), kind)
    assert brief(task) == ""  # no result, and no error
    task.path.mkdir(parents=True)
    content, text = RESULTS[kind]
    task.result.write_text(json.dumps(content))
    assert brief(task) == text
    task.result.write_text("{}")
    assert brief(task) == ""


def test_a_run_in_a_few_words(tmp_path):
    run = planned(tmp_path)
    assert brief(run) == ""
    run.path.mkdir()
    lines = [{"epoch": 1, "val": None}, {"epoch": 2, "val": {"clean_accuracy": 0.5, "robust_accuracy": 0.25}}]
    for number, text in ((1, "1 epoch"), (2, "2 epochs, val clean 50.0 %, robust 25.0 %")):
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:number]))
        assert brief(run) == text


def test_what_is_left_and_for_about_how_long(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(task_pool.time, "perf_counter", lambda: now[0])
    runs = [planned(tmp_path, f"run {i}") for i in range(3)]
    timed = measure(runs[0], "cost")  # with nothing else running
    clock = _Clock({task.id: task for task in (*runs, timed)}, jobs=2)
    started = clock.step("starts", runs[0])
    assert (started, started.left, started.seconds, started.seconds_left) == ("starts", 4, None, None)
    clock.step("starts", runs[1])
    now[0] = 20.0
    done = clock.step("done", runs[0])
    # Of the second run nothing is left, as it has run for as long as the first took; 20 s of the third are shared by
    # 2 processes; of no measurement it is known how long they take, so 20 s.
    assert (done.left, done.seconds, done.seconds_left) == (3, 20.0, 10.0 + 20.0)
    failed = clock.step("no disk", runs[1])
    assert (failed, failed.left, failed.seconds) == ("no disk", 2, 20.0)
    skipped = clock.step("skipped", runs[2])
    assert (skipped.left, skipped.seconds, skipped.seconds_left) == (1, None, 20.0)


def step(word, **values):
    made = Step(word)
    vars(made).update(values)
    return made


def test_a_line_as_each_task_ends(tmp_path, monkeypatch, capsys):
    task = measure(planned(tmp_path), "pace")
    task.path.mkdir(parents=True)
    task.result.write_text(json.dumps({"ratio": 1.254}))
    done = step("done", left=3, seconds=12.34, seconds_left=250.0)
    lines = {
        "text": [
            "starts  pace      run, digits, seed 0  run",
            "done    pace      run, digits, seed 0  1.25 of the other's time  12.3 s  3 left, about 4 min",
            "failed: no disk  pace      run, digits, seed 0  run  1.5 s",
        ],
        "quiet": ["failed: no disk  pace      run, digits, seed 0  run  1.5 s"],
    }
    for form, expected in lines.items():
        monkeypatch.setenv("ADVMOE_LOG_FORMAT", form)
        _told(step("starts", left=4), task)
        _told(done, task)
        _told(step("no disk", seconds=1.5), task)
        assert capsys.readouterr().err.splitlines() == expected
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", "json")
    _told(done, task)
    assert json.loads(capsys.readouterr().err) == {
        "event": "task", "state": "done", "kind": "pace", "name": "run, digits", "seed": 0, "key": "run",
        "seconds": 12.3, "seconds_left": 250.0, "left": 3, "text": lines["text"][1],
    }  # fmt: skip

"""Tasks in real processes: some fail, some are killed, and the rest goes on."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import until

from advmoe.config import Config
from advmoe.studies import task_pool
from advmoe.studies.plan import PlannedRun
from advmoe.studies.rows import Measure, Row
from advmoe.studies.task_pool import TaskWorkers, run_tasks

ROOT = Path(__file__).parents[2]
PATIENCE = 300
"""Seconds after which a test gives up on a process."""


def free(lock):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def workers(logs, jobs=1):
    return TaskWorkers(jobs=jobs, threads=1, accelerator="cpu", logs=logs)


def kill_workers(*, wait=True):
    for process in multiprocessing.active_children():
        process.kill()
        if wait:
            process.join()


@pytest.mark.slow
def test_a_failed_task_is_reported_what_needs_it_skipped_and_the_rest_done(tmp_path, planner, tiny_run):
    bad = tiny_run("bad", data={"name": "folder", "root": str(tmp_path / "nowhere")})
    child = tiny_run("child", start=bad, data={"name": "folder", "root": str(tmp_path / "nowhere")})
    timed = {"cost": Measure("cost", {"batches": [2], "seconds": 0.0})}
    good = tiny_run("good")
    tasks = planner.tasks(planner.rows([Row(child, timed), Row(good, timed)]))
    ids = {run.name: run.id for run in tasks.values() if isinstance(run, PlannedRun)}
    heard = []

    def told(word, task):
        kind = next((kind for kind in ("starts", "done", "skipped") if word.startswith(kind)), "failed")
        heard.append((kind, task.id))

    errors = run_tasks(tasks, {}, workers(tmp_path / "logs"), told)

    (cost,) = (task for task in tasks.values() if task.id.startswith(f"{ids['good']}/"))
    skipped = {ids["child"], *(name for name in tasks if name.startswith(f"{ids['child']}/"))}
    assert len(skipped) == 2 and set(errors) == {ids["bad"], *skipped}
    assert errors[ids["bad"]].startswith("data.root must ") and "nowhere" in errors[ids["bad"]]
    for name in skipped:
        assert errors[name] == f"skipped, as what it needs failed: {errors[ids['bad']]}"
    assert planner.run(good, 0).state() == "finished" and cost.state() == "finished" and cost.result.is_file()
    assert planner.run(bad, 0).state() == planner.run(child, 0).state() == "missing"
    assert sorted(heard) == sorted(
        [
            ("starts", ids["bad"]), ("failed", ids["bad"]), ("starts", ids["good"]), ("done", ids["good"]),
            ("starts", cost.id), ("done", cost.id), *(("skipped", name) for name in skipped),
        ]
    )  # fmt: skip
    # A time is measured with nothing else running: after all else.
    assert heard[-2:] == [("starts", cost.id), ("done", cost.id)]
    logs = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert "Traceback" in logs and "nowhere" in logs

    # What failed before is not tried again, what is finished is not done again: no process starts.
    heard.clear()
    assert run_tasks(tasks, errors, workers(tmp_path / "more", jobs=2), told) == errors
    assert heard == [] and not (tmp_path / "more").exists()


@pytest.mark.slow
def test_a_killed_worker_costs_its_task_alone_and_ctrl_c_ends_them_all(tmp_path, planner, tiny_run):
    names = ("killed at its start", "killed in training", "trained", "interrupted")
    runs = [tiny_run(name, training={"lr": 0.01 * number}) for number, name in enumerate(names, start=1)]
    for long in (runs[1], runs[3]):
        long.settings["training"]["epochs"] = 100_000
    first, second, third, fourth = (planner.run(run, 0) for run in runs)
    heard = []

    def once_it_trains(run, then):
        def watch():
            until((run.path / "metrics.jsonl").is_file)
            then()

        threading.Thread(target=watch).start()

    def told(word, task):
        heard.append((word, task.name))
        match word, task.name:
            case "starts", "killed at its start":
                kill_workers()  # that has not read its task
            case "starts", "killed in training":
                once_it_trains(second, lambda: kill_workers(wait=False))
            case "done", "trained":
                kill_workers()  # that has no task
            case "starts", "interrupted":
                once_it_trains(fourth, lambda: os.kill(os.getpid(), signal.SIGINT))

    tasks = planner.tasks(planner.rows(Row(run) for run in runs))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner's processes may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tasks(tasks, {}, workers(tmp_path / "logs"), told)
    finally:
        signal.signal(signal.SIGINT, before)
    died = f"its process died (exit code {-signal.SIGKILL})"
    assert heard == [
        ("starts", names[0]), (died, names[0]), ("starts", names[1]), (died, names[1]), ("starts", names[2]),
        ("done", names[2]), ("starts", names[3]),
    ]  # fmt: skip
    states = [each.state() for each in (first, second, third, fourth)]
    assert states == ["missing", "interrupted", "finished", "interrupted"]
    assert multiprocessing.active_children() == []


DRIVER = """
import sys
from pathlib import Path
from advmoe.studies.plan import PlannedRun
from advmoe.studies.task_pool import TaskWorkers, run_tasks
from advmoe.config import Config

folder = Path(sys.argv[1])
config = Config.load(folder / "config.yaml").to_dict()
run = PlannedRun("long", "long", 0, config, folder / "long", None)
workers = TaskWorkers(jobs=1, threads=1, accelerator="cpu", logs=folder / "logs")
run_tasks({run.id: run}, {}, workers, told=lambda word, task: None)
"""


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path, planner, tiny_run):
    long = planner.run(tiny_run("long", training={"epochs": 100_000}), 0)
    Config.from_dict(long.config).dump(tmp_path / "config.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], env=environment)
    try:
        until((tmp_path / "long" / "metrics.jsonl").is_file)
        with (tmp_path / ".long.lock").open("a") as lock:
            assert not free(lock)  # the worker holds it
            parent.kill()
            parent.wait(PATIENCE)
            until(lambda: free(lock))
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("seen", "count", "accelerator", "cards"),
    [
        (None, 3, "auto", ["0", "1", "2"]), ("4, GPU-5a", 2, "cuda", ["4", "GPU-5a"]), ("", 0, "auto", []),
        ("7,9", 2, "cpu", []),
    ],
)  # fmt: skip
def test_each_worker_sees_one_card_of_those_there_are(monkeypatch, seen, count, accelerator, cards):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert task_pool._cards(accelerator) == cards

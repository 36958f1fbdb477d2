"""Runs on a real SLURM of two nodes: srun's tasks train one run, and a job that is requeued goes on where it was."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TRAIN = [
    "train", "--config", "digits-advmoe", "--accelerator", "cpu", "--threads", "1", "--model.width", "4",
    "--data.image_size", "8", "--training.batch_size", "32", "--training.attack_steps", "1",
    "--training.step_size", "0.08", "--training.val_attack_steps", "1",
]  # fmt: skip
PATIENCE = 300

pytestmark = pytest.mark.slurm


def run(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def advmoe(*words, cwd, before=()):
    done = run(*before, sys.executable, "-m", "advmoe", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(ours, theirs):
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_tasks_of_one_node_or_two_train_one_run(tmp_path):
    words = [*TRAIN, "--training.epochs", "1", "--data.train_examples", "64", "--run-dir"]
    advmoe(*words, "ours", "--devices", "2", cwd=tmp_path)
    for nodes, tasks in ((2, 1), (1, 2)):
        name = f"{nodes}x{tasks}"
        before = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--kill-on-bad-exit=1"]
        out = advmoe(*words, name, "--devices", str(tasks), "--num-nodes", str(nodes), cwd=tmp_path, before=before)
        assert out.count("next  ") == 1
        assert_same(tmp_path / "ours", tmp_path / name)


def state(job, cwd):
    """What SLURM says of a job: PENDING, RUNNING, COMPLETED ..., and how often it was begun again."""
    shown = dict(
        each.split("=", 1) for each in run("scontrol", "show", "job", job, cwd=cwd).stdout.split() if "=" in each
    )
    return shown["JobState"], int(shown["Restarts"])


def until(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_a_job_that_is_requeued_within_an_epoch_ends_as_if_it_had_not_been(tmp_path):
    # Small batches make epochs of about ten seconds, and a checkpoint shows that the first has begun.
    words = [*TRAIN, "--training.batch_size", "8", "--training.epochs", "2", "--data.train_examples", "1000"]
    words += ["--training.checkpoint_minutes", "0.01", "--run-dir"]
    advmoe(*words, "run", "--sbatch", "job.sh", cwd=tmp_path)
    job = run("sbatch", "--parsable", "job.sh", cwd=tmp_path).stdout.strip()
    until(lambda: (tmp_path / "run" / "last").exists())
    assert state(job, tmp_path) == ("RUNNING", 0)
    assert run("scontrol", "requeue", job, cwd=tmp_path).returncode == 0
    until(lambda: state(job, tmp_path)[1] >= 1)
    until(lambda: state(job, tmp_path)[0] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
    log = (tmp_path / f"run-{job}.log").read_text()
    assert state(job, tmp_path)[0] == "COMPLETED", log
    assert "stopped by SIGTERM within epoch 1" in log
    advmoe(*words, "whole", cwd=tmp_path)
    assert_same(tmp_path / "whole", tmp_path / "run")

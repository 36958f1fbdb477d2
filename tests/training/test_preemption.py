"""Runs that stop before their end, within an epoch or after one, go on as if they had never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from waiting import PATIENCE, until

from advmoe.config import Config
from advmoe.training import loop
from advmoe.training.preemption import REQUEUE, SIGNALS, Requests, Stopped
from advmoe.training.run import resume, train

ROOT = str(Path(__file__).parents[2])
THREADS = {"accelerator": "cpu", "threads": 1}
GROUPS = {
    "model": {"width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "train_examples": 128, "val_fraction": 0.1, "augment": True},
    "threat": {"eps": "0.1"},
    "training": {
        "alternation": "every-2", "epochs": 2, "batch_size": 32, "attack_steps": 1, "step_size": 0.06,
        "val_attack_steps": 1, "ema": 0.5,
    },
}  # fmt: skip
ITERATIONS = 3
"""Of an epoch: 116 images in batches of 32."""


def config(**training):
    return Config.from_dict({**GROUPS, "training": {**GROUPS["training"], **training}})


def assert_same(ours, theirs):
    for name in ("last/model.safetensors", "last/more.safetensors", "model.safetensors"):
        a, b = load_file(ours / name), load_file(theirs / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    for a, b in zip(*lines, strict=True):
        told = [json.dumps({**each, "seconds": 0, "images_per_second": 0}) for each in (a, b)]  # in the same order too
        assert told[0] == told[1]


@pytest.mark.slow
def test_who_hears_of_each_epoch_may_end_the_run_there(tmp_path):
    whole, stopped, heard = tmp_path / "whole", tmp_path / "stopped", []

    def after_epoch(line):
        heard.append((line["epoch"], line["val"]["robust_accuracy"]))
        return "enough" if len(heard) == 1 else None

    train(config(), run_dir=whole, **THREADS)
    with pytest.raises(Stopped, match="enough after epoch 1 of 2"):
        train(config(), run_dir=stopped, after_epoch=after_epoch, **THREADS)
    resume(stopped, after_epoch=after_epoch)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert heard == [(line["epoch"], line["val"]["robust_accuracy"]) for line in lines]
    assert_same(stopped, whole)


class StopsAfter(Requests):
    """Asked to stop when it was looked at so many times."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    def reason(self):
        self.looks -= 1
        return "stopped" if self.looks == 0 else None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(config(), run_dir=tmp_path_factory.mktemp("runs") / "whole", **THREADS)


@pytest.mark.parametrize(
    ("looks", "where"),
    [
        (1, "within epoch 1, after 1 of its"), (2, "within epoch 1, after 2 of its"), (3, "after epoch 1 of 2"),
        (4, "within epoch 2, after 1 of its"), (5, "within epoch 2, after 2 of its"),
    ],
)  # fmt: skip
def test_a_run_goes_on_from_any_iteration(looks, where, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("advmoe.training.run._requests", lambda launch: StopsAfter(looks))
    with pytest.raises(Stopped, match=where):
        train(config(), run_dir=tmp_path / "run", **THREADS)
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_that_stops_again_and_again(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("advmoe.training.run._requests", lambda launch: StopsAfter(1))
    with pytest.raises(Stopped):
        train(config(), run_dir=tmp_path / "run", **THREADS)
    stops = 0
    while not json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"]:
        stops += 1
        with suppress(Stopped):
            resume(tmp_path / "run")
    assert stops == 2 * ITERATIONS - 1
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("minutes", [0, 1e-9])
def test_checkpoints_within_an_epoch_are_by_time_and_change_nothing(minutes, whole, tmp_path, monkeypatch):
    saved = []
    save = loop.checkpoints.save
    monkeypatch.setattr(
        loop.checkpoints, "save", lambda *args, **kw: (saved.append(args[1].progress), save(*args, **kw))
    )
    run = train(config(checkpoint_minutes=minutes), run_dir=tmp_path / "run", **THREADS)
    within = [progress["iterations"] for progress in saved if "iterations" in progress]
    assert within == ([] if minutes == 0 else [1, 2, 1, 2])
    assert_same(run, whole)


def test_a_time_set_ahead_stops_a_run(tmp_path):
    with pytest.raises(Stopped, match=r"stopped at --max-hours within epoch 1, after 1 of its iterations"):
        train(config(), run_dir=tmp_path / "run", max_hours=0, **THREADS)


def test_signals_ask_once_and_then_end():
    requests, fabric = Requests(), Fabric(accelerator="cpu", devices=1)
    numbers = [getattr(signal, name) for name in SIGNALS]
    before = [signal.getsignal(number) for number in numbers]
    with requests.listening():
        assert requests.agreed(fabric) == (False, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.agreed(fabric) == (True, "stopped by SIGUSR1")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        requests = Requests()
        with requests.listening():
            os.kill(os.getpid(), signal.SIGTERM)
        assert requests.reason() is None
    finally:
        signal.signal(signal.SIGTERM, before)


WORDS = [
    "train", "--config", "digits-advmoe", "--accelerator", "cpu", "--threads", "1", "--model.width", "4",
    "--data.image_size", "8", "--training.batch_size", "32", "--training.epochs", "2", "--training.attack_steps", "1",
    "--training.step_size", "0.08", "--training.val_attack_steps", "1", "--data.train_examples", "600",
]  # fmt: skip


def advmoe(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "advmoe", *words], cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "number"), [("1", signal.SIGTERM), ("2", signal.SIGUSR1)])
def test_a_signal_stops_a_command_which_is_requeued(devices, number, tmp_path):
    words = [*WORDS, "--devices", devices]
    process = advmoe(*words, "--run-dir", "run", cwd=tmp_path)
    until(lambda: (tmp_path / "run" / "config.yaml").exists() or process.poll() is not None)
    time.sleep(2)
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    name = signal.Signals(number).name
    assert process.returncode == REQUEUE and error.count("\n") == 1
    assert error.startswith(f"advmoe: error: stopped by {name} ") and "to continue: " in error
    for more in (["--resume", "run"], [*words[1:], "--run-dir", "whole"]):
        process = advmoe("train", *more, cwd=tmp_path)
        assert (process.communicate(timeout=PATIENCE), process.returncode)[1] == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

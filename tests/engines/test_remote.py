"""A task done as on a cluster, in this process: what it finds there, and what it leaves in the ledger."""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from advmoe.engines.ledger import Ledger
from advmoe.engines.remote import Call, answer, settings_here, slurm_job
from advmoe.errors import BugElsewhere, InputError
from advmoe.pool import Died, Preempted


@dataclass(frozen=True)
class Order:
    id: str


@contextmanager
def doing(place, seen):
    def work(order):
        seen.append((os.getcwd(), os.environ.get("ADVMOE_X"), torch.get_num_threads(), place.threads))
        os.write(1, b"some words\n")
        match order.id:
            case "mistake":
                raise InputError("x must be 1, got 2")
            case "disk":
                raise OSError("no disk")
            case "bug":
                raise KeyError("a")
            case "saved":
                raise Preempted("stopped within epoch 1")
            case "SIGTERM" | "SIGUSR1":
                signal.raise_signal(getattr(signal, order.id))

    yield work


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADVMOE_X", raising=False)
    environment = {**os.environ}
    seen = []
    yield (
        Call(
            prepare=doing, arguments=(seen,), threads=2, ledger=Ledger(tmp_path / "logs"), home=tmp_path,
            environment={"ADVMOE_X": "there"},
        ),
        seen,
    )  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)


def test_it_finds_what_there_was_here_and_prints_into_its_log(call, tmp_path, capfd):
    call, seen = call
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    call(Order("good"), "7")
    call(Order("good"), "8")
    assert seen == [(str(tmp_path), "there", 2, 2)] * 2
    assert call.ledger.log("good").read_text() == "some words\n" * 2 and capfd.readouterr().out == ""
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGTERM)) == (before, handler)
    found = answer(call.ledger, Order("good"), "8")
    assert found.error is None and found.seconds < 60
    assert answer(call.ledger, Order("good"), "7") is None  # of another job nothing is told


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("mistake", InputError, "x must be 1, got 2"), ("disk", Died, "OSError: no disk"),
        ("saved", Preempted, "stopped within epoch 1"),
        ("SIGTERM", Died, "ended by SIGTERM before it had done anything that is kept"),
        ("SIGUSR1", Died, "ended by SIGUSR1 before it had done anything that is kept"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_told_by_the_ledger(call, name, kind, text):
    call, _ = call
    call(Order(name), "7")
    error = answer(call.ledger, Order(name), "7").error
    assert type(error) is kind and str(error) == text


def test_a_bug_leaves_its_traceback_in_the_log(call, monkeypatch):
    call, _ = call
    with open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)  # a test's own would go elsewhere
        call(Order("bug"), "7")
    error = answer(call.ledger, Order("bug"), "7").error
    assert isinstance(error, BugElsewhere) and error.summary == "KeyError: 'a'"
    assert 'raise KeyError("a")' in call.ledger.log("bug").read_text()


def test_one_that_never_ended_tells_nothing(call):
    call, _ = call
    assert answer(call.ledger, Order("new"), "7") is None
    with call.ledger.doing("new", log=None, job="7"):
        assert answer(call.ledger, Order("new"), "7") is None


def test_what_is_passed_on(monkeypatch):
    monkeypatch.setenv("ADVMOE_PLUGINS", "p.py")
    monkeypatch.setenv("SECRET", "s")
    assert settings_here()["ADVMOE_PLUGINS"] == "p.py" and "SECRET" not in settings_here()


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None), ({"SLURM_JOB_ID": "9"}, "9"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
    ],
)  # fmt: skip
def test_a_job_of_slurm_is_called_as_its_queue_calls_it(monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm_job() == job

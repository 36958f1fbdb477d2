"""What is known of tasks: written by who does them, read by whoever asks."""

import os
import socket

import pytest

from advmoe.engines.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "new")


def test_a_task_says_that_it_runs_and_how_it_ended(ledger, tmp_path):
    assert ledger.read("run/evaluate-1") == {} and not ledger.folder.exists()
    with ledger.doing("run/evaluate-1", log=tmp_path / "log", job="7_1") as ended:
        told = ledger.read("run/evaluate-1")
        assert told.pop("since").endswith("+00:00")
        here = {"host": socket.gethostname(), "log": str(tmp_path / "log"), "job": "7_1"}
        assert told == {"state": "running", "process": os.getpid(), **here}
        ended["seconds"] = 2.5
    told = ledger.read("run/evaluate-1")
    assert told.pop("since") and told == {"state": "finished", "seconds": 2.5, **here}
    assert [path.name for path in ledger.folder.iterdir()] == ["run-evaluate-1.json"]


def test_an_error_is_told_in_a_line_and_raised(ledger):
    with pytest.raises(OSError), ledger.doing("a", log=None):
        raise OSError("no\ndisk")
    assert (ledger.read("a")["state"], ledger.read("a")["error"]) == ("failed", "OSError: no disk")
    ledger.failed("a", "its process died")  # which another process says
    assert (ledger.read("a")["state"], ledger.read("a")["error"]) == ("failed", "its process died")


def test_a_job_is_noted_beside_it_and_damage_is_nothing(ledger):
    ledger.submitted("a", "12")
    assert ledger.job("a")["job"] == "12" and ledger.read("a") == {}
    (ledger.folder / "a.job").write_text('{"job": ')
    assert ledger.job("a") == {}

"""How far tasks are, as their files tell."""

import pytest

from advmoe.engines import Ledger
from advmoe.locks import exclusive
from advmoe.studies.plan import PlannedMeasure, PlannedRun
from advmoe.studies.status import TaskStatus, counted, status_of
from advmoe.studies.tasks import lock_of


@pytest.fixture
def run(tmp_path):
    return PlannedRun("abc", "a run", 0, {}, tmp_path / "runs" / "abc", None)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "logs")


def state(task, ledger):
    found = status_of(task, ledger)
    return found.state, found.error


def test_from_waiting_to_failed(run, ledger, tmp_path):
    assert status_of(run, ledger) == TaskStatus("waiting")
    ledger.submitted(run.id, "7_0")
    queued = status_of(run, ledger)
    assert (queued.state, queued.job, queued.log) == ("queued", "7_0", str(tmp_path / "logs" / "abc.log"))
    with ledger.doing(run.id, log=tmp_path / "log", job="7_0") as ended:
        with exclusive(lock_of(run)):
            running = status_of(run, ledger)
            assert running.state == "running" and running.since and running.log == str(tmp_path / "log")
        assert state(run, ledger) == ("interrupted", None)  # nobody holds it: its process is gone
        ended |= {"state": "preempted"}
    assert state(run, ledger) == ("interrupted", None)
    ledger.failed(run.id, "its process died")
    assert state(run, ledger) == ("failed", "its process died")
    ledger.submitted(run.id, "8_0")  # it is tried again
    assert state(run, ledger) == ("queued", None)


def test_a_result_that_is_there_is_finished_whatever_was_told(run, ledger, record):
    measure = PlannedMeasure(run, "cost", {}, None, "cost-1")
    record(run, [])
    record(measure, {})
    ledger.failed(run.id, "no disk")
    assert state(run, ledger) == state(measure, ledger) == ("finished", None)


def test_how_many_are_in_each_state():
    states = [TaskStatus("waiting"), TaskStatus("finished"), TaskStatus("waiting")]
    assert counted(states) == "1 finished, 2 waiting"

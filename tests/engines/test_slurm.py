"""SLURM as an engine, with a queue that is played: a real one is in tests/slurm."""

import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from advmoe.engines import EngineOptions, Ledger, slurm
from advmoe.engines.remote import Call
from advmoe.errors import InputError
from advmoe.pool import Died, Preempted
from advmoe.rundir import require_plain


@dataclass(frozen=True)
class Order:
    id: str


@contextmanager
def doing(place):
    yield lambda order: None


class Executor:
    """Stands in for submitit's: it numbers jobs, and remembers what it was asked."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def update_parameters(self, **asked):
        self.cluster.asked = asked

    def map_array(self, call, orders):
        if self.cluster.refuses:
            raise RuntimeError("sbatch: error: invalid partition")
        self.cluster.arrays += 1
        self.folder.mkdir(exist_ok=True)
        (self.folder / f".submission_file_{self.cluster.arrays}.sh").symlink_to(self.folder / "script")
        jobs = [SimpleNamespace(job_id=f"{self.cluster.arrays}_{number}") for number in range(len(orders))]
        self.cluster.queue |= {job.job_id for job in jobs}
        return jobs


@pytest.fixture
def cluster(monkeypatch):
    """A cluster: its queue, and an engine on it made by `open`."""
    cluster = SimpleNamespace(queue=set(), arrays=0, asked={}, answers=True, refuses=False)
    module = SimpleNamespace(SlurmExecutor=lambda folder: Executor(cluster, folder))
    monkeypatch.setattr(slurm, "require_slurm", lambda: module)
    monkeypatch.setattr(slurm, "queue", lambda: set(cluster.queue) if cluster.answers else None)
    monkeypatch.setattr(slurm, "PAUSE", 0.0)
    return cluster


def opened(tmp_path, most=9, alone=False, **options):
    call = Call(prepare=doing, arguments=(), threads=2, ledger=Ledger(tmp_path))
    return slurm.Slurm(call, EngineOptions(engine="slurm", **options), most=most, alone=alone)


def ended(engine, order, job, **fields):
    with engine._ledger.doing(order.id, log=None, job=job) as told:
        told |= fields


def test_what_is_asked_for_each_task(tmp_path, cluster):
    opened(tmp_path, hours=1.5, partition="gpu", gpus=2, cpus=8, alone=True)
    asked = {"partition": "gpu", "gres": "gpu:2", "cpus_per_task": 8, "time": 90, "exclusive": True}
    assert asked.items() <= cluster.asked.items()
    assert cluster.asked["additional_parameters"] == {"signal": "USR1@180", "no-requeue": True}
    opened(tmp_path)
    assert (cluster.asked["cpus_per_task"], cluster.asked["time"]) == (2, 24 * 60)
    assert not {"partition", "gres", "exclusive"} & set(cluster.asked)


def test_those_that_are_given_together_are_one_array_up_to_as_many_as_there_may_be(tmp_path, cluster):
    engine, orders = opened(tmp_path, most=2), [Order("a"), Order("b"), Order("c")]
    assert [engine.give(order) for order in orders] == [True, True, False]
    assert list(engine.answers(0)) == [] and cluster.queue == {"1_0", "1_1"}
    require_plain(tmp_path)  # what submitit leaves are links, which no run and no study may hold
    cluster.queue.remove("1_1")
    ended(engine, orders[1], "1_1", seconds=3.0)
    (answer,) = engine.answers(0)
    assert (answer.order, answer.error, answer.seconds) == (orders[1], None, 3.0)
    assert engine.give(orders[2]) and list(engine.answers(0)) == [] and "2_0" in cluster.queue


def test_a_job_that_is_gone_without_a_word_is_given_up_at_the_second_look(tmp_path, cluster):
    engine = opened(tmp_path)
    engine.give(Order("a"))
    assert list(engine.answers(0)) == []
    cluster.queue.clear()
    cluster.answers = False
    assert list(engine.answers(0)) == [] == list(engine.answers(0))  # nobody says that it is gone
    cluster.answers = True
    assert list(engine.answers(0)) == []
    (answer,) = engine.answers(0)
    assert isinstance(answer.error, Died) and str(answer.error).startswith("job 1_0 ended without an answer (see ")
    assert answer.order == Order("a") and engine.give(Order("a"))


def test_one_that_was_told_to_stop_says_so(tmp_path, cluster):
    engine = opened(tmp_path)
    engine.give(Order("a"))
    assert list(engine.answers(0)) == []
    cluster.queue.clear()
    ended(engine, Order("a"), "1_0", state="preempted", error="stopped by SIGUSR1")
    (answer,) = engine.answers(0)
    assert isinstance(answer.error, Preempted) and str(answer.error) == "stopped by SIGUSR1"


def test_a_job_of_a_process_that_is_gone_is_waited_for(tmp_path, cluster, capsys):
    first = opened(tmp_path)
    first.give(Order("a"))
    assert list(first.answers(0)) == []
    first.close()
    said = "note  jobs that stay with SLURM: 1_0 (to end them: scancel --name advmoe)\n"
    assert capsys.readouterr().err == said
    second = opened(tmp_path)
    assert second.give(Order("a")) and list(second.answers(0)) == [] and cluster.arrays == 1
    cluster.queue.clear()
    ended(second, Order("a"), "1_0")
    (answer,) = second.answers(0)
    assert (answer.order, answer.error) == (Order("a"), None)
    second.close()
    assert capsys.readouterr().err == ""


def test_what_sbatch_refuses_is_one_line(tmp_path, cluster):
    engine = opened(tmp_path)
    cluster.refuses = True
    engine.give(Order("a"))
    with pytest.raises(InputError, match=r"sbatch must take the tasks, got .*invalid partition"):
        list(engine.answers(0))


def test_the_queue_is_this_user_s_and_unknown_where_slurm_does_not_answer(monkeypatch):
    calls = []

    def run(words, **_):
        calls.append(words)
        if len(calls) > 1:
            raise subprocess.CalledProcessError(1, words)
        return SimpleNamespace(stdout="12_0\n12_1\n15\n")

    monkeypatch.setattr(slurm.subprocess, "run", run)
    assert slurm.queue() == {"12_0", "12_1", "15"} and slurm.queue() is None
    assert calls[0][0] == "squeue" and "--array" in calls[0]


def test_without_slurm_s_programs_it_cannot_be_had(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="must be called where SLURM's programs are, got no sbatch, squeue, srun"):
        slurm.require_slurm()

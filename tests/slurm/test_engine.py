"""A real SLURM does a study and an evaluation: jobs of one are killed, the process that wants the other."""

import subprocess

import pytest
from clusters import (
    EVALUATE,
    TASKS,
    assert_same_evaluation,
    finish,
    kill_one,
    running,
    search_with_a_death,
    start,
    study_with_a_death,
)
from waiting import until

pytest.importorskip("submitit", reason="needs submitit (extra slurm)")
pytestmark = pytest.mark.slurm


def slurm(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def jobs():
    """The jobs of ours that SLURM knows, whatever became of them."""
    lines = slurm("scontrol", "--oneliner", "show", "jobs").splitlines()
    return {line.split()[0] for line in lines if " JobName=advmoe " in line}


def kill_one_and_preempt_the_next(ledger):
    killed = kill_one(ledger)
    slurm("scancel", "--signal=USR1", running(ledger, but=killed)["job"])


def test_a_study_of_which_a_job_is_killed_and_one_preempted_has_the_tables_of_local(tmp_path):
    study_with_a_death(tmp_path, "slurm", kill_one_and_preempt_the_next, again=2)


def test_a_search_of_which_a_job_is_killed_has_the_trials_of_local(tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna (extra search)")
    search_with_a_death(tmp_path, "slurm")


def test_an_evaluation_whose_process_is_killed_waits_for_the_jobs_that_run(tmp_path, make_digits_run):
    run = make_digits_run(tmp_path / "run")
    words = ["evaluate", run, *EVALUATE, "--workers", 2, "--out", "slurm", "--engine", "slurm"]
    journal = tmp_path / "slurm" / ".evaluation"
    before, process = jobs(), start(*words, cwd=tmp_path)
    until(lambda: bool(list(journal.glob("pgd*.json"))))
    process.kill()
    process.communicate()
    submitted = jobs() - before
    done = {path: path.stat().st_mtime_ns for path in journal.glob("pgd*.json")}
    assert 0 < len(done) < TASKS and not (tmp_path / "slurm" / "evaluation.json").exists()
    finish(start("evaluate", run, *EVALUATE, "--workers", 1, "--out", "local", cwd=tmp_path))
    finish(start(*words, "--resume", cwd=tmp_path))
    assert_same_evaluation(tmp_path, "local", "slurm")
    # A shard that had run, or was in the queue, has had no second job.
    assert len(jobs() - before) <= 4 and submitted <= jobs()

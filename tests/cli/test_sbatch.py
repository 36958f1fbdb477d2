"""The script for SLURM: what it asks for, what it starts and continues, and when it goes back into the queue."""

import json
import os
import subprocess

import pytest

from advmoe import cli
from advmoe.cli.sbatch import without
from advmoe.config import Config

TRAIN = ["train", "--config", "digits-advmoe", "--run-dir", "runs/my run", "--training.seed", "3"]
PROGRAMS = {
    "srun": 'shift; printf "%s\\n" "$*" >>calls; exit "$(cat code)"',
    "scontrol": 'printf "scontrol %s\\n" "$*" >>calls',
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with programs of SLURM's that only say that they were called."""
    (tmp_path / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(folder, code):
    """What the script calls where `srun` ends with `code`, and its own exit code."""
    (folder / "code").write_text(str(code))
    (folder / "calls").write_text("")
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    ended = subprocess.run(["bash", "job.sh"], cwd=folder, env=environment)
    return (folder / "calls").read_text().splitlines(), ended.returncode


def test_a_script_begins_continues_and_requeues(workplace, capsys):
    options = ["--sbatch", "job.sh", "--devices", "4", "--num-nodes", "2", "--max-hours", "1.5", "--threads", "8"]
    assert cli.main([*TRAIN, *options]) == 0
    assert capsys.readouterr().out == "written to job.sh\nnext  sbatch job.sh\n"
    text = (workplace / "job.sh").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    for each in (
        "--nodes=2", "--ntasks-per-node=4", "--gpus-per-task=1", "--cpus-per-task=8", "--time=1:30:00", "--requeue",
        "--job-name=my-run", "--signal=USR1@180",
    ):  # fmt: skip
        assert each in asked
    begin = "advmoe train --config digits-advmoe --training.seed 3 --devices 4 --num-nodes 2 --threads 8"
    assert ran(workplace, 0) == ([f"{begin} --run-dir runs/my run"], 0)
    assert ran(workplace, 2) == ([f"{begin} --run-dir runs/my run"], 2)
    (workplace / "runs" / "my run").mkdir(parents=True)
    (workplace / "runs" / "my run" / "config.yaml").touch()
    for code in (85, 138):  # saved, or signalled before there was anything to save
        assert ran(workplace, code) == (["advmoe train --resume runs/my run", "scontrol requeue 77"], 0)


def test_a_script_that_continues_a_run_keeps_the_options_of_its_command(workplace):
    run = workplace / "runs" / "begun"
    run.mkdir(parents=True)
    Config.from_dict({}).dump(run / "config.yaml")
    (run / "manifest.json").write_text(json.dumps({"accelerator": "cpu"}))
    words = ["train", "--resume", "runs/begun", "--threads", "2", "--tensorboard", "--sbatch", "job.sh"]
    assert cli.main([*words, "--max-hours", "2"]) == 0
    assert "gpus" not in (workplace / "job.sh").read_text()
    assert ran(workplace, 0) == (["advmoe train --resume runs/begun --threads 2 --tensorboard"], 0)


def test_a_run_without_a_manifest_is_refused(workplace, capsys):
    (workplace / "runs" / "begun").mkdir(parents=True)
    Config.from_dict({}).dump(workplace / "runs" / "begun" / "config.yaml")
    assert cli.main(["train", "--resume", "runs/begun", "--sbatch", "job.sh"]) == 2
    assert "--resume must be a run that holds manifest.json, got 'runs/begun'" in capsys.readouterr().err
    assert not (workplace / "job.sh").exists()


def test_a_run_directory_may_begin_like_an_option(workplace):
    assert cli.main(["train", "--config", "digits-advmoe", "--run-dir=-odd", "--sbatch", "job.sh"]) == 0
    assert ran(workplace, 0) == (["advmoe train --config digits-advmoe --run-dir ./-odd"], 0)


def test_a_job_has_time_to_begin(workplace, capsys):
    assert cli.main([*TRAIN, "--sbatch", "job.sh", "--max-hours", "0.05"]) == 2
    assert "--max-hours must be >= 0.1 with --sbatch" in capsys.readouterr().err
    assert not (workplace / "job.sh").exists()


@pytest.mark.parametrize("file", ["there.sh", "absent/job.sh"])
def test_nothing_is_overwritten(workplace, file, capsys):
    (workplace / "there.sh").write_text("mine")
    assert cli.main([*TRAIN, "--sbatch", file]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (workplace / "there.sh").read_text() == "mine" and not (workplace / "runs").exists()


def test_options_with_their_values_are_left_out():
    words = ["train", "--a", "1", "--b=2", "--c", "3"]
    assert [*without(words, "--a", "--b")] == ["train", "--c", "3"]

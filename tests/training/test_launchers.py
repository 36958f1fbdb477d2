"""Processes that torchrun or srun start: which they are, by what the environment says, and that they train one run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from waiting import PATIENCE

from advmoe.errors import InputError
from advmoe.training.launchers import first_host, launched, rank, require_ranks

ROOT = str(Path(__file__).parents[2])
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "RANK": "5", "WORLD_SIZE": "8",
    "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[09-10]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip


def test_torchruns_process_knows_its_place():
    member = launched(TORCHRUN)
    assert (member.rank, member.world, member.local_rank, member.local_world) == (5, 8, 1, 4)
    assert (member.node, member.nodes, member.address, member.port) == (1, 2, "192.0.2.1", 29500)


def test_sruns_task_knows_its_place():
    member = launched(SRUN)
    assert (member.rank, member.world, member.local_rank, member.local_world) == (3, 4, 1, 2)
    assert (member.node, member.nodes, member.address) == (1, 2, "gpu09")
    ports = {launched({**SRUN, "SLURM_STEP_ID": str(step)}).port for step in range(20)}
    assert len(ports) == 20 and member.port in ports  # steps side by side do not meet
    assert launched({**SRUN, "MASTER_PORT": "4000"}).port == 4000


@pytest.mark.parametrize("launcher", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_what_is_incomplete_or_alone_is_no_launch(launcher):
    for name in launcher:
        assert launched({other: value for other, value in launcher.items() if other != name}) is None
    alone = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert launched({name: alone.get(name, value) for name, value in launcher.items()}) is None
    assert launched({}) is None


def test_nodes_share_the_processes_equally(monkeypatch):
    unequal = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    with pytest.raises(InputError, match=r"as many processes on each node as on the others, got 2,1"):
        launched(unequal)
    with pytest.raises(InputError, match=r"on each node as on the others"):
        launched({**TORCHRUN, "WORLD_SIZE": "9"})
    for name, value in unequal.items():
        monkeypatch.setenv(name, value)
    assert rank() == 3  # errors say whose they are all the same


def test_what_is_no_number_is_refused_by_name(monkeypatch):
    rule = "must be a whole number, or not in the environment, got 'gold'"
    for values, name in ((TORCHRUN, "RANK"), (TORCHRUN, "MASTER_PORT"), (SRUN, "SLURM_PROCID"), (SRUN, "MASTER_PORT")):
        with pytest.raises(InputError, match=rf"^{name} {rule}$"):
            launched({**values, name: "gold"})
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):  # read when Lightning is imported
        require_ranks({name: "3"})
        with pytest.raises(InputError, match=f"^{name} must be a whole number"):
            require_ranks({name: ""})
    monkeypatch.setenv("SLURM_PROCID", "gold")
    assert rank() == 0


@pytest.mark.parametrize("name", ["RANK", "JSM_NAMESPACE_RANK"])
def test_a_rank_that_is_none_is_one_line(name, tmp_path):
    command = [sys.executable, "-m", "advmoe", "train", "--config", "digits-advmoe", "--run-dir", "run"]
    environment = {**os.environ, name: "gold", "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr == f"advmoe: error: {name} must be a whole number, or not in the environment, got 'gold'\n"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("gpu[09-10,12]", "gpu09"), ("a,b", "a"), ("a[3,5-6]-ib", "a3-ib"),
        ("login,n[1-2]", "login"), ("rack1-n[2]", "rack1-n2"),
    ],
)  # fmt: skip
def test_the_first_of_slurms_hosts(nodes, first):
    assert first_host(nodes) == first


SMALL = [
    "train", "--config", "digits-advmoe", "--accelerator", "cpu", "--threads", "1", "--model.width", "4",
    "--data.image_size", "8", "--data.train_examples", "64", "--training.batch_size", "16", "--training.epochs", "1",
    "--training.attack_steps", "1", "--training.step_size", "0.08", "--training.val_attack_steps", "1",
]  # fmt: skip


def environment():
    return {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}


def finished(*processes):
    """The exit codes and the outputs of processes that ended."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [process.returncode for process in processes], outputs


def advmoe(*words, cwd):
    pipe = subprocess.PIPE
    command = [sys.executable, *words]
    return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=pipe, stderr=pipe, text=True)


def torchrun(*options, words, cwd):
    return advmoe("-m", "torch.distributed.run", *options, "-m", "advmoe", *words, cwd=cwd)


@pytest.mark.slow
def test_torchruns_processes_train_one_run_on_one_machine_or_two(tmp_path):
    codes, outputs = finished(advmoe("-m", "advmoe", *SMALL, "--devices", "2", "--run-dir", "ours", cwd=tmp_path))
    assert codes == [0], outputs
    words = [*SMALL, "--run-dir", "theirs"]
    codes, outputs = finished(torchrun("--standalone", "--nproc-per-node", "2", words=words, cwd=tmp_path))
    assert codes == [0], outputs
    assert outputs[0][0].count("next  advmoe evaluate") == 1
    nodes = [
        torchrun(
            "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", "127.0.0.1",
            "--master-port", "29411", words=[*SMALL, "--num-nodes", "2", "--run-dir", "nodes"], cwd=tmp_path,
        )
        for node in (0, 1)
    ]  # fmt: skip
    codes, outputs = finished(*nodes)
    assert codes == [0, 0], outputs
    ours, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs", "nodes"))
    for other in others:
        assert ours.keys() == other.keys() and all(torch.equal(ours[key], other[key]) for key in ours)


@pytest.mark.slow
def test_eight_processes_train_one_run(tmp_path):
    for name, start in {
        "ours": advmoe("-m", "advmoe", *SMALL, "--devices", "8", "--run-dir", "ours", cwd=tmp_path),
        "theirs": torchrun(
            "--standalone", "--nproc-per-node", "8", words=[*SMALL, "--run-dir", "theirs"], cwd=tmp_path
        ),
    }.items():
        codes, outputs = finished(start)
        assert codes == [0], (name, outputs)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_each_process(tmp_path):
    words = [*SMALL, "--devices", "3", "--run-dir", "run"]
    (code,), ((_, error),) = finished(torchrun("--standalone", "--nproc-per-node", "2", words=words, cwd=tmp_path))
    assert code != 0 and "advmoe/cli" not in error  # but torchrun shows how it ended itself
    rule = "devices must be left out, or 2 as torchrun has it, got 3"
    assert f"advmoe: error: {rule}" in error or f"advmoe: error: process 1: {rule}" in error
    assert not (tmp_path / "run").exists()

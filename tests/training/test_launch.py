"""Processes of a run, for real: what others leave in the environment, what one of them raises, and how all end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE, alive, until

ROOT = str(Path(__file__).parents[2])

SCRIPT = """
import os, sys, time
from functools import partial
from pathlib import Path
import torch
from advmoe.training.launch import Engine, launch

def work(fabric, what, folder):
    rank = fabric.global_rank
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    total = fabric.all_reduce(torch.tensor([rank + 1.0]), reduce_op="sum")
    fabric.barrier()
    (folder / f"{rank}").write_text(f"{fabric.world_size} {total.item()} {fabric.device}")
    if what == "mistake" and rank == 1:
        from advmoe.config import require
        require(False, "a", "b", "c")
    if what == "dies" and rank == 1:
        os.kill(os.getpid(), 9)
    if what != "ends":
        time.sleep(1000)

if __name__ == "__main__":
    devices = int(sys.argv[3])
    before = dict(os.environ)
    try:
        launch(partial(work, what=sys.argv[1], folder=Path(sys.argv[2])), Engine("cpu", devices, "bf16-mixed"))
    except Exception as error:
        print(type(error).__name__, error)
    finally:
        assert dict(os.environ) == before | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "")}
"""

LEFT = {
    # torchrun's, and of a second node
    "RANK": "3", "LOCAL_RANK": "3", "GROUP_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "7",
    # SLURM's
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NODELIST": "node[1-2]",
    "SLURM_LOCALID": "2", "SLURM_PROCID": "2", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
    # LSF's and MPI's
    "LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "absent", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2",
    "JSM_NAMESPACE_LOCAL_RANK": "1", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1",
    # Fabric's own
    "LT_CLI_USED": "1", "LT_DEVICES": "3", "LT_NUM_NODES": "2", "LT_STRATEGY": "ddp", "LT_ACCELERATOR": "tpu",
}  # fmt: skip


def started(tmp_path, what, devices, **more):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), what, str(tmp_path), str(devices)]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **more}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_what_other_launchers_left_changes_nothing_and_nothing_is_printed(tmp_path, devices):
    process = started(tmp_path, "ends", devices, **LEFT)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, error) == (0, "", "")
    for rank in range(devices):
        assert (tmp_path / str(rank)).read_text() == f"{devices} {devices * (devices + 1) / 2} cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("mistake", "InputError a must be b, got 'c'\n"),
        ("dies", "ChildProcessError a process of the run was ended by SIGKILL\n"),
    ],
)
def test_what_one_raises_is_raised_and_the_others_end(tmp_path, what, said):
    process = started(tmp_path, what, 2)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, error) == (0, said, "")
    assert not any(alive(int(file.read_text())) for file in tmp_path.glob("*.pid"))


@pytest.mark.slow
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    process = started(tmp_path, "goes on", 2)
    files = [tmp_path / "0", tmp_path / "1"]
    until(lambda: all(file.exists() for file in files) or process.poll() is not None)
    children = [int((tmp_path / f"{rank}.pid").read_text()) for rank in (0, 1)]
    for child in children:
        os.kill(child, signal.SIGTERM)  # which is for the parent to heed
    assert all(map(alive, children))
    process.kill()
    process.communicate()
    until(lambda: not any(map(alive, children)))

"""A real SLURM of two nodes on this machine, for all tests here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")


@pytest.fixture(scope="session", autouse=True)
def cluster(tmp_path_factory):
    if "TESTS_MAY_START_SLURM" not in os.environ:
        pytest.skip("takes /etc/slurm and starts SLURM's programs: make slurm")
    if (missing := [name for name in PROGRAMS if shutil.which(name) is None]) or os.geteuid() != 0:
        pytest.skip(f"needs root and SLURM (slurm-wlm, munge): {', '.join(missing) or 'not root'}")
    folder = tmp_path_factory.mktemp("slurm")
    call = [str(Path(__file__).with_name("cluster.sh"))]
    subprocess.run([*call, "start", str(folder)], check=True, timeout=120)
    yield
    subprocess.run([*call, "stop", str(folder)], check=False, timeout=60)

"""The soak finds faults that are planted, and none where there are none."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the soak needs Linux's /proc")

HERE = Path(__file__).parent


def soak(folder, *words, fault=""):
    words = ["--advmoe", f"{sys.executable} {HERE / 'fake.py'}", "--patience", "0.5", "--work", str(folder), *words]
    command = [sys.executable, str(HERE / "soak.py"), *words]
    return subprocess.run(command, env={"FAULT": fault, "PATH": ""}, capture_output=True, text=True, timeout=120)


def test_what_is_sound_passes_and_is_counted(tmp_path):
    ended = soak(tmp_path, "--kinds", "train,line", "--cases", "8", "--seed", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (total,) = [line.split() for line in ended.stdout.splitlines() if line.startswith("all ")]
    cases, commands, kills, resumptions, refusals, failures = map(int, total[1:])
    assert (cases, failures) == (8, 0)
    assert commands > 8 and kills >= 1 and resumptions >= 1 and refusals >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind", "found"),
    [
        ("traceback", "train", "traceback"),
        ("numbers", "train", "model.safetensors differs"),
        ("child", "train", "leaves 1 process"),
        ("hang", "train", "hangs"),
        ("silent", "train", "0 lines on stderr"),
        ("long", "line", "a line of 2015 letters"),
        ("litter", "line", "litter is new"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, fault, kind, found):
    ended = soak(tmp_path, "--kinds", kind, "--cases", "4", "--seed", "3", "--limit", "3", fault=fault)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert found in ended.stdout, ended.stdout
    failed = next(line.split()[1] for line in ended.stdout.splitlines() if line.startswith("FAILED"))
    assert found in (tmp_path / failed.strip(":").replace(":", "-") / "log.txt").read_text()


def test_a_case_is_the_same_commands_each_time(tmp_path):
    logs = []
    for _ in range(2):
        soak(tmp_path, "--case", "line:3000001", fault="long")
        logs.append((tmp_path / "line-3000001" / "log.txt").read_text().splitlines()[0])
    assert logs[0] == logs[1] and logs[0].startswith("$")

"""A small study and a small evaluation on a cluster, of which a process is killed; compared with this machine's own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waiting import until

ROOT = Path(__file__).parents[2]
PATIENCE = 400
STUDY = [
    "study", "fig4", "--only", "refresh", "--accelerator", "cpu", "--num-examples", "20", "--model.width", "4",
    "--data.image_size", "8", "--data.train_examples", "200", "--training.epochs", "1", "--training.batch_size", "32",
    "--training.attack_steps", "1", "--training.val_attack_steps", "1", "--attack.steps", "2", "--attack.queries", "0",
]  # fmt: skip
"""A run, one that starts from it, an evaluation and a dissection: each needs the one before."""
EVALUATE = [
    "--attacks", "pgd-2,pgd-2-soft", "--num-examples", "40", "--batch-size", "5", "--accelerator", "cpu",
    "--allow", "gradients",
]  # fmt: skip
TASKS = 16


def start(*words: object, cwd: Path) -> subprocess.Popen[str]:
    """Start a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ADVMOE_LOG_FORMAT": "text"}
    line = [sys.executable, "-m", "advmoe", *map(str, words)]
    return subprocess.Popen(
        line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a command printed, which ends well."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def running(ledger: Path, *, but: str | None = None) -> dict[str, Any]:
    """What the ledger tells of the first task that says it runs, in another job than `but`; waits for one."""

    def found() -> list[dict[str, Any]]:
        told = [read(path) for path in ledger.glob("*.json")] if ledger.is_dir() else []
        return [each for each in told if each.get("state") == "running" and each["job"] != but]

    until(lambda: bool(found()))
    return found()[0]


def kill_one(ledger: Path) -> str:
    """Kill the first process that says it is at a task; returns its job."""
    task = running(ledger)
    os.kill(task["process"], signal.SIGKILL)
    return str(task["job"])


def study_with_a_death(
    folder: Path, engine: str, kill: Callable[[Path], object] = kill_one, again: int = 1
) -> None:  # fmt: skip
    """Run the study by an engine of which workers are killed, so that as many tasks are tried `again`; its tables are
    those of this machine's processes.
    """
    process = start(*STUDY, "--out", engine, "--engine", engine, cwd=folder)
    kill(folder / engine / "logs")
    _, err = finish(process)
    print(err)
    assert err.count("; tried again") == again, err
    finish(start(*STUDY, "--out", "local", cwd=folder))
    ours, theirs = (read(folder / name / "fig4-smoke-refresh" / "study.json") for name in ("local", engine))
    assert ours["tables"] and ours["tables"] == theirs["tables"]
    assert [run["status"] for run in theirs["runs"]] == ["finished", "finished"]
    out, _ = finish(start(*STUDY, "--status", "--out", engine, cwd=folder))
    assert out.splitlines()[-1] == "4 tasks: 4 finished" and f"log {engine}/logs/" in out


def assert_same_evaluation(folder: Path, ours: str, theirs: str) -> None:
    """Two evaluations have the same numbers, to the bit."""
    a, b = (read(folder / name / "evaluation.json") for name in (ours, theirs))
    assert a and a["checksum"] == b["checksum"]
    assert not (folder / theirs / ".evaluation").exists() and not (folder / theirs / ".evaluation-tasks").exists()

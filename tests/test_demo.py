"""`make demo`: what it calls, in an environment whose programs only say that they were called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = """#!/bin/sh
echo "${0##*/} $*" >>calls
"""
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
INSTALLING = [
    f"python -m pip install --quiet {TORCH} -c constraints.txt",
    "python -m pip install --quiet -e . -c constraints.txt",
]
ANEW = ["advmoe train --config digits-advmoe --run-dir runs/demo", "advmoe evaluate runs/demo"]
AGAIN = ["advmoe train --resume runs/demo", "advmoe evaluate runs/demo"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for program in ("python", "advmoe"):
        (tmp_path / ".venv" / "bin" / program).write_text(STUB)
        (tmp_path / ".venv" / "bin" / program).chmod(0o755)
    return tmp_path


def demo(clone: Path) -> tuple[list[str], str]:
    """What `make demo` calls, and what it prints."""
    (clone / "calls").write_text("")
    # `make test` tells a make inside it that it is one, which then prints where it enters.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "demo"], cwd=clone, env=env, capture_output=True, text=True, timeout=60, check=True)
    return (clone / "calls").read_text().splitlines(), done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_it_installs_what_it_needs_alone_and_continues_what_is_there(clone: Path) -> None:
    called, printed = demo(clone)
    assert called == INSTALLING + ANEW
    assert printed.startswith("AdvMoE on handwritten digits: 5 epochs") and "two minutes" in printed
    (clone / "runs" / "demo").mkdir(parents=True)
    assert demo(clone)[0] == ANEW  # killed before there was anything to continue
    (clone / "runs" / "demo" / "config.yaml").touch()
    assert demo(clone)[0] == AGAIN
    assert (clone / "runs" / "demo" / "config.yaml").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_environment_of_developers_is_used_where_it_is(clone: Path) -> None:
    (clone / ".venv" / ".installed").touch()
    assert demo(clone)[0] == ANEW

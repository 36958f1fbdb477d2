"""The kernels are compiled once, by whatever compiler there is, and done without where there is none."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from advmoe.native import build

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="no g++")
REPORT = "import torch; from advmoe import native; print(native.available(), native.missing())"


def reported(tmp_path, **environment):
    """What a process of its own says of its kernels."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "advmoe" / "native").glob("*"))


@needs_compiler
def test_compiled_once_and_kept(tmp_path):
    assert reported(tmp_path) == "True None"
    (name,) = files(tmp_path)
    file = tmp_path / "advmoe" / "native" / name
    assert file.parent.stat().st_mode & 0o077 == 0
    made = file.stat().st_mtime_ns
    assert reported(tmp_path) == "True None"
    assert file.stat().st_mtime_ns == made


@needs_compiler
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: reported(tmp_path), range(3))) == {"True None"}
    assert len(files(tmp_path)) == 1


@needs_compiler
def test_a_damaged_file_is_made_again(tmp_path):
    reported(tmp_path)
    (name,) = files(tmp_path)
    file = tmp_path / "advmoe" / "native" / name
    for damaged in (b"", b"not a library", file.read_bytes()[:200]):
        file.write_bytes(damaged)
        assert reported(tmp_path) == "True None"
        assert len(file.read_bytes()) > 1000


@needs_compiler
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    folder = tmp_path / "advmoe" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert reported(tmp_path) == "True None"
    assert files(tmp_path) == []


@needs_compiler
def test_a_cache_folder_that_is_a_file_is_done_without(tmp_path):
    (tmp_path / "advmoe").write_text("")
    assert reported(tmp_path) == "True None"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"ADVMOE_NATIVE": "0"}, "ADVMOE_NATIVE=0"),
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler"),
        ({"CXX": "false"}, "false: failed"),
        ({"CXX": 'g++ "'}, "No closing quotation"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler found"),
    ],
    ids=str,
)
def test_without_a_compiler_pytorch_computes_everything(tmp_path, environment, reason):
    said = reported(tmp_path, **environment)
    assert said.startswith("False ") and reason in said
    assert files(tmp_path) == []


def test_the_fingerprint_is_of_source_flags_and_compiler(monkeypatch, tmp_path):
    first = build._fingerprint(["sh"])
    assert first == build._fingerprint(["sh"])
    assert first != build._fingerprint(["sh", "-m32"])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    assert first != build._fingerprint(["sh"])
    monkeypatch.undo()
    copied = shutil.copytree(build.SOURCE.parent, tmp_path / "native")
    monkeypatch.setattr(build, "SOURCE", copied / "kernels.cpp")
    assert first == build._fingerprint(["sh"])
    assert (copied / "tiles.h").exists()
    for file in ("kernels.cpp", "tiles.h"):
        (copied / file).write_text((copied / file).read_text() + "\n")
        second = build._fingerprint(["sh"])
        assert first != second
        first = second

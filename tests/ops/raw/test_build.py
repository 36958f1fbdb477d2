"""The kernels are compiled once, by whatever compiler there is, loaded whole or not at all, and done without where
there are none.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from advmoe.ops.raw import build

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="no g++")
REPORT = "import torch; from advmoe.ops import raw; print(raw.available(), raw.missing())"
NOTE = "note  no kernels, PyTorch computes everything: "


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What g++ makes of the kernels, quickly."""
    file = tmp_path_factory.mktemp("library") / "kernels.so"
    subprocess.run([COMPILER, *build.FLAGS, "-O0", str(build.SOURCE), "-o", str(file)], check=True)
    return file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of compiled files, not there yet, for this process and those that it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVMOE_NATIVE", raising=False)
    return tmp_path / "cache" / "advmoe" / "native"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes the compiler a shell script, whose `$out` is the file to write; returns the script."""

    def make(script):
        file = tmp_path / "compiler"
        file.write_text(f'#!/bin/sh\nfor out; do :; done\n{script}\necho >>"{tmp_path}/calls"\n')
        file.chmod(0o755)
        monkeypatch.setenv("CXX", shlex.quote(str(file)))
        return file

    return make


def copying(library):
    return f'cp "{library}" "$out"'


def calls(tmp_path):
    return (tmp_path / "calls").read_text().count("\n")


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def only(folder):
    (file,) = folder.iterdir()
    return file


def reported(**environment):
    """What a process of its own says of its kernels, and on stderr."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def built():
    """The kernels as a new process would have them."""
    return build.built.__wrapped__()


@pytest.mark.slow
def test_compiled_once_and_kept(cache, compiler, tmp_path):
    compiler('g++ "$@" -O0')  # quickly
    assert reported() == ("True None", "")
    file = only(cache)
    assert cache.stat().st_mode & 0o077 == 0
    made = file.stat().st_mtime_ns
    assert reported() == ("True None", "")
    assert file.stat().st_mtime_ns == made and calls(tmp_path) == 1


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_disturb_each_other(cache, compiler, library):
    compiler(copying(library))
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda _: reported(), range(2))) == {("True None", "")}
    assert len(list(cache.iterdir())) == 1


DAMAGES = """
import sys, torch
from pathlib import Path
from advmoe.ops.raw import build
assert build.built().functions is not None
(file,) = Path(sys.argv[1]).iterdir()
whole = file.read_bytes()
half, flipped = len(whole) // 2, bytearray(whole)
flipped[half] ^= 1
for damaged in (b"", b"not a library", whole[: half // 25], whole[:half], whole[:-1], whole[:half] + bytes(half),
                bytes(len(whole)), whole + b"x", bytes(flipped)):
    file.unlink()  # its old content stays loaded
    file.write_bytes(damaged)
    build.built.cache_clear()
    assert build.built().functions is not None
    assert file.read_bytes() == whole
"""


@pytest.mark.slow
def test_a_damaged_file_is_made_again(cache, compiler, library, tmp_path):
    compiler(copying(library))
    subprocess.run([sys.executable, "-c", DAMAGES, str(cache)], check=True)
    assert calls(tmp_path) == 10


def test_a_file_of_before_checksums_is_made_again(cache, compiler, library, tmp_path):
    compiler(copying(library))
    assert built().functions is not None
    file = only(cache)
    assert file.read_bytes()[: library.stat().st_size] == library.read_bytes()
    file.unlink()
    shutil.copy(library, file)
    assert built().functions is not None and calls(tmp_path) == 2
    assert built().functions is not None and calls(tmp_path) == 2


@pytest.mark.parametrize("kind", ["link", "fifo", "others"])
def test_only_a_plain_file_of_this_user_is_loaded(cache, compiler, library, tmp_path, kind):
    compiler(copying(library))
    built()
    file, elsewhere = only(cache), tmp_path / "elsewhere.so"
    file.rename(elsewhere)
    content = elsewhere.read_bytes()
    if kind == "link":
        file.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(file)
    elif os.getuid() == 0:
        shutil.copy(elsewhere, file)
        os.chown(file, 12345, 12345)
    else:
        pytest.skip("only root can give files away")
    assert built().functions is not None and calls(tmp_path) == 2
    assert file.is_file() and not file.is_symlink() and file.stat().st_uid == os.getuid()
    assert elsewhere.read_bytes() == content


def test_a_folder_in_the_place_of_the_file_is_done_without(cache, compiler, library):
    compiler(copying(library))
    built()
    file = only(cache)
    file.unlink()
    (file / "kept").mkdir(parents=True)
    assert built().functions is not None
    assert names(cache) == [file.name] and names(file) == ["kept"]


def test_a_folder_that_others_may_write_to_is_not_used(cache, compiler, library):
    compiler(copying(library))
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert built().functions is not None
    assert names(cache) == []


def test_a_folder_of_another_user_is_not_used(cache, compiler, library, monkeypatch):
    compiler(copying(library))
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert built().functions is not None
    assert names(cache) == []


@pytest.mark.parametrize("base", ["file", "/proc"], ids=["a file", "read-only"])
def test_a_cache_folder_that_cannot_be_is_done_without(cache, compiler, library, monkeypatch, tmp_path, base):
    compiler(copying(library))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / base))
    assert built().functions is not None


def test_a_full_cache_folder_is_done_without(cache, compiler, library, tmp_path, capfd):
    full = f'case "$out" in "{cache}"*) echo "ld: error: No space left on device" >&2; exit 1;; esac'
    compiler(f"{full}; {copying(library)}")
    assert built().functions is not None
    assert names(cache) == [] and capfd.readouterr().err == ""


def test_what_killed_compilers_left_is_removed(cache, compiler, library):
    compiler(copying(library))
    for name, age in ((".compiling-old", 1e5), (".compiling-new", 1.0)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    built()
    assert names(cache)[0] == ".compiling-new" and len(names(cache)) == 2


WRONG = {
    "crashes": ("kill -SEGV $$", "signal 11"),
    "fails without a word": ("exit 3", "failed"),
    "says why": ("echo note >&2; echo k.cpp: error: no omp.h >&2; exit 1", "k.cpp: error: no omp.h"),
    "writes nothing": (":", "wrote no library"),
    "writes an empty file": (': >"$out"', "wrote no library"),
    "writes nonsense": ('echo nonsense >"$out"', "file too short"),
    "writes half": ('head -c {half} "{library}" >"$out"', "loading the compiled library failed"),
    "writes half and zeros": ('cp "{library}" "$out"; truncate -s {half} "$out"; truncate -s {size} "$out"', "signal"),
    "links": ('ln -s "{library}" "$out"', "wrote no library"),
    "says nonsense": (r"printf '\377\376\033[2J\n\000' >&2; exit 1", "compiling by"),
    "floods": ("head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero; exit 1", "compiling by"),
}


@pytest.mark.parametrize(("script", "reason"), WRONG.values(), ids=WRONG)
def test_a_compiler_that_is_no_good_is_done_without(cache, compiler, library, capfd, script, reason):
    size = library.stat().st_size
    compiler(script.replace("{half}", str(size // 2)).replace("{size}", str(size)).replace("{library}", str(library)))
    found = built()
    assert found.functions is None and reason in found.reason and found.reason.isprintable()
    (note,) = capfd.readouterr().err.splitlines()
    assert note.startswith(NOTE + found.reason) and len(note) < 300
    assert names(cache) == []


def test_the_reason_names_no_passing_folder(cache, compiler):
    compiler('echo "ld: error: cannot write $out" >&2; exit 1')
    assert built().reason == built().reason


SOURCES = {"undefined symbol": "int missing(void); int advmoe_kernels(void) { return missing(); }",
           "no score": "int advmoe_kernels(void) { return 3; }", "advmoe_kernels": "int other;"}  # fmt: skip


@pytest.mark.parametrize(("reason", "source"), SOURCES.items())
def test_a_library_that_cannot_be_loaded_is_done_without(cache, compiler, tmp_path, capfd, reason, source):
    (tmp_path / "other.c").write_text(source)
    compiler(f'g++ -x c -shared -fPIC "{tmp_path}/other.c" -o "$out"')
    found = built()
    assert found.functions is None and reason in found.reason
    assert capfd.readouterr().err.startswith(NOTE)


def test_a_compiler_that_hangs_is_ended_with_what_it_started(cache, compiler, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "COMPILING_SECONDS", 1)
    compiler(f'sleep 300 & echo $! >>"{tmp_path}/pids"; wait')
    assert "more than 1 s" in built().reason
    assert len(capfd.readouterr().err.splitlines()) == 1 and names(cache) == []
    (pid,) = (tmp_path / "pids").read_text().split()  # it is not tried again
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until its parent, the system, has noticed
            os.kill(int(pid), 0)
            if "(sleep) Z" in Path(f"/proc/{pid}/stat").read_text():
                raise ProcessLookupError
            time.sleep(0.05)


def test_what_a_compiler_leaves_in_the_background_is_not_waited_for(cache, compiler, library, tmp_path):
    compiler(f'sleep 300 & echo $! >"{tmp_path}/pid"; {copying(library)}')
    assert built().functions is not None
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # nobody else did


@pytest.mark.parametrize(
    ("environment", "reason", "said"),
    [
        ({"ADVMOE_NATIVE": "0"}, "ADVMOE_NATIVE=0", False),
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler", True),
        ({"CXX": 'g++ "'}, "No closing quotation", True),
        ({"PATH": "", "CXX": ""}, "no C++ compiler found", False),
    ],
    ids=str,
)
def test_without_a_compiler_pytorch_computes_everything(cache, monkeypatch, capfd, environment, reason, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = built()
    assert found.functions is None and reason in found.reason
    assert capfd.readouterr().err.startswith(NOTE) == said
    assert names(cache) == []


@pytest.mark.slow
def test_a_process_without_kernels_computes(cache, compiler):
    compiler("exit 1")
    code = "import torch, advmoe; torch.set_num_threads(1)\n"
    code += "m = advmoe.create_model('resnet18', num_classes=10, kind='moe', width=4).eval()\n"
    code += "print(m(torch.rand(2, 3, 32, 32)).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([2, 10])\n" and done.stderr.startswith(NOTE) and done.stderr.count("\n") == 1


def test_the_fingerprint_is_of_source_flags_and_compiler(monkeypatch, tmp_path):
    first = build._fingerprint(["sh"])
    assert first == build._fingerprint(["sh"])
    assert first != build._fingerprint(["sh", "-m32"])
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    assert first != build._fingerprint(["sh"])
    monkeypatch.undo()
    copied = shutil.copytree(build.SOURCE.parent, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCE", copied / "kernels.cpp")
    assert first == build._fingerprint(["sh"])
    assert (copied / "tiles.h").exists()
    for file in ("kernels.cpp", "tiles.h"):
        (copied / file).write_text((copied / file).read_text() + "\n")
        second = build._fingerprint(["sh"])
        assert first != second
        first = second

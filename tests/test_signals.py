"""Commands that a signal, or the machine, ends: real processes, their exit codes, what they say and who is left."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE, alive, until

from advmoe import cli
from advmoe.config import Config
from advmoe.signals import raised

TERM, HUP, INT = signal.SIGTERM, signal.SIGHUP, signal.SIGINT

SLEEPER = """
import signal, sys, time
from pathlib import Path
from advmoe import cli
from advmoe.cli import recipes
from advmoe.cli.arguments import continuable

for name in sys.argv[1].split():
    signal.signal(getattr(signal, name), signal.SIG_IGN)

def run(args, argv):
    with continuable(Path(sys.argv[2]), "advmoe again", "mark"):
        print("ready", flush=True)
        time.sleep(1 if sys.argv[1] == "SIGHUP" else 1000)
    return 0

recipes.run = run
sys.exit(cli.main(["recipes"]))
"""


def children(process):
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(file.parent.name))
    return found


def popen(*command, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True, **more)


@pytest.mark.parametrize(
    ("ignored", "sent", "code", "said"),
    [
        ("SIGINT", TERM, 143, "ended by SIGTERM; to continue: advmoe again"),
        ("SIGINT", HUP, 129, "ended by SIGHUP; to continue: advmoe again"),
        ("SIGTERM", INT, 130, "interrupted; to continue: advmoe again"),
        ("SIGHUP", HUP, 0, None),  # as with nohup
    ],
)
def test_what_asks_a_command_to_end_ends_it_with_one_line(tmp_path, ignored, sent, code, said):
    (tmp_path / "mark").touch()
    default = lambda: signal.signal(INT, signal.default_int_handler)  # noqa: E731  a test runner may ignore it
    process = popen("-c", SLEEPER, ignored, str(tmp_path), preexec_fn=default)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (code, "" if said is None else f"advmoe: error: {said}\n")


def as_usual():
    """Have SIGINT do what it does in a terminal: a test runner may ignore it."""
    signal.signal(INT, signal.default_int_handler)


DISCARDING = """
import sys, time, weakref
from advmoe.signals import described, raised

class Watched: ...

def callback(_):
    if not waited:
        waited.append(True)
        print("ready", flush=True)
        time.sleep(1000)

waited = []
try:
    with raised():
        thing = Watched()
        kept = weakref.ref(thing, callback)
        del thing
        time.sleep(1000)
except KeyboardInterrupt as error:
    print(*described(error))
"""


@pytest.mark.parametrize(
    ("sent", "said"), [(TERM, "ended by SIGTERM 143"), (HUP, "ended by SIGHUP 129"), (INT, "interrupted 130")]
)
def test_a_signal_that_comes_where_exceptions_are_discarded_ends_the_process_all_the_same(sent, said):
    process = popen("-c", DISCARDING, preexec_fn=as_usual)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    assert process.communicate(timeout=PATIENCE) == (said + "\n", "")


BOTH = """
import signal, time, weakref
from advmoe.signals import described, raised

class Watched: ...

try:
    with raised():
        thing = Watched()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt as error:
    time.sleep(0.3)
    print(*described(error))
"""


def test_a_discarded_signal_cuts_short_nothing_that_another_began():
    process = popen("-c", BOTH, preexec_fn=as_usual)
    assert process.communicate(timeout=PATIENCE) == ("interrupted 130\n", "")


def test_a_discarded_signal_ends_nothing_that_is_over():
    alone = BOTH.replace("        signal.raise_signal(signal.SIGINT)\n", "")
    process = popen("-c", alone + "else:\n    time.sleep(0.3)")
    assert process.communicate(timeout=PATIENCE) == ("", "") and process.returncode == 0


def test_other_exceptions_that_are_discarded_are_told_as_ever(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError("discarded")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(str(lost.exc_value)))
    usual = sys.unraisablehook
    with raised():
        Fails()
    assert told == ["discarded"] and sys.unraisablehook is usual


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found there")
def test_a_training_that_is_ended_in_the_background_leaves_no_process(tmp_path):
    """With SIGINT ignored, as a shell has it of what a script starts with `&`."""
    run = tmp_path / "run"
    values = {
        "model": {"width": 4}, "data": {"name": "digits", "image_size": 8, "train_examples": 64},
        "training": {
            "epochs": 1000, "batch_size": 32, "attack_steps": 1, "step_size": "8/255", "val_attack_steps": 1,
        },
    }  # fmt: skip
    Config.from_dict(values).dump(tmp_path / "tiny.yaml")
    process = popen(
        "-m", "advmoe", "train", "--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(run), "--devices", "2",
        "--threads", "1", "--accelerator", "cpu", preexec_fn=lambda: signal.signal(INT, signal.SIG_IGN),
    )  # fmt: skip
    until(lambda: (run / "last").exists() or process.poll() is not None)
    at_work = children(process.pid)
    assert len(at_work) >= 2
    process.send_signal(TERM)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (85, "")
    assert re.fullmatch(
        rf"advmoe: error: stopped by SIGTERM (within|after) epoch .*; to continue: advmoe train --resume {run}\n", error
    )
    until(lambda: not any(map(alive, at_work)))  # the tracker of their memory goes a moment after them


# Below, the work itself is replaced: what is tested is what the command line makes of its end.


def outcome(monkeypatch, capsys, error, argv=("recipes",), mark=None):
    def run(*_):
        if mark is None:
            raise error
        with cli.arguments.continuable(mark.parent, "advmoe again", mark.name):
            raise error

    monkeypatch.setattr(cli.recipes, "run", run)
    monkeypatch.setattr(cli, "_parse", lambda argv: ("recipes", {}))
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("advmoe: error: ") and err.count("\n") == 1
    return code, err.removeprefix("advmoe: error: ").strip()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "a: Too many open files"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "run/x.jsonl"), "run/x.jsonl: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", "run/x"), "run/x: Permission denied"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "CUDA out of memory. Tried"),
    ],
)  # fmt: skip
def test_what_the_machine_failed_at_is_one_line_with_how_to_go_on(tmp_path, monkeypatch, capsys, error, said):
    code, text = outcome(monkeypatch, capsys, error, ["train", "--run-dir", "run"])
    assert code == 3 and text.startswith(said)
    (tmp_path / "mark").touch()
    code, text = outcome(monkeypatch, capsys, error, mark=tmp_path / "mark")
    assert code == 3 and text.startswith(said)
    assert text.endswith(f"; what {tmp_path} holds is kept; to continue: advmoe again")
    code, text = outcome(monkeypatch, capsys, error, mark=tmp_path / "absent")
    assert code == 3 and "to continue" not in text


@pytest.mark.parametrize("argv", [["x", "--a", "some/file"], ["x", "--a=some/file"]])
@pytest.mark.parametrize("kind", [FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError])
def test_a_file_that_the_user_named_is_a_mistake_in_the_input(monkeypatch, capsys, kind, argv):
    code, text = outcome(monkeypatch, capsys, kind(1, "not to be read", "some/file"), argv)
    assert (code, text) == (2, "some/file: not to be read")


@pytest.mark.parametrize("error", [RuntimeError("a"), KeyError("a"), ValueError("a library's"), BrokenPipeError()])
def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "mark").touch()
    with pytest.raises(type(error)):
        outcome(monkeypatch, capsys, error, mark=None if isinstance(error, BrokenPipeError) else tmp_path / "mark")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_output_to_a_full_disk_is_the_machine_s_failure(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "advmoe", "recipes"], stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
        )  # fmt: skip
    assert done.returncode == 3 and done.stderr.startswith("advmoe: error: No space left on device; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "9"}, None),
        ({"KMP_BLOCKTIME": "0"}, None),
    ],
)  # fmt: skip
def test_openmp_s_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import json, os, sys\nfrom advmoe import cli\nfrom advmoe.cli import recipes\n"
        "recipes.run = lambda *_: print(json.dumps([os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules])) or 0\n"
        "cli.main(['recipes'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True,
        timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [expected, False]


SMALL_FILES = """
import resource, sys
from advmoe.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
raise SystemExit(main(["export", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="files cannot be limited")
@pytest.mark.parametrize(("format", "name"), [("torch-export", "model.pt2"), ("onnx", "model.onnx")])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(make_digits_run, tmp_path, format, name):
    run = make_digits_run(tmp_path / "run")
    words = [str(run), "--format", format, "--num-examples", "2", "--threads", "1", "--out", str(tmp_path / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SMALL_FILES, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "File too large" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

import fcntl
import io
import json
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from advmoe import cli, progress
from advmoe.progress import bar, shown, tell, tracked

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_users_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADVMOE_LOG_FORMAT")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """What bars are drawn on in place of stderr, however short their loops are."""
    made = Terminal()

    def eager(*args: Any, **kwargs: Any) -> Any:
        return tqdm(*args, **{**kwargs, "file": made, "delay": 0.0})

    eager.write = tqdm.write  # type: ignore[attr-defined]
    monkeypatch.setattr(progress, "tqdm", eager)
    monkeypatch.setattr(progress, "drawable", lambda: True)
    return made


def drawn(terminal: Terminal) -> set[str]:
    """What the bars that were drawn say they count."""
    return set(re.findall(r"\r([^\r:|]+): +\d+%", terminal.getvalue()))


def test_bars_count_and_estimate(terminal: Terminal) -> None:
    with shown():
        assert list(tracked(iter("abc"), "letters", total=3, unit="letter")) == ["a", "b", "c"]
        with bar("bytes", 10, unit="B", done=4) as counted:
            counted.update(6)
    text = terminal.getvalue()
    assert re.search(r"letters: +0%.*0/3 \[\d\d:\d\d<", text)  # elapsed < remaining
    assert re.search(r"bytes: 100%.*10/10", text)


def test_what_is_nothing_or_one_is_not_drawn(terminal: Terminal) -> None:
    with shown():
        list(tracked([1], "one"))
        bar("none", 0, unit="it").close()
    assert terminal.getvalue() == ""


def test_a_bar_inside_another_is_gone_when_it_is_done(terminal: Terminal) -> None:
    with shown(), bar("outer", 2, unit="it") as outer:
        with bar("inner", 2, unit="it") as inner:
            inner.update(2)
        outer.update(2)
    text = terminal.getvalue()
    assert "inner:   0%" in text
    assert re.search(r"\n\r +\x1b\[A\router: 100%.*2/2.*\n$", text), text  # its line is wiped, the outer one stays


def test_delays_add_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(progress, "tqdm", lambda **kwargs: asked.append(kwargs["delay"]))
    monkeypatch.setattr(progress, "drawable", lambda: True)
    with shown():
        bar("at once", 2, unit="it")
        bar("later", 2, unit="it", delay=3.0)
        with shown(delay=2.0):
            bar("inside", 2, unit="it")
            bar("later still", 2, unit="it", delay=3.0)
    assert asked == [0.0, 3.0, 2.0, 3.0]


def test_nothing_is_drawn_unless_wanted(terminal: Terminal) -> None:
    list(tracked([1, 2], "not asked for"))
    with shown(), shown(False):
        list(tracked([1, 2], "inside a loop"))
    list(tracked([1, 2], "after"))
    assert terminal.getvalue() == ""


def test_nothing_is_drawn_off_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with shown():
        list(tracked([1, 2], "into a file"))
        bar("into a file", 2, unit="it").close()
        tell("a line")
    assert capfd.readouterr().err == "a line\n"


def test_a_process_that_draws_nothing_leaves_nothing_behind() -> None:
    # Locks between processes are reported as leaked where a worker is ended before it could let go of its own.
    code = """
import multiprocessing
import multiprocessing.resource_tracker as tracker
multiprocessing.set_start_method("spawn")  # as it is in a worker
from advmoe.progress import tracked
list(tracked([1], "x"))
assert tracker._resource_tracker._fd is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loop_left_early_leaves_no_bar_behind(terminal: Terminal) -> None:
    with shown():
        for _ in tracked(range(5), "left"):
            break
        with bar("next", 1, unit="it") as following:
            assert following.pos == 0  # the first line: nothing else is drawn


DIGITS = ("--threads", "1", "--num-examples", "30", "--batch-size", "15")
ROUTED = ("--attacks", "pgd-2,routed", "--attack.queries", "2", "--threat.eps", "0.01", "--workers", "1")
COMMANDS = {
    "evaluate": ([*ROUTED, *DIGITS], {"clean", "search", "pathways", "steps", "routed"}),
    "dissect": (["--no-figure", *DIGITS], {"pgd-2", "steps"}),
    "pathways": (["--no-figure", *DIGITS], {"pgd-2", "steps"}),
    "sweep-eps": (["--eps", "0,0.1", "--attacks", "pgd-2", "--no-figure", *DIGITS], {"radii", "pgd-2"}),
    "cost": (["--batch", "1", "--seconds", "0", "--threads", "1"], {"batch 1"}),
    "export": (["--format", "torch-export", "--threads", "1"], {"compare", "time"}),
}  # fmt: skip


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("command", COMMANDS)
def test_long_loops_of_commands(
    command: str, make_digits_run: Callable[..., Path], tmp_path: Path, terminal: Terminal
) -> None:
    options, expected = COMMANDS[command]
    run = make_digits_run(tmp_path / "run")
    assert cli.main([command, str(run), *options]) == 0, terminal.getvalue()
    assert expected <= drawn(terminal)


@pytest.mark.usefixtures("shallow_backbones")
def test_training_shows_epochs_and_their_validation(tmp_path: Path, terminal: Terminal) -> None:
    options = ["--training.epochs", "1", "--data.train_examples", "200", "--model.width", "8", "--threads", "1"]
    command = ["train", "--config", "digits-advmoe", "--run-dir", str(tmp_path / "run"), *options]
    assert cli.main(command) == 0, terminal.getvalue()
    found = drawn(terminal)
    assert "epoch 1/1" in found and any(name.startswith("pgd-") for name in found), found
    assert "clean" not in found  # one batch


@pytest.mark.usefixtures("shallow_backbones")
def test_the_attack_inside_a_training_step_is_not_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    loop = sys.modules["advmoe.attacks.pgd"]  # the package has a function of that name
    monkeypatch.setattr(
        loop, "tracked", lambda items, *a, **k: asked.append(progress._delay.get() is not None) or items
    )
    data = ["--data.train_examples", "100", "--data.val_fraction", "0"]
    options = ["--run-dir", str(tmp_path / "run"), "--training.epochs", "1", "--model.width", "8"]
    assert cli.main(["train", "--config", "digits-advmoe", *options, *data]) == 0
    assert asked and not any(asked)


@pytest.mark.slow
def test_on_a_real_terminal(make_digits_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_digits_run(tmp_path / "run")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "advmoe", "evaluate", str(run), "--attacks", "pgd-2", "--workers", "1", *DIGITS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    shown_there = ""
    with suppress(OSError):  # the end
        while part := os.read(ours, 10_000):
            shown_there += part.decode()
    os.close(ours)
    assert done.returncode == 0 and re.search(r"pgd-2: 100%.*2/2", shown_there), shown_there
    assert b"pgd-2: " not in done.stdout


def test_a_loop_that_no_bar_shows_tells_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with shown(), bar("train", 100, unit="it") as outer:
        with bar("inner", 3, unit="it") as inner:
            for _ in range(3):
                now[0] += 61
                inner.update()
        for _ in range(10):
            now[0] += 30
            outer.update(10)
    lines = capsys.readouterr().err.splitlines()
    # After 213 seconds, a minute each later; nothing of the loop inside. 90 of 100 are left after 10 in 213 s.
    assert lines[0] == "train  10/100 it  4 min  left 32 min"
    assert [line.split()[1] for line in lines] == ["10/100", "30/100", "50/100", "70/100", "90/100"]


def until_told(capsys: pytest.CaptureFixture[str]) -> str:
    """The first line on stderr, which somebody else writes."""
    ends, text = time.monotonic() + 30, ""
    while not text.endswith("\n"):
        assert time.monotonic() < ends, "no line"
        time.sleep(0.01)
        text += capsys.readouterr().err
    return text.splitlines()[0]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_step_longer_than_a_minute_is_no_silence(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", form)
    monkeypatch.setattr(progress, "MINUTE", 0.2)
    monkeypatch.setattr(progress, "WATCH", 0.01)
    with shown(), bar("attack", 3, unit="batch"), bar("steps", 50, unit="step") as inner:
        inner.update(20)
        line = until_told(capsys)
    if form == "text":
        assert re.fullmatch(r"attack  0/3 batch \(steps  20/50 step\)  0\.\d+ s", line)
        return
    told = json.loads(line)
    assert told.pop("seconds") > 0 and told.pop("text").startswith("attack  0/3 batch")
    assert told == {
        "event": "progress", "what": "attack", "done": 0, "total": 3,
        "inside": {"what": "steps", "done": 20, "total": 50},
    }  # fmt: skip


def test_nobody_watches_a_loop_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WATCH", 0.01)
    before = set(threading.enumerate())  # of earlier tests, which may end at any time
    with shown(), bar("one", 3, unit="it"), bar("inside", 3, unit="it"):
        (watcher,) = set(threading.enumerate()) - before
    watcher.join(timeout=30)
    assert not watcher.is_alive() and progress.Lines._open == []


def test_bytes_are_told_in_megabytes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with shown(), bar("archive", 170_000_000, unit="B") as drawn:
        now[0] += 85
        drawn.update(42_500_000)
    assert capsys.readouterr().err == "archive  42.5/170.0 MB  85 s  left 4 min\n"


class Notebook(io.StringIO):
    """As ipykernel's streams: no terminal, yet a carriage return begins the line anew."""


def test_a_notebook_has_one_line_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Notebook()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "stderr", stream)
    with shown():
        with bar("outer", 2, unit="it", mininterval=0) as outer:
            for _ in range(2):
                with bar("inner", 200, unit="it", mininterval=0) as inner:
                    for _ in range(200):
                        inner.update()
                outer.update()
            tell("a line")
        with bar("after", 2, unit="it") as after:
            after.update(2)
    text = stream.getvalue()
    assert "outer: 100%" in text and "after: 100%" in text and "inner" not in text
    assert "\x1b[A" not in text and text.count("\n") == 3  # each bar's last line, and the line that was told
    assert "\ra line\n" in text or "\na line\n" in text


@pytest.mark.parametrize(("form", "told"), [("text", ["a note", "epoch 1"]), ("quiet", ["a note"])])
def test_who_wants_it_quiet_gets_notes_alone(
    form: str, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", form)
    tell("a note")
    tell("epoch 1", "epoch", epoch=1)
    assert capsys.readouterr().err.splitlines() == told


def test_lines_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", "json")
    tell("a note")
    tell("epoch 1", "epoch", epoch=1, val=None)
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == [
        {"event": "note", "text": "a note"},
        {"event": "epoch", "epoch": 1, "val": None, "text": "epoch 1"},
    ]


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(
    ("options", "told"), [([], 1), (["--quiet"], 0), (["--log-format", "quiet"], 0), (["--log-format=json"], 1)]
)
def test_a_line_for_each_epoch(tmp_path: Path, capsys: Any, options: list[str], told: int) -> None:
    small = ["--training.epochs", "1", "--data.train_examples", "64", "--model.width", "4", "--threads", "1"]
    command = ["train", "--config", "digits-advmoe", "--run-dir", str(tmp_path / "run"), *small]
    assert cli.main([*command, *options]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == told
    if options == ["--log-format=json"]:
        epoch = json.loads(lines[0])
        assert (epoch["event"], epoch["epoch"], epoch["best"]) == ("epoch", 1, True)
        assert epoch["val"] == json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["val"]
    elif told:
        assert lines[0].startswith("epoch 1/1  routers kl ")
    assert [line.split()[0] for line in out.splitlines() if not line.startswith("note")] == [
        "best", "time", "run", "next",
    ]  # fmt: skip


def test_json_is_all_that_is_there(tmp_path: Path) -> None:
    code = (
        "import sys, warnings\nfrom advmoe import cli\n"
        "def run(args, argv):\n    warnings.warn('look out')\n    raise cli.InputError('no such thing')\n"
        "cli.COMMANDS['recipes'].run = run\nsys.exit(cli.main(['recipes', '--log-format', 'json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert [json.loads(line) for line in done.stderr.splitlines()] == [
        {"event": "warning", "text": "UserWarning: look out"},
        {"event": "error", "exit_code": 2, "text": "advmoe: error: no such thing"},
    ]


@pytest.mark.usefixtures("shallow_backbones")
def test_a_line_for_each_attack(make_digits_run: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    run = make_digits_run(tmp_path / "run")
    words = ["--attacks", "pgd-1,pgd-2", "--workers", "1", *DIGITS]
    assert cli.main(["evaluate", str(run), *words]) == 0
    err = capsys.readouterr().err
    robust = json.loads((run / "evaluation.json").read_text())["robust_accuracy"]
    lines = [line for line in err.splitlines() if "robust" in line]
    assert [line.split()[:2] for line in lines] == [[name, f"{100 * share:.1f}"] for name, share in robust.items()]
    assert all("% robust at eps 0.1  " in line for line in lines)


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["dissect", "--attacks", "pgd-1,pgd-1-soft"], [("pgd-1", "0.1"), ("pgd-1-soft", "0.1")]),
        (["pathways", "--attacks", "pgd-1"], [("pgd-1", "0.1")]),
        (["sweep-eps", "--attacks", "pgd-1", "--eps", "0,2/255"], [("pgd-1", eps) for eps in ("0", "2/255", "1")]),
    ],
)
def test_other_measurements_tell_of_their_attacks(
    command: list[str], told: list[tuple[str, str]], make_digits_run: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    run = make_digits_run(tmp_path / "run")
    name, *words = command
    assert cli.main([name, str(run), *words, "--no-figure", *DIGITS]) == 0
    lines = re.findall(r"^(\S+)  [\d.]+ % robust at eps (\S+)  ", capsys.readouterr().err, re.MULTILINE)
    assert lines == told

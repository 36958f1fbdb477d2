"""The command line as a whole: mistakes, pipes, and what needs no PyTorch. Commands have files of their own."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from advmoe import cli
from advmoe.config import Config
from advmoe.recipes import METHODS, SETTINGS


def run(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The command as users run it, in a process and a working directory of its own."""
    command = [sys.executable, "-m", "advmoe", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("advmoe: error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


TRAIN = ("train", "--config", "digits-advmoe")


# Each of these is a process of its own; those below take the same way inside this one.
MISTAKES = [
    ([*TRAIN, "--training.epoch", "3"], ["--training.epoch is no option of train: did you mean --training.epochs?"]),
    ([*TRAIN, "--training.lr", "fast"], ["training.lr must be a number, got 'fast'"]),
    ([*TRAIN, "--training.lr", "-1"], ["training.lr must be > 0, got -1.0"]),
    ([*TRAIN, "--threat.eps", "8/0"], ["threat.eps must be a number or a fraction such as 8/255, got '8/0'"]),
    ([*TRAIN, "--run-dir", "full"], ["the run directory must be new or empty", "--resume", "--run-dir", "'full'"]),
    (["train"], ["--config must be a YAML file or a recipe (see `advmoe recipes`), got nothing"]),
    (["train", "--config", "digits-admoe"], ["--config must be", "'digits-admoe' (did you mean digits-advmoe?)"]),
    (["train", "--config", "full/broken.yaml"], ["full/broken.yaml must be valid YAML, got: ", "line 3"]),
    (["train", "--config", "full/unknown.yaml"], ["model.wdth is no known field: did you mean model.width?"]),
    (["train", "--resume", "absent"], ["--resume must be a run directory", "'absent'"]),
    (["evaluate", "absent"], ["RUN must be a run directory", "'absent'"]),
    (["evaluate", "full", "--attack.steps", "0"], ["attack.steps must be >= 1, got 0"]),
    ([], ["train", "evaluate", "recipes"]),
]
MORE_MISTAKES = [
    ([*TRAIN, "--training.epochs", "[" * 3000], ["training.epochs must be valid YAML, got: more than 32 levels"]),
    ([*TRAIN, "--training.epochs", "9" * 4000], ["training.epochs must be valid YAML, got: a number of 4000 digits"]),
    ([*TRAIN, "--training.epochs", "1:30"], ["training.epochs must be a whole number, got '1:30'"]),
    ([*TRAIN, "--training.epochs", "1e21"], ["training.epochs must be a whole number, got 1e+21"]),
    ([*TRAIN, "--training.compile", "yes"], ["training.compile must be true or false, got 'yes'"]),
    ([*TRAIN, "--training.lr", "x" * 4000], ["training.lr must be a number, got 'xxx"]),
    ([*TRAIN, "--" + "x" * 4000, "1"], ["xxx... is no option of train"]),
    (
        [*TRAIN, "--run-dir", "n" * 300],
        ["--run-dir must be a path of at most 3840 bytes, each of its parts of at most"],
    ),
    (
        [*TRAIN, "--run-dir", "a\nb"],
        ["--run-dir must be 1 to 4096 characters of UTF-8 without control characters, got"],
    ),
    ([*TRAIN, "--run-dir", "\udcff"], ["--run-dir must be 1 to 4096 characters of UTF-8 without control characters"]),
    ([*TRAIN, "--run-dir", "new", "--threat.eps", "0"], ["threat.eps must be >= 1e-06 when training.method is advmoe"]),
    ([*TRAIN, "--threads", "100000"], ["--threads must be >= 1 and <= 256, got 100000"]),
    (["evaluate", "n" * 300], ["RUN|FILE.py:FACTORY must be a path of at most 3840 bytes"]),
    (["evaluate", "\0"], ["RUN|FILE.py:FACTORY must be 1 to 4096 characters of UTF-8 without control characters"]),
    (
        ["report", "full", "-o", "n" * 250],
        ["--out must be a path of at most 3840 bytes, each of its parts of at most 200"],
    ),
    (["cost", "resnet18", "--scale", ".nan"], ["--scale must be > 0 and <= 1, got nan"]),
    (["cost", "resnet18", "--seconds", ".inf"], ["--seconds must be >= 0 and <= 86400, got inf"]),
    (["evaluate", "full", "--seed", "4294967296"], ["--seed must be >= 0 and <= 4294967295, got 4294967296"]),
    ([*TRAIN, "--lr=3"], ["--lr is no option of train: did you mean --training.lr?"]),
    ([*TRAIN, "--run_dir", "x"], ["did you mean --run-dir?"]),
    ([*TRAIN, "--zzz", "x"], ["--zzz is no option of train: see advmoe train --help"]),
    ([*TRAIN, "--training.lr", "[1"], ["training.lr must be valid YAML"]),
    ([*TRAIN, "--training.lr"], ["--training.lr", "expected one argument"]),
    ([*TRAIN, "--training.compile", "1"], ["training.compile must be true or false, got 1"]),
    ([*TRAIN, "--model.kind", "mo"], ["model.kind must be one of moe, dense, s-dense, sparse, got 'mo'"]),
    ([*TRAIN, "--model.kind", "dense"], ["model.kind must be moe when training.method is advmoe, got 'dense'"]),
    ([*TRAIN, "--training.alternation", "often"], ["training.alternation must be one of both, ", "got 'often'"]),
    (
        [*TRAIN, "--data.train_examples", "2000"],
        ["data.train_examples must be ", "<= the 1442 training images, got 2000"],
    ),
    ([*TRAIN, "--threat.eps", "-1/255"], ["threat.eps must be >= 0 and <= 1, got -1/255"]),
    ([*TRAIN, "--devices", "0"], ["--devices must be >= 1, got 0"]),
    ([*TRAIN, "--accelerator", "tpu"], ["--accelerator must be one of auto, cpu, cuda, got 'tpu'"]),
    (["train", "--config", "absent.yaml"], ["--config must be", "'absent.yaml'"]),
    (["train", "--config", "cifar10-resnet18-advmoe", "--data.root", "nowhere"], ["data.root must ", "nowhere"]),
    (["train", "--resume", "full", "--training.lr", "1"], ["--resume must be without", "'full'"]),
    (["evaluate", "full", "--num-examples", "some"], ["--num-examples must be a whole number, got 'some'"]),
    (["evaluate", "full", "--training.lr", "1"], ["--training.lr is no option of evaluate"]),
    (["evaluate"], ["required: RUN|FILE.py:FACTORY"]),
    (["trian"], ["'trian'", "train"]),
]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    full = tmp_path / "full"
    full.mkdir()
    Config().dump(full / "config.yaml")
    (full / "broken.yaml").write_text("training:\n  lr: [1\n")
    (full / "unknown.yaml").write_text("model:\n  wdth: 16\n")
    return tmp_path


@pytest.mark.parametrize(("args", "parts"), MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_a_mistake_is_one_line_and_creates_nothing(workplace: Path, args: Sequence[str], parts: list[str]) -> None:
    before = sorted(workplace.rglob("*"))
    assert_refused(run(workplace, *args), *parts)
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(("args", "parts"), MORE_MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_more_mistakes(
    workplace: Path, args: Sequence[str], parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = sorted(workplace.rglob("*"))
    monkeypatch.chdir(workplace)
    code = cli.main(list(args))
    out, err = capsys.readouterr()
    assert_refused(subprocess.CompletedProcess(args, code, out, err), *parts)
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize(
    ("before", "unbuffered", "code"),
    [
        ("", "", 141),  # printed when all is done, and flushed
        ("", "1", 141),
        ("recipes.describe_setting = lambda name: 100_000 * name", "", 141),  # more than fits in a buffer
        ("run = recipes.run; recipes.run = lambda *a: run(*a) + 1", "", 1),  # what the command has to say comes first
    ],
)
def test_a_reader_that_has_seen_enough_leaves_no_traceback(
    tmp_path: Path, before: str, unbuffered: str, code: int
) -> None:
    script = (
        f"import sys\nfrom advmoe import cli\nfrom advmoe.cli import recipes\n{before}\nsys.exit(cli.main(['recipes']))"
    )
    ours, theirs = os.pipe()
    os.close(ours)  # as `head` does once it has its lines
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=theirs,
        stderr=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip
    os.close(theirs)
    assert (done.returncode, done.stderr) == (code, b"")


def test_another_broken_pipe_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> NoReturn:
        raise BrokenPipeError

    monkeypatch.setattr(cli.recipes, "run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["recipes"])


def test_what_a_terminal_cannot_show_is_printed_with_escapes() -> None:
    code = (
        "from advmoe import cli; "
        "cli.COMMANDS['recipes'].run = lambda args, argv: print('caf\\xe9 \\u732b \\udce9') or 0; "
        "raise SystemExit(cli.main(['recipes']))"
    )
    for encoding, shown in (("ascii", rb"caf\xe9 \u732b \udce9"), ("utf-8", "café 猫 ".encode() + rb"\udce9")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, shown, b"")


def test_nobody_need_hear_what_is_told(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-c", "from advmoe.progress import tell; tell('a'); print('done')"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    assert done.stdout == b"done\n"


@pytest.mark.slow
def test_no_room_for_bytecode_leaves_every_module_whole(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1)); "
    start = "from advmoe import cli; raise SystemExit(cli.main({}))"

    def ended(code: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    def modules() -> set[Path]:
        return set((tmp_path / "bytecode").rglob("*.pyc"))

    assert ended(start.format(["--version"]))[0] == 0  # what is imported before a command knows of its limits
    before = modules()
    refused = ended(limited + start.format(["report", "none"]))
    assert modules() == before
    assert ended(start.format(["report", "none"])) == refused
    assert refused[0] == 2 and modules() > before


def test_too_little_memory_to_start_is_one_line(tmp_path: Path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (450 * 2**20, -1)); "
        "from advmoe import cli; raise SystemExit(cli.main({}))"
    )
    environment = dict(os.environ)
    for args, expected in ((["train", "--config", "digits-advmoe"], 3), (["recipes"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(args)], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == expected and done.stderr.count("\n") == (expected != 0), done
    assert list(tmp_path.iterdir()) == []


def test_recipes_and_version(tmp_path: Path) -> None:
    listed = run(tmp_path, "recipes")
    assert (listed.returncode, listed.stderr) == (0, "")
    indented = [line.split()[0] for line in listed.stdout.splitlines() if re.match(r"  \S", line)]
    assert indented == [*SETTINGS, *METHODS]
    assert "as in cifar10-resnet18-advmoe" in listed.stdout
    assert run(tmp_path, "--version").stdout.startswith("advmoe ")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["train", "--help"],
        ["recipes"],
        [*TRAIN, "--print_config"],
        [*TRAIN, "--training.lr", "0"],
        ["evaluate", "absent"],
    ],
    ids=" ".join,
)
def test_answers_without_importing_torch(tmp_path: Path, args: list[str]) -> None:
    code = (
        "import sys\nfrom advmoe.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'numpy', 'lightning_fabric'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> NoReturn:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli.recipes, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["recipes"])


def test_help_of_a_command(tmp_path: Path) -> None:
    asked, usual = run(tmp_path, "help", "train"), run(tmp_path, "train", "--help")
    assert (asked.returncode, asked.stdout) == (0, usual.stdout)
    assert run(tmp_path, "help").stdout == run(tmp_path, "--help").stdout
    assert_refused(run(tmp_path, "help", "trian"), "did you mean train?")


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["evalute", "full"], "evaluate"),
        (["study", "table-1"], "table1"),
        (["train", "--config", "digit-advmoe"], "digits-advmoe"),
        ([*TRAIN, "--model.name", "resnet81"], "resnet18"),
        ([*TRAIN, "--training.method", "advmo"], "advmoe"),
        ([*TRAIN, "--threat.norm", "lnf"], "linf"),
        (["train", "--data.name", "cifr10"], "cifar10"),
        (["study", "fig2", "--scale", "smok"], "smoke"),
        (["cost", "wrm-28-10"], "wrn-28-10"),
        (["--completoin", "bash"], "--completion"),
        (["--versoin"], "--version"),
        (["recipes", "--log-format", "jsn"], "json"),
    ],
)
def test_a_slip_of_the_fingers_gets_the_nearest_name(
    workplace: Path, args: list[str], meant: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(workplace)
    assert cli.main(args) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: Any) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*cli.COMMANDS, "num-examples", "training.lr"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("command", [f"{sys.executable} -m advmoe --completion bash | head -n 1", "closed"])
def test_a_reader_that_leaves_and_a_closed_output_are_no_bugs(command: str) -> None:
    command = f"{sys.executable} -m advmoe recipes >&-" if command == "closed" else command
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_completion_for_another_shell_is_refused(tmp_path: Path) -> None:
    assert_refused(run(tmp_path, "--completion", "cmd"), "--completion must be one of bash, zsh, fish, got 'cmd'")


def test_a_log_format_that_the_environment_names_is_one_of_them(monkeypatch, capsys):
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", "xml")
    assert cli.main(["recipes"]) == 2
    said = "advmoe: error: ADVMOE_LOG_FORMAT must be one of text, json, quiet, got 'xml'\n"
    assert capsys.readouterr() == ("", said)
    for usual in ("", "json"):
        monkeypatch.setenv("ADVMOE_LOG_FORMAT", usual)
        assert cli.main(["recipes"]) == 0

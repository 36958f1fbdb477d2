"""What a file of the user's registers is a choice everywhere, in every process, and nowhere unless it is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe.errors import InputError
from advmoe.tables import BACKBONES, plugins

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin.py"


def run(cwd: Path, *args: object, plugins_of: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    if plugins_of is not None:
        environment["ADVMOE_PLUGINS"] = plugins_of
    command = [sys.executable, "-m", "advmoe", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


TRAIN = (
    "train", "--config", "digits-advmoe", "--run-dir", "run", "--data.name", "shifted-digits", "--model.name", "tiny",
    "--model.router", "brightness", "--training.method", "experts-twice", "--training.epochs", "1",
    "--data.train_examples", "128", "--training.batch_size", "32", "--threads", "1", "--accelerator", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("plugins")
    done = run(home, *TRAIN, "--plugin", PLUGIN)
    assert done.returncode == 0, done.stderr
    return home


def test_one_of_each_is_trained_and_evaluated(trained: Path) -> None:
    words = ("--threads", "1", "--accelerator", "cpu", "--num-examples", "20", "--batch-size", "10")
    # In two worker processes, which know the plugin as well; named by the environment this time.
    done = run(
        trained, "evaluate", "run", "--attacks", "corner,pgd-2-logit", "--workers", "2", *words,
        plugins_of=str(PLUGIN),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    robust = json.loads((trained / "run" / "evaluation.json").read_text())["robust_accuracy"]
    assert set(robust) == {"corner", "pgd-2-logit"}


def test_reports_and_costs_know_them(trained: Path) -> None:
    assert run(trained, "cost", "run", f"--plugin={PLUGIN}", "--batch", "1", "--seconds", "0").returncode == 0
    done = run(trained, "report", "run", "--plugin", PLUGIN, "--no-gallery")
    assert done.returncode == 0, done.stderr
    assert "experts-twice" in (trained / "report.html").read_text()


def test_help_names_them(tmp_path: Path) -> None:
    told = run(tmp_path, "train", "--plugin", PLUGIN, "--help").stdout
    assert all(name in told for name in ("tiny", "brightness", "shifted-digits", "experts-twice"))
    told = run(tmp_path, "train", "--help").stdout
    assert "tiny-imagenet" in told and "experts-twice" not in told


@pytest.mark.parametrize("words", [("predict", "run", "x.png"), ("evaluate", "run")])
def test_a_run_that_needs_a_plugin_says_so_without_it(trained: Path, words: tuple[str, ...]) -> None:
    done = run(trained, *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert any(name in done.stderr for name in ("experts-twice", "tiny", "shifted-digits", "brightness"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "must be a Python file"),
        ("raise ValueError('no')", "no"),
        ("import absent_package", "absent_package"),
        ("from advmoe import register_backbone\nregister_backbone('resnet18', width=8)(print)", "already"),
        ("x =", "SyntaxError"),
    ],
)
def test_a_plugin_that_fails_is_one_line(tmp_path: Path, text: str | None, part: str) -> None:
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    done = run(tmp_path, "recipes", "--plugin", file)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    assert "mine.py" in done.stderr and part in done.stderr


def test_two_files_of_one_name_are_two_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.PLUGINS, "")
    names = ("first-of-two", "second-of-two")
    try:
        for folder, name in zip("ab", names, strict=True):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "mine.py").write_text(
                f"from advmoe import register_backbone\nregister_backbone({name!r}, width=8)(print)\n"
            )
            plugins.add_plugin(tmp_path / folder / "mine.py")
            plugins.add_plugin(tmp_path / folder / "mine.py")  # executed once
        assert all(BACKBONES.find(name).width == 8 for name in names)
        assert len(os.environ[plugins.PLUGINS].split(os.pathsep)) == 2
    finally:
        for name in names:
            BACKBONES.pop(name, None)


def test_a_package_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "one", "package.module"

        def load(self) -> None:
            BACKBONES["from-a-package"] = BACKBONES["resnet18"]

    class Broken(Point):
        name, value = "two", "other.module"

        def load(self) -> None:
            raise ImportError("gone")

    points: list[Point] = [Point()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    try:
        assert BACKBONES.find("from-a-package") is BACKBONES["resnet18"]
        points.append(Broken())
        with pytest.raises(InputError, match=r"the plugin two \(other\.module\) must load"):
            BACKBONES.find("what no table has")
    finally:
        BACKBONES.pop("from-a-package", None)

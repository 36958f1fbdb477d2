"""What a command prints to be run next is called as the command was."""

import sys
from pathlib import Path

import pytest

from advmoe import cli
from advmoe.cli import arguments
from advmoe.cli.arguments import to_run


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Sets by which word this command line was called, from which folder, and what a shell finds."""

    def call(word, *, folder, on_path=()):
        for program in ("advmoe", "python"):
            (tmp_path / "env" / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "env" / "bin" / program).touch(mode=0o755)
        (tmp_path / "work").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(sys, "argv", [word])
        monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
        monkeypatch.setenv("PATH", ":".join(str(tmp_path / each) for each in on_path))

    return call


MODULE = "lib/advmoe/__main__.py"


@pytest.mark.parametrize(
    ("word", "folder", "on_path", "program"),
    [
        ("{env}/bin/advmoe", "work", ["env/bin"], "advmoe"),  # an environment that is activated
        ("env/bin/advmoe", ".", [], "env/bin/advmoe"),
        ("{env}/bin/advmoe", ".", [], "env/bin/advmoe"),
        ("{env}/bin/advmoe", "work", [], "{env}/bin/advmoe"),
        ("{env}/bin/advmoe", "work", ["other/bin"], "{env}/bin/advmoe"),
        (MODULE, "work", ["env/bin"], "advmoe"),
        (MODULE, ".", [], "env/bin/python -m advmoe"),
        (MODULE, "work", [], "{env}/bin/python -m advmoe"),
        ("pytest", "work", [], "advmoe"),  # called from Python
    ],
)
def test_it_is_called_as_this_one_was(called, tmp_path, word, folder, on_path, program):
    env = tmp_path / "env"
    called(word.format(env=env), folder=folder, on_path=on_path)
    assert to_run("evaluate", "my run") == f"{program} evaluate 'my run'".format(env=env)


def test_where_the_package_is_not_installed_its_python_is_called(called, tmp_path):
    called(MODULE, folder="work", on_path=["env/bin"])
    (tmp_path / "env" / "bin" / "advmoe").unlink()
    assert to_run("recipes") == "python -m advmoe recipes"


def test_plugins_stay():
    argv = ["train", "--plugin", "a.py", "--quiet", "--plugin=b c.py", "--config", "x"]
    assert to_run("evaluate", Path("run"), plugins_of=argv) == "advmoe evaluate run --plugin a.py --plugin 'b c.py'"


def test_an_interrupted_evaluation_says_the_whole_command(make_digits_run, tmp_path, monkeypatch, capsys):
    run = make_digits_run(tmp_path / "run")
    (run / ".evaluation").mkdir()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.evaluation.runs.evaluate_run", interrupted)
    words = ["evaluate", str(run), "--attacks", "pgd-2", "--num-examples", "8"]
    for given in (words, [*words, "--resume"]):
        assert cli.main(given) == 130
        said = capsys.readouterr().err.strip()
        assert said.endswith(f"to continue: advmoe evaluate {run} --attacks pgd-2 --num-examples 8 --resume")


def test_a_sound_folder_is_trained_on_next(tmp_path, monkeypatch, capsys):
    from PIL import Image

    for number, name in enumerate(("ant", "bee")):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 40), (i, 100 * number, 0)).save(tmp_path / "my photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "check", "my photos"]) == 0
    assert capsys.readouterr().out.endswith("\nnext  advmoe train --data.root 'my photos'\n")
    assert cli.main(["init", "my.yaml"]) == 0
    assert capsys.readouterr().out.endswith("next  advmoe train --config my.yaml\n")
    assert arguments._program() == ["advmoe"]

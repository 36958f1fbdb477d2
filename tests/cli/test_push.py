"""`advmoe push`: what is passed on. The upload is replaced; tests/hub makes it, to a stand-in for the Hub."""

import pytest

import advmoe.hub
from advmoe import cli
from advmoe.config import Config


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the upload was asked for, of a run in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    Config().dump(tmp_path / "run" / "config.yaml")
    calls = []
    monkeypatch.setattr(
        advmoe.hub, "push_to_hub", lambda *arguments, **options: calls.append((arguments, options)) or "https://url"
    )
    return calls


def test_a_run_and_a_repository_are_all_that_must_be_given(asked, capsys):
    assert cli.main(["push", "run", "lab/tiny"]) == 0
    ((arguments, options),) = asked
    assert (str(arguments[0]), arguments[1]) == ("run", "lab/tiny")
    assert options.pop("private") is None and not options  # whether an old repository is private is left as it is
    assert capsys.readouterr().out == "https://url\n"


def test_options_are_passed_on(asked):
    words = ["--private", "--branch", "dev", "--license", "mit", "--model", "net.py:make"]
    assert cli.main(["push", "run", "lab/tiny", *words]) == 0
    assert asked[0][1] == {"private": True, "branch": "dev", "license": "mit", "source": "net.py:make"}


@pytest.mark.parametrize(
    ("words", "message"), [(["absent", "a/b"], "RUN must be a run directory"), (["run"], "required")]
)
def test_mistakes_show_before_anything_is_sent(asked, capsys, words, message):
    assert cli.main(["push", *words]) == 2
    assert message in capsys.readouterr().err and asked == []

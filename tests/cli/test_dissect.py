"""`advmoe dissect`: a table for each attack, the file, and a figure unless none is wanted."""

import json
import re

import pytest

from advmoe import cli

pytestmark = pytest.mark.usefixtures("shallow_backbones")

WORDS = ["--attacks", "pgd-2,pgd-1-soft", "--num-examples", "6", "--accelerator", "cpu", "--threads", "1"]


def test_each_attack_is_dissected(make_digits_run, tmp_path, capsys):
    run = make_digits_run(tmp_path / "run")
    assert cli.main(["dissect", str(run), *WORDS]) == 0
    out = capsys.readouterr().out.splitlines()
    written = json.loads((run / "dissection.json").read_text())
    assert list(written) == ["pgd-2", "pgd-1-soft"] and [line for line in out if line in written] == list(written)
    assert {path.name for path in run.glob("*.svg")} == {f"dissection-{name}.svg" for name in written}
    assert out[-1] == f"written to {run / 'dissection.json'} and a figure beside it"
    assert any(line.startswith("masking gap  ") for line in out)
    classes = [line.split() for line in out if line[:1].isdigit() and len(line.split()) == 6 and line.count("%") == 2]
    assert [(name, images) for name, images, *_ in classes] == [
        (found["classes"][each["class"]], str(each["num_examples"]))
        for found in written.values()
        for each in found["per_class"]
    ]
    # One step of the run's size crosses the ball, two of them too: nothing to beware of.
    assert not any(line.startswith("flag ") for line in out)


def test_steps_that_fall_short_are_flagged(make_digits_run, tmp_path, capsys):
    run = make_digits_run(tmp_path / "run")
    words = ["--attacks", "pgd-1", "--attack.step_size", "0.05", *WORDS[2:], "--no-figure", "--out", "DIR"]
    assert cli.main(["dissect", str(run), *(str(tmp_path / "out") if word == "DIR" else word for word in words)]) == 0
    flag = "flag  pgd-1: 1 steps of 0.05 cannot cross the ball from its centre to its edge, 0.1"
    out = re.sub(r"\n {6}", " ", capsys.readouterr().out).splitlines()
    assert flag in out and out[-1] == f"written to {tmp_path / 'out' / 'dissection.json'}"
    assert not list(tmp_path.rglob("*.svg"))

"""`advmoe pathways`: a table, the file, and figures."""

import json

import pytest

from advmoe import cli
from advmoe.evaluation.pathways import table

pytestmark = pytest.mark.usefixtures("shallow_backbones")

WORDS = ["--attacks", "pgd-1", "--num-examples", "10", "--accelerator", "cpu", "--threads", "1"]


def test_a_run_is_traced(make_digits_run, tmp_path, capsys):
    run = make_digits_run(tmp_path / "run")
    assert cli.main(["pathways", str(run), *WORDS]) == 0
    result = json.loads((run / "pathways.json").read_text())
    figures = len(list(run.glob("pathways-*.svg")))
    assert figures > 0 and result["attack"]["name"] == "pgd-1"
    beside = f" and {figures} figures beside it, pathways-*.svg"
    assert capsys.readouterr().out == f"{table(result)}\n\nwritten to {run / 'pathways.json'}{beside}\n"


def test_what_to_compare_with_must_be_a_run(make_digits_run, tmp_path, capsys):
    run = make_digits_run(tmp_path / "run")
    assert cli.main(["pathways", str(run), "--against", str(tmp_path / "absent"), *WORDS]) == 2
    assert "--against must be a run directory" in capsys.readouterr().err

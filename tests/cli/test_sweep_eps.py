"""`advmoe sweep-eps`: radii as they are written, a table for each attack, the file, and a figure."""

import json

import pytest

from advmoe import cli

pytestmark = pytest.mark.usefixtures("shallow_backbones")

WORDS = ["--attacks", "pgd-2", "--num-examples", "6", "--accelerator", "cpu", "--threads", "1"]


@pytest.mark.parametrize("figure", [True, False])
def test_radii_are_fractions_or_numbers(make_digits_run, tmp_path, capsys, figure):
    run = make_digits_run(tmp_path / "run")
    assert cli.main(["sweep-eps", str(run), "--eps", "0, 51/255", *WORDS, *([] if figure else ["--no-figure"])]) == 0
    out = capsys.readouterr().out.splitlines()
    curves = json.loads((run / "sweep.json").read_text())["curves"]
    assert list(curves) == ["pgd-2", "worst case"] and [line for line in out if line in curves] == list(curves)
    assert [point["eps"] for point in curves["pgd-2"]["points"]] == pytest.approx([0, 0.2])
    assert (run / "sweep.svg").exists() == figure
    drawn = f" and {run / 'sweep.svg'}" if figure else ""
    assert out[-1] == f"written to {run / 'sweep.json'}{drawn}"


def test_draws_are_counted_from_one(make_digits_run, tmp_path, capsys):
    run = str(make_digits_run(tmp_path / "run"))
    assert cli.main(["sweep-eps", run, "--eps", "0.1", *WORDS, "--eot", "0"]) == 2
    assert "--eot must be >= 1, got 0" in capsys.readouterr().err
    assert (
        cli.main(["sweep-eps", run, "--eps", "0.1", *WORDS, "--num-examples", "60", "--eot", "2", "--no-figure"]) == 0
    )
    (point,) = json.loads((tmp_path / "run" / "sweep.json").read_text())["curves"]["pgd-2"]["points"]
    assert point["gradient_passes"] == 2 * 2


@pytest.mark.parametrize(("eps", "message"), [(None, "--eps must be radii in pixels"), ("0,x", "'x'"), ("2", "2")])
def test_what_are_no_radii(make_digits_run, tmp_path, capsys, eps, message):
    run = make_digits_run(tmp_path / "run")
    before = sorted(run.iterdir())
    assert cli.main(["sweep-eps", str(run), *WORDS, *([] if eps is None else ["--eps", eps])]) == 2
    assert message in capsys.readouterr().err and sorted(run.iterdir()) == before

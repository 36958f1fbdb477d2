"""`advmoe search`: what it prints, and mistakes as one line with nothing created."""

import sys

import pytest

from advmoe import cli
from advmoe.rundir import write_result

pytest.importorskip("optuna")

FIELDS = ["--data.name", "digits", "--data.val_fraction", "0.2", "--model.width", "4"]


@pytest.fixture
def advmoe(tmp_path, monkeypatch, capsys):
    """Runs the command on a space, in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text("training.lr: {low: 0.01, high: 0.2, log: true}\n")

    def call(*words):
        code = cli.main(["search", *words])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "SPACE must be a YAML file of fields to vary, got 'none.yaml'"),
        (["space.yaml"], "--config must be a YAML file or a recipe"),
        (["space.yaml", *FIELDS, "--training.lr", "0.1"], "--training.lr must be left out, as the space varies it"),
        (["space.yaml", *FIELDS, "--objective", "best"], "--objective must be one of worst_case, clean_accuracy"),
        (["space.yaml", *FIELDS, "--pruner", "half"], "--pruner must be one of none, median, asha, got 'half'"),
        (["space.yaml", *FIELDS, "--attacks", "pdg"], "--attacks must be one of routed, autoattack"),
        (["space.yaml", *FIELDS, "--attacks", ","], "--attacks must be at least one attack"),
        (["space.yaml", *FIELDS, "--calibrate"], "--calibrate must be with --dry-run, got 'no --dry-run'"),
        (["space.yaml", *FIELDS, "--trials", "0"], "--trials must be >= 1"),
        (["space.yaml", *FIELDS, "--partition", "gpu"], "--partition must go with --engine slurm"),
        (["space.yaml", *FIELDS, "--data.val_fraction", "0"], "data.val_fraction must be > 0, as trials are compared"),
        (["space.yaml", *FIELDS, "--dry-run", "--status"], "--dry-run must stand without --status"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(advmoe, tmp_path, words, message):
    code, out, err = advmoe(*words)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["space.yaml"]


def test_without_optuna_one_line_names_the_extra(advmoe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = advmoe("space.yaml", *FIELDS)
    assert code == 2 and "search needs the extra search: pip install 'advmoe[search]'" in err
    assert [each.name for each in tmp_path.iterdir()] == ["space.yaml"]


def test_status_tells_how_far_each_trial_is(advmoe, tmp_path):
    end = {
        "number": 0, "state": "finished", "value": 0.25, "parameters": {"training.lr": 0.05}, "epochs": {"1": 0.3},
        "measured": {}, "seconds": 1.0, "error": None,
    }  # fmt: skip
    trials = tmp_path / "runs/search-space/trials"
    write_result(trials / "0000.json", end)
    pruned = {**end, "number": 1, "state": "pruned", "value": None, "parameters": {"training.lr": 0.1}}
    write_result(trials / "0001.json", pruned)
    code, out, _ = advmoe("space.yaml", *FIELDS, "--trials", "3", "--status")
    assert code == 0 and out.splitlines() == [
        "finished     trial 0000  worst_case 25.0 %  (training.lr 0.05)",
        "pruned       trial 0001  after epoch 1, robust_accuracy 30.0 %  (training.lr 0.1)",
        "waiting      trial 0002",
        "3 trials: 1 finished, 1 pruned, 1 waiting; best so far: trial 0000, worst_case 25.0 %  (training.lr 0.05)",
    ]  # fmt: skip


def test_a_dry_run_says_how_long_and_how_much(advmoe, tmp_path, monkeypatch):
    def calibrated(folder, networks, **_):
        return {each.key: {"forward": 0.001, "gradient": 0.002, "train": 0.01, "soft": 0.003, "parameters": 1e6}
                for each in networks}  # fmt: skip

    monkeypatch.setattr("advmoe.studies.estimate.calibrated", calibrated)
    code, out, _ = advmoe("space.yaml", *FIELDS, "--trials", "4", "--accelerator", "cpu", "--dry-run")
    assert (code, out) == (0, "4 trials, 4 to do, by 1 process\n") and not (tmp_path / "runs").exists()
    code, out, _ = advmoe("space.yaml", *FIELDS, "--trials", "4", "--accelerator", "cpu", "--dry-run", "--calibrate")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[3:5]] == [["trial", "4"], ["total", "4"]]
    assert "1 process here: about" in out and not (tmp_path / "runs").exists()

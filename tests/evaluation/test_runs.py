"""Measuring a run as a user does: in processes, interrupted, continued; and a classifier of the user's own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from advmoe import cli
from advmoe.config import Config
from advmoe.documents import read_arrays
from advmoe.evaluation import runs
from advmoe.evaluation.runs import dissect_run, evaluate_run, sweep_run
from advmoe.ops import kernels_used
from advmoe.pool import threads_set
from advmoe.training.run import train

ROOT = Path(__file__).parents[2]
SMALL = ["--attack.steps", "4", "--attack.queries", "5", "--attack.pathways", "1", "--num-examples", "36"]
ATTACKS = ["--attacks", "pgd,pgd-margin,routed", "--batch-size", "12", "--accelerator", "cpu"]
TASKS = 9
"""Three attacks on three batches."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A routed run on digits that is right about most images, and wrong about some under a weak attack."""
    config = Config.from_dict(
        {
            "model": {"width": 8, "experts_init": "shared"},
            "data": {"name": "digits", "image_size": 8, "augment": False},
            "threat": {"eps": "0.1"},
            "training": {
                "method": "standard",
                "epochs": 2,
                "lr": 0.03,
                "batch_size": 64,
                "val_attack_steps": 1,
            },
            "attack": {"step_size": 0.03},
        }
    )
    return train(config, run_dir=tmp_path_factory.mktemp("runs") / "run", accelerator="cpu", threads=1)


@pytest.fixture
def run_dir(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a command line in this process: its exit code, and what it printed on stdout and stderr."""

    def call(*words, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def start(*words, **kwargs):
    """A process of the command line, which Ctrl-C reaches even where the shell around the tests ignores it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "advmoe", *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kwargs,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def written(home):
    """What an evaluation left, but for how long it took."""
    result = json.loads((home / "evaluation.json").read_text())
    for report in result["attacks"].values():
        report.pop("seconds")
    result["cost"].pop("ms_per_image", None)
    with np.load(home / "evaluation-examples.npz", allow_pickle=False) as file:
        return result, {name: file[name].tolist() for name in file.files}


def test_time_is_taken_with_the_threads_asked_for_and_what_it_was_taken_with_stands_beside_it(run_dir):
    given = {"overrides": {"attack": {"steps": 1}}, "num_examples": 8, "workers": 1, "accelerator": "cpu"}
    for threads, used in ((1, 1), (None, 2)):
        with threads_set(2):
            cost = evaluate_run(run_dir, attacks=["pgd"], threads=threads, **given)["cost"]
            assert torch.get_num_threads() == 2
        assert (cost["threads"], cost["batch"], cost["device"], cost["precision"]) == (used, 128, "cpu", "fp32")
        assert cost["kernels"] == kernels_used()


@pytest.mark.slow
def test_the_number_of_workers_changes_no_number(run_dir, tmp_path, command):
    one, three = tmp_path / "one", tmp_path / "three"
    for home, workers in ((one, 1), (three, 3)):
        code, out, err = command("evaluate", run_dir, *SMALL, *ATTACKS, "--workers", workers, "--out", home)
        assert (code, err) == (0, "")
        assert "worst case" in out and f"written to {home}/evaluation.json" in out
    result, examples = written(one)
    assert (result, examples) == written(three)
    # And the numbers are those of the examples.
    held = {name.removeprefix("robust/"): np.array(examples[name]) for name in examples if name.startswith("robust/")}
    assert list(held) == ["pgd-4", "pgd-4-margin", "routed"]
    assert result["robust_accuracy"] == {name: pytest.approx(each.mean()) for name, each in held.items()}
    worst = np.logical_and.reduce(list(held.values()))
    assert result["worst_case"] == pytest.approx(worst.mean())
    assert result["masking_gap"] == pytest.approx(held["pgd-4"].mean() - worst.mean())
    assert 0 < result["worst_case"] <= result["robust_accuracy"]["pgd-4"] < result["clean_accuracy"]
    assert not (one / ".evaluation").exists()
    assert len(set(examples["index"])) == len(examples["label"]) == 36
    for name, report in result["attacks"].items():
        broken = sum(part["broken"] for part in report["parts"].values())
        assert broken == np.sum(examples["clean_correct"]) - held[name].sum()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGINT, 2)])
def test_an_interrupted_evaluation_ends_with_the_same_numbers(run_dir, tmp_path, how, workers, command):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*SMALL, *ATTACKS, "--workers", workers]
    with threads_set(1):  # as the processes have
        evaluate_run(
            run_dir, out=whole, attacks=["pgd", "pgd-margin", "routed"], num_examples=36, batch_size=12, workers=1,
            overrides={"attack": {"steps": 4, "queries": 5, "pathways": 1}}, accelerator="cpu",
        )  # fmt: skip
    process = start("evaluate", run_dir, *options, "--out", cut, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list((cut / ".evaluation").glob("*.*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    code, _, err = finish(process)
    done = {path: path.stat().st_mtime_ns for path in (cut / ".evaluation").glob("*.*.json")}
    assert 0 < len(done) < TASKS and not (cut / "evaluation.json").exists()
    if how == signal.SIGINT:
        assert code == 130 and "interrupted; to continue: advmoe evaluate" in err and "--resume" in err

    # Other settings do not mix with what is there, and leave it alone.
    code, _, err = command("evaluate", run_dir, *options, "--out", cut, "--resume", "--seed", 5)
    assert code == 2 and "--resume must repeat the settings" in err and err.count("\n") == 1
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())

    # Nor does another number of threads, which rounds small batches' convolutions differently.
    code, _, err = command("evaluate", run_dir, *options, "--out", cut, "--resume", "--threads", 2)
    assert code == 2 and "--resume must repeat the settings" in err

    code, _, err = command("evaluate", run_dir, *options, "--out", cut, "--resume")
    assert (code, err) == (0, "")
    assert written(cut) == written(whole)


def test_without_resume_an_evaluation_begins_anew(run_dir):
    stale = run_dir / ".evaluation"
    stale.mkdir()
    (stale / "evaluation.json").write_text(json.dumps({"fingerprint": {}}))
    (stale / "pgd-4.0.json").write_text("{}")
    overrides = {"attack": {"steps": 4}}
    result = evaluate_run(run_dir, attacks=["pgd"], overrides=overrides, num_examples=20, accelerator="cpu")
    assert result["num_examples"] == 20 and not stale.exists()


OWN = """
import torch
from torch import nn

class Bright(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x):
        rows = x.mean((1, 3))[:, :8]
        return torch.cat([rows, rows[:, :2] * 0.5], 1) * self.scale

def make():
    return Bright()
"""


def test_a_classifier_of_the_user_s_own(tmp_path, command):
    (tmp_path / "model.py").write_text(OWN)
    data = ["--data.name", "digits", "--data.image_size", "8", "--threat.eps", "0.05"]
    words = ["evaluate", "model.py:make", *data, "--attacks", "pgd-3,routed", "--num-examples", "20"]
    code, out, err = command(*words, "--accelerator", "cpu", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "routed: the model has no MoE layers, so routed adds nothing" in out
    home = tmp_path / "evaluations" / "model-make"
    result = json.loads((home / "evaluation.json").read_text())
    assert list(result["robust_accuracy"]) == ["pgd-3"] and result["worst_case"] == result["robust_accuracy"]["pgd-3"]
    assert result["attacks"]["routed"] == {"skipped": "the model has no MoE layers, so routed adds nothing"}
    assert "cost" not in result and (home / "evaluation-examples.npz").exists()
    code, _, err = command(*words[:2], *data, "--attacks", "routed", cwd=tmp_path)
    assert code == 2 and "attacks must hold more than routed" in err
    code, _, err = command("evaluate", "model.py", *data, cwd=tmp_path)
    assert code == 2 and "model.py" in err and err.count("\n") == 1
    # A sweep leaves `routed` out too.
    sweep = ["sweep-eps", "model.py:make", *data, "--eps", "0,0.1", "--attacks", "pgd-3,routed", "--num-examples", "20"]
    code, _, err = command(*sweep, "--accelerator", "cpu", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert list(json.loads((home / "sweep.json").read_text())["curves"]) == ["pgd-3", "worst case"]


def test_a_routed_classifier_of_the_user_s_own_with_its_weights(run_dir, tmp_path, command):
    spec = json.loads((run_dir / "model.json").read_text())
    code = f"from advmoe import create_model\ndef net():\n    return create_model(**{spec})\n"
    (tmp_path / "own.py").write_text(code)
    data = ["--data.name", "digits", "--data.image_size", "8", "--threat.eps", "0.1", "--attack.step_size", "0.03"]
    shared = [*SMALL, *data, "--accelerator", "cpu", "--seed", 0]
    weights = ["--weights", run_dir / "model.safetensors"]
    for target, more in ((run_dir, []), ("own.py:net", weights)):
        code, _, err = command("dissect", target, *shared, *more, "--out", Path(target).name[:3], cwd=tmp_path)
        assert (code, err) == (0, "")
    ours, theirs = (json.loads((tmp_path / name / "dissection.json").read_text()) for name in ("run", "own"))
    assert ours == theirs


def test_a_sweep_falls_and_is_drawn(run_dir, command):
    eps = "0,0.1,0.3"
    code, out, err = command("sweep-eps", run_dir, "--eps", eps, *SMALL, "--accelerator", "cpu")
    assert (code, err) == (0, "")
    found = json.loads((run_dir / "sweep.json").read_text())["curves"]
    assert list(found) == ["pgd-4", "pgd-4-soft", "worst case"]
    worst = found["worst case"]
    assert [point["eps"] for point in worst["points"]] == pytest.approx([0, 0.1, 0.3])
    accuracies = [point["robust_accuracy"] for point in worst["points"]]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > accuracies[-1]
    clean = evaluate_run(run_dir, attacks=["pgd-1"], num_examples=36, accelerator="cpu")["clean_accuracy"]
    assert accuracies[0] == pytest.approx(clean)
    assert worst["probe"]["eps"] == 1
    assert "worst case" in out and (run_dir / "sweep.svg").read_text().lstrip().startswith("<?xml")
    kept = read_arrays(run_dir / "sweep-examples.npz")
    assert len(kept.pop("index")) == 36
    shares = {tuple(key.rsplit("/", 1)): float(right.mean()) for key, right in kept.items()}
    points = {
        (name, repr(point["eps"])): point["robust_accuracy"]
        for name, curve in found.items()
        for point in (*curve["points"], curve["probe"])
    }
    assert shares == pytest.approx(points)


def test_a_sweep_records_each_attack_s_own_steps_and_the_gap(run_dir):
    overrides = {"attack": {"steps": 4, "restarts": 2}}
    home, result = sweep_run(
        run_dir, epsilons=[0.04, 0.3], attacks=["pgd-8", "pgd-1", "pgd-2-soft"], overrides=overrides, num_examples=36,
        batch_size=18, accelerator="cpu", threads=1, seed=5,
    )  # fmt: skip
    assert json.loads((home / "sweep.json").read_text()) == result
    assert result["threat"] == {"norm": "linf"} and result["data"] == {"name": "digits", "split": "test"}
    assert result["attack"] == {"steps": 4, "step_size": 0.03, "restarts": 2, "seed": 5}
    # 2.5 eps / N where that is more than the configured 0.03; the probe's eps is 1.
    sizes = {"pgd-1": [0.1, 0.75, 2.5], "pgd-8": [0.03, 0.09375, 0.3125], "pgd-2-soft": [0.05, 0.375, 1.25]}
    for name, expected in sizes.items():
        curve = result["curves"][name]
        points = [*curve["points"], curve["probe"]]
        settings = [point["settings"] for point in points]
        assert [each["step_size"] for each in settings] == pytest.approx(expected)
        assert {(each["steps"], each["restarts"]) for each in settings} == {(int(name[4]), 2)}
        assert all(point["flags"] == {} for point in points)
    at = {name: [p["robust_accuracy"] for p in curve["points"]] for name, curve in result["curves"].items()}
    gaps = [point["masking_gap"] for point in result["curves"]["worst case"]["points"]]
    lowest = [min(pair) for pair in zip(at["pgd-1"], at["pgd-8"], strict=True)]
    assert gaps == pytest.approx([low - worst for low, worst in zip(lowest, at["worst case"], strict=True)])


def test_a_sweep_keeps_what_autoattack_warned_of(tmp_path, monkeypatch):
    pytest.importorskip("pyautoattack")
    soft = OWN.replace("torch.cat", "(torch.cat").replace("* self.scale", "* self.scale).softmax(1)")
    (tmp_path / "soft.py").write_text(soft)
    monkeypatch.chdir(tmp_path)
    _, result = sweep_run(
        "soft.py:make", epsilons=[0.1], attacks=["autoattack:apgd-ce"], num_examples=100, accelerator="cpu", threads=1,
        allow=["logits"], overrides={"data": {"name": "digits", "image_size": 8}},
    )  # fmt: skip
    (point,) = result["curves"]["autoattack:apgd-ce"]["points"]
    assert point["settings"]["attacks"] == ["apgd-ce"]
    assert any("the output is a probability distribution" in flag for flag in point["flags"])
    assert result["curves"]["worst case"]["points"][0]["masking_gap"] is None


def test_a_dissection_records_how_it_was_attacked(run_dir):
    home, found = dissect_run(
        run_dir, attacks=["pgd-1", "pgd-4", "pgd-4-soft"], num_examples=36, batch_size=12, accelerator="cpu", threads=1,
        seed=5,
    )  # fmt: skip
    result = json.loads((home / "dissection.json").read_text())
    assert list(result) == ["pgd-1", "pgd-4", "pgd-4-soft"]
    worst = torch.stack([each.survived for each in found.values()]).all(0).double().mean().item()
    strongest = min(found[name].survived.double().mean().item() for name in ("pgd-1", "pgd-4"))
    for name, each in result.items():
        steps, short = int(name[4]), name == "pgd-1"
        assert each["threat"] == {"norm": "linf", "eps": 0.1} and each["data"] == {"name": "digits", "split": "test"}
        assert each["attack"] == {"steps": steps, "step_size": 0.03, "restarts": 1, "loss": "ce", "seed": 5}
        flag = "1 steps of 0.03 cannot cross the ball from its centre to its edge, 0.1"
        assert each["flags"] == ({flag: 3} if short else {})
        assert each["masking_gap"] == pytest.approx(strongest - worst)


def test_resuming_nothing_says_so(run_dir, command):
    words = ["--attacks", "pgd-1", "--num-examples", "12", "--resume", "--accelerator", "cpu"]
    code, _, err = command("evaluate", run_dir, *words)
    assert code == 0 and (run_dir / "evaluation.json").exists()
    assert err == f"note  nothing to continue in {run_dir / '.evaluation'}: this evaluation starts anew\n"


def test_processes_are_as_many_as_the_cores_that_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 99)
    assert runs._processes(1000, "cpu") == os.cpu_count()
    assert runs._processes(1000, "cuda") == runs._processes(1000, "auto") == 99
    assert runs._processes(3, "cuda") == 3


@pytest.mark.slow
def test_a_dissection_adds_up_and_is_drawn(run_dir, command):
    code, out, err = command("dissect", run_dir, *SMALL[:-1], "12", "--accelerator", "cpu", "--batch-size", "1")
    assert (code, err) == (0, "")
    found = json.loads((run_dir / "dissection.json").read_text())["pgd-4"]
    assert sum(found["categories"].values()) == pytest.approx(1)
    survived = found["categories"]["both_survive"] + found["categories"]["only_routing_fails"]
    assert survived == pytest.approx(found["robust_accuracy"])
    assert len(found["flip_rate"]) == found["num_layers"] == 16
    assert (run_dir / "dissection-pgd-4.svg").exists() and "pgd-4" in out and "masking gap  0.0 points" in out
    # The same attack measured the other way. Batches of one image start alike, though wrong images are not attacked.
    result = evaluate_run(
        run_dir, attacks=["pgd-4"], num_examples=12, batch_size=1, accelerator="cpu", overrides={"attack": {"steps": 4}}
    )
    assert result["robust_accuracy"]["pgd-4"] == found["robust_accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "RUN", "--threat.eps", "1.5"], r"threat.eps must be .*got 1.5"),
        (["evaluate", "RUN", "--threat.eps", "-0.1"], r"threat.eps must be .*got -0.1"),
        (["evaluate", "RUN", "--attacks", "pdg-50"], r"attacks must be one of routed, .*autoattack.*got 'pdg-50'"),
        (["evaluate", "RUN", "--allow", "pixel"], r"allow must name checks of logits, .*got 'pixel'"),
        (["evaluate", "RUN", "--workers", "0"], r"--workers must be >= 1, got 0"),
        (["evaluate", "RUN", "--weights", "w.safetensors"], r"weights must go with FILE.py:FACTORY"),
        (["evaluate", "absent.py:make"], r"absent.py"),
        (["evaluate", "absent"], r"RUN must be a run directory"),
        (["sweep-eps", "RUN"], r"--eps must be radii .*got None"),
        (["sweep-eps", "RUN", "--eps", "0,much"], r"much"),
        (["sweep-eps", "RUN", "--eps", "0,2"], r"eps.*2"),
        (["dissect", "RUN", "--attacks", "routed"], r"attacks to dissect must be PGD's, got 'routed'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run_dir, tmp_path, words, message, command):
    before = sorted(run_dir.rglob("*"))
    code, out, err = command(*[str(run_dir) if word == "RUN" else word for word in words], cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and re.search(message, err)
    assert sorted(run_dir.rglob("*")) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damaged_weights_are_named(run_dir, command):
    (run_dir / "model.safetensors").write_bytes(b"not weights")
    code, _, err = command("evaluate", run_dir)
    assert code == 2 and "model.safetensors" in err and err.count("\n") == 1


def test_a_plain_run_cannot_be_dissected(tmp_path, make_digits_run, command):
    home = make_digits_run(tmp_path / "plain", kind="s-dense")
    code, _, err = command("dissect", home, "--num-examples", "20")
    assert code == 2 and "must have MoE layers" in err

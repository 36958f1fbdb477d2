"""What is measured of a run on CUDA devices, beside the CPU; and what is exported from there."""

import json

import numpy as np
import pytest
import torch

from advmoe.evaluation.cost_report import cost_report
from advmoe.evaluation.gallery import gallery_run
from advmoe.evaluation.pathways import pathways_run
from advmoe.evaluation.runs import dissect_run, evaluate_run, sweep_run

FEW = {"num_examples": 24, "batch_size": 12, "threads": 1}


@pytest.fixture
def both(run, tmp_path):
    """Calls a measurement on the CPU and on the CUDA device, each into a folder of its own."""

    def measure(function, **options):
        return {
            place: function(run, accelerator=place, out=tmp_path / place, **FEW, **options) for place in ("cpu", "cuda")
        }

    return measure


def test_attacks_break_the_same_images(both, tmp_path, exact):
    pytest.importorskip("pyautoattack")
    attacks = ["pgd-3", "pgd-3-soft", "pgd-3-margin", "routed", "autoattack:apgd-ce+square"]
    small = {"attack": {"steps": 3, "pathways": 2, "queries": 10}}
    results = both(evaluate_run, attacks=attacks, overrides=small)
    outcomes = [dict(np.load(tmp_path / place / "evaluation-examples.npz")) for place in ("cpu", "cuda")]
    assert outcomes[0].keys() == outcomes[1].keys() and len(outcomes[0]) > len(attacks)
    if exact:
        assert all(np.array_equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
        assert results["cpu"]["robust_accuracy"] == results["cuda"]["robust_accuracy"]


def test_two_devices_share_the_images(run, tmp_path, pretended):
    attacks = {"attacks": ["pgd-3", "routed"], "overrides": {"attack": {"steps": 3, "pathways": 2, "queries": 10}}}
    one, two = (
        evaluate_run(run, accelerator="cuda", workers=workers, out=tmp_path / str(workers), **FEW, **attacks)
        for workers in (1, 2)
    )
    assert torch.cuda.device_count() == 2
    assert one["robust_accuracy"] == two["robust_accuracy"] and one["clean_accuracy"] == two["clean_accuracy"]


def test_curves_dissections_and_pathways(both, run, tmp_path, exact):
    both(sweep_run, epsilons=[0, 0.1], attacks=["pgd-3"])
    both(dissect_run, attacks=["pgd-3"])
    both(pathways_run, attacks=["pgd-3"], against=run)
    for name in ("sweep", "dissection", "pathways"):
        ours, theirs = (json.loads((tmp_path / place / f"{name}.json").read_text()) for place in ("cpu", "cuda"))
        assert ours.keys() == theirs.keys()
        if exact and name != "sweep":  # whose points hold seconds
            assert measured(ours) == measured(theirs)
    points = [json.loads((tmp_path / place / "sweep.json").read_text())["curves"] for place in ("cpu", "cuda")]
    if exact:
        shares = [[[p["robust_accuracy"] for p in each["points"]] for each in curves.values()] for curves in points]
        assert shares[0] == shares[1]


def measured(result):
    """A result without what says where it was computed."""
    return {key: value for key, value in result.items() if key not in ("sha256", "precision", "device")}


def test_a_gallery_and_costs(run, tmp_path):
    gallery_run(run, number=4, accelerator="cuda", threads=1, out=tmp_path / "gallery")
    assert list((tmp_path / "gallery").iterdir())
    report = cost_report(run, batches=(1, 8), device="cuda", threads=1, seconds=0.05)
    assert report["device"] == torch.cuda.get_device_name(0)
    assert [entry["batch"] for entry in report["batches"]] == [1, 8]


def test_nothing_waits_for_a_device_that_is_not_in_use(run, pretended):
    with pretended.counting() as counts:
        evaluate_run(run, attacks=["pgd-1"], accelerator="cuda", workers=1, **FEW)
    assert counts.devices == {0} and counts.launched > 100

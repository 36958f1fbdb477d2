"""`advmoe evaluate`: what the command line passes on, and how it prints results. The evaluation is replaced."""

from pathlib import Path
from typing import Any

import pytest

from advmoe import cli
from advmoe.cli import evaluate
from advmoe.config import Config
from advmoe.engines import EngineOptions


def test_evaluate_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    Config().dump(tmp_path / "config.yaml")
    seen: dict[str, Any] = {}

    def evaluate_run(run_dir: str, **kwargs: Any) -> dict[str, Any]:
        seen.update(kwargs, run_dir=run_dir)
        return {
            "clean_accuracy": 0.9537,
            "robust_accuracy": {"pgd-50": 0.7, "pgd-50-soft": 0.6912},
            "worst_case": 0.68,
            "num_examples": 360,
            "masking_gap": 0.02,
            "gradient_passes": {"straight_through": 50, "worst_case": 1610},
            "threat": {"norm": "linf", "eps": 8 / 255},
            "attacks": {
                "pgd-50": {"interval": [0.65, 0.745], "seconds": 3.2, "parts": {"pgd": {"attempted": 9, "broken": 1}}},
                "pgd-50-soft": {"flags": {"a warning": 2}},
                "routed": {"skipped": "nothing to attack"},
            },
            "cost": {"gmacs": 0.139, "parameters": 1234567},
        }

    monkeypatch.setattr("advmoe.evaluation.runs.evaluate_run", evaluate_run)
    argv = ["--attack.steps", "20", "--threat.eps", "4/255", "--num-examples", "8", "--seed", "0", "--data.root", "7"]
    argv += ["--attacks", "pgd-50, routed", "--allow", "gradients", "--workers", "3", "--eot", "7", "--resume"]
    assert cli.main(["evaluate", str(tmp_path), *argv]) == 0
    assert seen == {
        "run_dir": str(tmp_path),
        "overrides": {"threat": {"eps": "4/255"}, "attack": {"steps": 20}, "data": {"root": "7"}},
        "attacks": ["pgd-50", "routed"],
        "allow": ["gradients"],
        "num_examples": 8,
        "batch_size": 250,
        "seed": 0,
        "accelerator": "auto",
        "threads": 1,
        "workers": 3,
        "eot": 7,
        "resume": True,
        "engine": EngineOptions(),
    }
    assert capsys.readouterr().out.splitlines() == [
        "360 images, linf eps 8/255",
        "",
        "clean                95.4 %",
        "pgd-50               70.0 %  65.0 to 74.5, 3 s",
        "pgd-50-soft          69.1 %",
        "worst case           68.0 %",
        "masking gap      2.0 points  straight-through PGD less the worst case",
        "gradient passes       1,610  that a robust image withstood, 50 of that PGD",
        "GMACs                 0.139",
        "parameters        1,234,567",
        "",
        "routed: nothing to attack",
        "flag  pgd-50-soft: a warning",
        "",
        f"written to {tmp_path / 'evaluation.json'} and evaluation-examples.npz",
    ]


def test_evaluate_tells_how_many_pathways_were_attacked() -> None:
    parts = {"soft T=1": {"attempted": 6, "broken": 2}, "pathways": {"attempted": 4, "broken": 1}}
    report = {
        "interval": [0.1, 0.6],
        "seconds": 1.0,
        "parts": parts,
        "settings": {"pathways": {"reached": 75, "attacked": 32}},
    }
    result = {
        "clean_accuracy": 0.6, "robust_accuracy": {"routed": 0.3}, "worst_case": 0.3, "num_examples": 10,
        "threat": {"norm": "linf", "eps": 0.1}, "attacks": {"routed": report},
    }  # fmt: skip
    assert [line.split() for line in evaluate._table(result).splitlines()[4:7]] == [
        ["soft", "T=1", "2", "broken", "of", "6"],
        ["pathways", "1", "broken", "of", "4"],
        ["pathways", "reached", "75", "of", "them", "attacked:", "32"],
    ]

"""One entry of each table from outside the package, through training and evaluation: the recipes of CONTRIBUTING.md."""

from advmoe import load_run
from advmoe.attacks.pgd import LOSSES, Loss, margins
from advmoe.config import Config
from advmoe.data.digits import load_digits
from advmoe.evaluation.runs import evaluate_run
from advmoe.moe.routers import ImageRouter
from advmoe.tables import BACKBONES, DATASETS, METHODS, ROUTERS, Backbone, DataSet, Level, Method, Router, lazily
from advmoe.training.run import train


class Heads(ImageRouter):
    def __init__(self, *sizes, pool):
        super().__init__(*sizes, shared=False, pool=pool)


def test_entries_from_outside_are_trained_and_evaluated(tmp_path, monkeypatch):
    resnet10 = Backbone(lazily("advmoe.models.resnet:ResNet", depths=(1, 1, 1, 1)), 64, "ResNet-10")
    monkeypatch.setitem(BACKBONES, "resnet10", resnet10)
    monkeypatch.setitem(ROUTERS, "heads", Router(Heads))
    monkeypatch.setitem(DATASETS, "mine", DataSet(load_digits, "Mine"))
    monkeypatch.setitem(METHODS, "experts-alone", Method((Level("experts"),), "Experts", "TRADES of the experts"))
    squared = Loss(lambda forward, x, labels: lambda logits: (margins(logits, labels) + 100).square().sum())
    monkeypatch.setitem(LOSSES, "squared", squared)
    groups = {
        "model": {"name": "resnet10", "width": 4, "router": "heads"},
        "data": {"name": "mine", "train_examples": 128, "val_fraction": 0.25, "augment": False},
        "training": {
            "method": "experts-alone",
            "epochs": 1,
            "batch_size": 32,
            "attack_steps": 1,
            "val_attack_steps": 1,
        },
    }
    run = tmp_path / "run"

    train(Config.from_dict(groups), run_dir=run)
    assert isinstance(load_run(run).router, Heads)

    found = evaluate_run(run, attacks=["pgd-3-squared"], num_examples=16)
    assert 0 <= found["robust_accuracy"]["pgd-3-squared"] <= found["clean_accuracy"]

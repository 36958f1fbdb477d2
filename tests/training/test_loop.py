"""Epoch by epoch: what is logged, which is the best, where a run goes on, and what a broken one leaves."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

import advmoe
from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.models import save_model
from advmoe.rundir import diverged_note
from advmoe.training import checkpoint as checkpoints
from advmoe.training.loop import fit
from advmoe.training.model import build_model
from advmoe.training.run import train
from advmoe.training.trainer import Trainer, TrainingDiverged

pytestmark = pytest.mark.usefixtures("shallow_backbones")

TINY = {
    "model": {"width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "train_examples": 64, "val_fraction": 0.1, "augment": False},
    "threat": {"eps": "0.1"},
    "training": {"epochs": 4, "batch_size": 29, "attack_steps": 1, "step_size": 0.06, "val_attack_steps": 1},
}
THREADS = {"accelerator": "cpu", "threads": 1}
MANIFEST = {"name": "tiny", "command": None, "devices": 1, "threads": 1, "finished": None, "versions": {"torch": "1"}}


def tiny(**groups):
    return Config.from_dict({name: {**TINY.get(name, {}), **groups.get(name, {})} for name in {*TINY, *groups}})


@pytest.fixture(scope="module")
def dataset():
    """58 images to train on, two batches an epoch, and 6 to validate with."""
    return load_dataset("digits", image_size=8, train_examples=64, val_fraction=0.1)


@pytest.fixture
def trainer_of(dataset):
    def make(**groups):
        config = tiny(**groups)
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        return Trainer(config, build_model(config, dataset), dataset, fabric)

    return make


def measured(pair):
    """What `validate` returns of a pair (clean, robust)."""
    return None if pair is None else dict(zip(("clean_accuracy", "robust_accuracy"), pair, strict=True))


@pytest.fixture
def scored(monkeypatch):
    """Has each epoch set all parameters to its number, and be measured as the next of the pairs (clean, robust)."""

    def put(*accuracies):
        left, epochs = [measured(each) for each in accuracies], []

        def train_epoch(self, epoch, bar):
            epochs.append(epoch)
            for parameter in self.model.parameters():
                parameter.data.fill_(epoch + 1)
            bar.update(2)

        monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
        monkeypatch.setattr(Trainer, "validate", lambda self: left.pop(0))
        return epochs

    return put


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def manifest_of(run):
    return json.loads((run / "manifest.json").read_text())


def epoch_kept(file):
    """The number of the epoch whose weights a file holds."""
    return load_file(file)["backbone.classifier.bias"].unique().item()


@pytest.mark.parametrize(
    ("method", "accuracies", "best"),
    [
        # By robust accuracy, and of equals the last; by clean accuracy where nothing is attacked.
        ("advmoe", [(0.9, 0.2), (0.1, 0.5), (0.2, 0.5), (0.9, 0.4)], 3),
        ("standard", [(0.9, 0.2), (0.1, 0.5), (0.2, 0.5), (0.8, 0.9)], 1),
        ("standard", [None] * 4, 4),
    ],
    ids=["robust", "clean", "no validation"],
)
def test_the_best_epoch_is_kept_and_shipped(trainer_of, scored, tmp_path, capsys, method, accuracies, best):
    epochs = scored(*accuracies)
    fit(trainer_of(training={"method": method}), tmp_path, MANIFEST)
    assert epochs == [0, 1, 2, 3]
    kept = {place: epoch_kept(tmp_path / place / "model.safetensors") for place in ("last", "best", ".")}
    assert kept == {"last": 4, "best": best, ".": best}
    progress = checkpoints.load(tmp_path / "best").progress["best"]
    key = "robust_accuracy" if method == "advmoe" else "clean_accuracy"
    expected = [measured(each) for each in accuracies]
    assert progress == {
        "epoch": best, "val": expected[best - 1], "score": None if accuracies[0] is None else expected[best - 1][key],
    }  # fmt: skip
    assert [line["val"] for line in lines_of(tmp_path)] == expected
    told = capsys.readouterr().out
    assert (f"epoch {best} of 4" in told) == (accuracies[0] is not None)


def test_a_line_of_every_epoch(trainer_of, scored, tmp_path):
    scored(*[(0.5, 0.25)] * 4)
    shown = []
    board = SimpleNamespace(
        follow=lambda lines: shown.append(("follow", lines)),
        write=lambda line, images: shown.append((line["epoch"], sorted(images))),
    )
    fit(trainer_of(), tmp_path, MANIFEST, board)
    lines = lines_of(tmp_path)
    # The first rate of each epoch: 0.1 (1 + cos(pi epoch / 4)) / 2.
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], abs=1e-6)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and not any("phase" in line for line in lines)
    assert shown == [("follow", []), *((epoch, ["val/adversarial", "val/clean"]) for epoch in (1, 2, 3, 4))]


def test_the_end_is_noted_and_an_earlier_failure_is_not(trainer_of, scored, tmp_path):
    scored(*[(0.5, 0.25)] * 4)
    fit(trainer_of(), tmp_path, {**MANIFEST, "diverged": "after epoch 1"})
    manifest = manifest_of(tmp_path)
    assert manifest["finished"] is not None and manifest["wall_seconds"] >= 0 and "diverged" not in manifest
    assert "resumed" not in manifest


def test_an_interrupted_run_goes_on_after_its_last_checkpoint(trainer_of, scored, tmp_path, capsys, monkeypatch):
    epochs = scored(*[(0.5, 0.25)] * 4)
    real = Trainer.train_epoch

    def interrupted(self, epoch, bar):
        if epoch == 2:
            raise KeyboardInterrupt
        real(self, epoch, bar)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_epoch", interrupted)
        fit(trainer_of(), tmp_path, MANIFEST)
    (tmp_path / "metrics.jsonl").open("a").write('{"epoch": 3, "val": null}\n{"epoch": 9, "torn')
    capsys.readouterr()

    resumption = {**MANIFEST, "versions": {"torch": "2"}, "started": "now"}
    fit(trainer_of(), tmp_path, MANIFEST, None, resumption)
    assert epochs == [0, 1, 2, 3]
    # What no checkpoint has is logged again, once.
    assert [(line["epoch"], line["val"] is None) for line in lines_of(tmp_path)] == [(n, False) for n in (1, 2, 3, 4)]
    assert epoch_kept(tmp_path / "last/model.safetensors") == 4
    told = capsys.readouterr()
    assert "note  the run goes on with other PyTorch (1, now 2): the weights need not be" in told.out
    (again,) = manifest_of(tmp_path)["resumed"]
    assert again["versions"] == {"torch": "2"} and again["started"] == "now"

    # Nothing is left to do: what this process has other is neither told nor noted.
    fit(trainer_of(), tmp_path, manifest_of(tmp_path), None, resumption)
    assert len(epochs) == 4 and "note" not in capsys.readouterr().out
    assert len(manifest_of(tmp_path)["resumed"]) == 1


def test_weights_of_another_model_are_refused(trainer_of, scored, tmp_path):
    scored(*[(0.5, 0.25)] * 4)
    fit(trainer_of(), tmp_path, MANIFEST)
    rule = r"/last must hold weights of the model that its config\.yaml, and --model, describe, got RuntimeError: "
    with pytest.raises(ValueError, match=rule) as error:
        fit(trainer_of(model={"width": 8}), tmp_path, MANIFEST)
    assert "\n" not in str(error.value)


# Models that broke


@pytest.fixture
def start(dataset, tmp_path):
    """An untrained run, to start from."""
    config = tiny(training={"method": "standard"})
    (tmp_path / "start").mkdir()
    save_model(build_model(config, dataset).eval(), tmp_path / "start")
    config.dump(tmp_path / "start" / "config.yaml")
    return tmp_path / "start"


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


BROKEN = {
    "standard": {}, "at": {}, "advmoe": {}, "at-routers": {}, "at-experts": {},
    "sparse": {"model": {"kind": "sparse"}, "training": {"prune_epochs": 2}},
    "average": {"training": {"method": "standard", "ema": 0.9}},
    "no validation": {"training": {"method": "standard"}, "data": {"val_fraction": 0.0}},
}  # fmt: skip


def test_a_run_of_which_no_epoch_went_well_holds_the_model_it_started_from(tmp_path, monkeypatch):
    seen = []

    def broken(self, epoch, bar):
        seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        for parameter in self.model.parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "train_epoch", broken)
    with pytest.raises(TrainingDiverged, match=r"after epoch 1: .*; what it started from is kept"):
        train(tiny(), run_dir=tmp_path / "run", **THREADS)
    started_from = {name: tensor.contiguous() for name, tensor in seen[0].items()}
    assert_same_weights(advmoe.load_run(tmp_path / "run").state_dict(), started_from)
    monkeypatch.undo()
    assert "diverged (after epoch 1" in str(diverged_note(tmp_path / "run"))
    train(tiny(training={"epochs": 1}), run_dir=tmp_path / "run", **THREADS)  # of which nothing stands in the way
    assert diverged_note(tmp_path / "run") is None


@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["weights", "logits"])
@pytest.mark.parametrize("method", BROKEN)
def test_nothing_is_kept_of_a_model_that_an_update_broke(start, tmp_path, monkeypatch, method, value):
    """A loss is looked at before its update: what the last one of an epoch breaks shows after it alone."""
    groups = BROKEN[method]
    training = {"epochs": 2, **groups.get("training", {"method": method}), "val_attack_steps": 1}
    training["method"] = training.get("method", method)
    if method in ("at-routers", "at-experts"):
        training["init_from"] = str(start)
    config = tiny(**{**groups, "training": training, "data": groups.get("data", {})})
    epochs = []

    def broken(self, epoch, bar):  # learns nothing, which takes no time
        epochs.append(epoch)
        if len(epochs) == 2:
            named = self.average.state if self.average is not None else dict(self.model.named_parameters())
            for tensor in named.values():
                tensor.data.fill_(value)

    monkeypatch.setattr(Trainer, "train_epoch", broken)
    what = "weights" if value != value else "logits"
    with pytest.raises(TrainingDiverged, match=rf"after epoch 2: .*{what}.* must stay finite"):
        train(config, run_dir=tmp_path / "run", **THREADS)
    for name in ("last", "best"):
        state = checkpoints.load(tmp_path / "run" / name)
        assert state.progress["epoch"] == 1 and all(tensor.isfinite().all() for tensor in state.weights.values())
    assert advmoe.load_run(tmp_path / "run")(torch.rand(2, 1, 8, 8)).isfinite().all()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is None

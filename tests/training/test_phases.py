"""Robust structured pruning as whole runs: three phases, what each changes, how they continue, what they leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import advmoe
from advmoe import cli
from advmoe.config import Config
from advmoe.evaluation.cost import gmacs
from advmoe.evaluation.cost_report import cost_report
from advmoe.evaluation.overlap import read_masks
from advmoe.evaluation.runs import evaluate_run, sweep_run
from advmoe.models import create_model
from advmoe.models.sparse import scores_of
from advmoe.training import checkpoint as checkpoints
from advmoe.training import trainer as trainers
from advmoe.training.phases import phase_at, phases
from advmoe.training.run import TrainingDiverged, resume, train

TINY = {
    "model": {"name": "wrn-10-1", "width": 4, "kind": "sparse"},
    "data": {"name": "digits", "image_size": 8, "train_examples": 320, "val_fraction": 0.1, "augment": False},
    "threat": {"eps": "0.1"},
    "training": {
        "method": "sparse", "epochs": 2, "prune_epochs": 2, "finetune_epochs": 1, "batch_size": 144,
        "step_size": 0.06, "val_attack_steps": 1, "attack_steps": 1,
    },
    "attack": {"steps": 2},
}  # fmt: skip
THREADS = {"accelerator": "cpu", "threads": 1}
ENGINE = {**THREADS, "workers": 1}


def tiny(**groups):
    return Config.from_dict({name: {**TINY.get(name, {}), **groups.get(name, {})} for name in {*TINY, *groups}})


def weights(run):
    return load_file(run / "last" / "model.safetensors")


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_same_runs(run, other):
    """Both checkpoints, the model, its masks, and all that was measured."""
    for name in ("last", "best", "."):
        assert_same_weights(*(load_file(each / name / "model.safetensors") for each in (run, other)))
    for name in ("masks.json", "model.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines_of(each)]
        for each in (run, other)
    ]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, and what its checkpoints held after each epoch, by phase."""
    saved, real = {}, checkpoints.save

    def save(folder, checkpoint, **kwargs):
        copies = {name: value.clone() for name, value in checkpoint.weights.items()}
        saved.setdefault(folder.name, []).append((checkpoint.progress["epoch"], copies))
        real(folder, checkpoint, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        run = train(tiny(), run_dir=tmp_path_factory.mktemp("runs") / "whole", name="tiny", **THREADS)
    return run, saved


# The plan


def test_the_plan_of_a_run():
    first, second, third = phases(tiny(training={"epochs": 7, "prune_epochs": None, "finetune_epochs": None}))
    assert [(p.name, p.first, p.end) for p in (first, second, third)] == [
        ("pretrain", 0, 7), ("prune", 7, 9), ("finetune", 9, 16),
    ]  # fmt: skip
    kinds = [(p.config.model.kind, p.config.training.method) for p in (first, second, third)]
    assert kinds == [("dense", "at"), ("sparse", "sparse"), ("s-dense", "at")]
    seeds = [p.config.training.seed for p in (first, second, third)]
    assert seeds[0] == 0 and len(set(seeds)) == 3
    plan = first, second, third
    assert [phase_at(plan, epoch).name for epoch in (0, 6, 7, 8, 9, 15, 16)] == [
        "pretrain", "pretrain", "prune", "prune", "finetune", "finetune", "finetune",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"init_from": "run"}, [("prune", 0, 2), ("finetune", 2, 3)]),
        ({"finetune_epochs": 0}, [("pretrain", 0, 2), ("prune", 2, 4)]),
        ({"prune_epochs": 0}, [("pretrain", 0, 2), ("finetune", 2, 3)]),
        ({"init_from": "run", "prune_epochs": 0, "finetune_epochs": None}, [("finetune", 0, 2)]),
        ({"epochs": 100, "prune_epochs": None}, [("pretrain", 0, 100), ("prune", 100, 120), ("finetune", 120, 121)]),
    ],
    ids=str,
)
def test_phases_of_no_epoch_are_left_out(training, expected):
    assert [(phase.name, phase.first, phase.end) for phase in phases(tiny(training=training))] == expected


def test_options_hold_for_each_phase_and_a_rate_for_finetuning_alone():
    training = {"epochs": 7, "prune_epochs": None, "finetune_epochs": None, "warmup_epochs": 1}
    plan = phases(tiny(training={**training, "first_attack_steps": "1:2", "lr": 0.1, "finetune_lr": 0.01}))
    told = [(p.config.training.lr, p.config.training.warmup_epochs, p.config.training.finetune_lr) for p in plan]
    assert told == [(0.1, 1, None), (0.1, 1, None), (0.01, 1, None)]
    assert [p.config.training.epochs for p in plan] == [7, 2, 7]
    assert {p.config.training.lr for p in phases(tiny(training=training | {"lr": 0.1}))} == {0.1}


def test_every_other_method_has_one_phase():
    config = tiny(model={"kind": "moe"}, training={"method": "advmoe"})
    (phase,) = phases(config)
    assert (phase.name, phase.first, phase.end) == (None, 0, 2) and phase.config is config


# A whole run


def test_lines_name_their_phase_and_rates_restart(finished):
    lines = lines_of(finished[0])
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["phase"] for line in lines] == ["pretrain", "pretrain", "prune", "prune", "finetune"]
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.05, 0.1, 0.05, 0.1])
    assert [list(line["train"]) for line in lines] == [["all"], ["all"], ["scores"], ["scores"], ["all"]]


def test_pruning_moves_scores_and_statistics_alone(finished):
    _, saved = finished
    begun, *learnt = (w for epoch, w in saved["last"] if 2 <= epoch < 4)
    learnt.append(next(w for epoch, w in saved["best"] if epoch in (3, 4)))
    model = create_model("wrn-10-1", num_classes=10, kind="sparse", width=4, input_size=8, in_channels=1)
    model.load_state_dict(begun)
    model.backbone.reset_scores()
    assert all(map(torch.equal, scores_of(model), (begun[f"backbone.scores.{i}"] for i in range(6))))
    for state in learnt:
        moved = {name for name in begun if not torch.equal(state[name], begun[name])}
        assert {f"backbone.scores.{i}" for i in range(6)} <= moved
        assert all(".scores." in name or "running_" in name or "num_batches" in name for name in moved)


def test_pruning_starts_from_the_best_pretrained_checkpoint(finished):
    _, saved = finished
    begun = next(w for epoch, w in saved["last"] if epoch == 2)
    pretrained = [w for epoch, w in saved["best"] if epoch <= 2][-1]
    assert_same_weights(
        {name: value for name, value in pretrained.items() if name.startswith("backbone.")},
        {name.replace(".dense", ""): v for name, v in begun.items() if name.startswith("backbone.dense.")},
    )


def test_finetuning_leaves_masks_and_dropped_weights_as_they_were(finished):
    run, saved = finished
    begun, after = (next(w for e, w in saved["last"] if e == epoch) for epoch in (4, 5))
    assert all(torch.equal(begun[f"backbone.scores.{i}"], after[f"backbone.scores.{i}"]) for i in range(6))
    model = advmoe.load_run(run)
    slices = model.backbone.layout.slices(model.backbone.surviving_channels())
    for name, (rows, columns) in slices.items():
        old, new = (state[f"backbone.dense.{name}.weight"] for state in (begun, after))
        moved = torch.zeros_like(old, dtype=torch.bool)
        rows = torch.arange(len(old)) if rows is None else rows
        if columns is None:
            moved[rows] = True
        else:
            moved[rows[:, None], columns] = True
        assert torch.equal(old[~moved], new[~moved]) and not torch.equal(old[moved], new[moved])


def test_the_model_is_the_best_of_the_last_phase(finished):
    run, _ = finished
    best = torch.load(run / "best" / "state.pt", weights_only=True)["progress"]["best"]
    line = lines_of(run)[-1]
    assert (best["epoch"], best["val"]) == (5, line["val"]) and best["score"] == line["val"]["robust_accuracy"]
    assert_same_weights(load_file(run / "model.safetensors"), load_file(run / "best" / "model.safetensors"))
    assert json.loads((run / "model.json").read_text())["kind"] == "sparse"
    assert json.loads((run / "manifest.json").read_text())["finished"] is not None


def test_masks_are_of_the_model(finished):
    run, _ = finished
    content = json.loads((run / "masks.json").read_text())
    assert content == {"layers": advmoe.pruning.masks(advmoe.load_run(run))}
    assert [int(mask.sum()) for mask in read_masks(run / "masks.json")] == 2 * [2] + 2 * [4] + 2 * [8]


# Interruptions


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.slow
def test_killed_before_and_after_every_checkpoint_it_ends_bit_identical(finished, tmp_path, monkeypatch):
    whole, _ = finished
    run, real, seen = tmp_path / "run", checkpoints.save, set()

    def save(folder, checkpoint, **kwargs):
        for moment in ("before", "after"):
            if moment == "after":
                real(folder, checkpoint, **kwargs)
            place = (moment, folder.name, checkpoint.progress["epoch"])
            if folder.name == "last" and place not in seen:
                seen.add(place)
                raise Killed

    monkeypatch.setattr(checkpoints, "save", save)
    kinds = []
    with pytest.raises(Killed):
        train(tiny(), run_dir=run, name="tiny", **THREADS)
    for _ in range(2 * 5 - 1):
        with pytest.raises(Killed):
            resume(run)
        kinds.append(advmoe.load_run(run).spec["kind"])
    resume(run)
    assert kinds == 3 * ["dense"] + 6 * ["sparse"]  # what the phase trains, or keeps
    assert_same_runs(run, whole)


@pytest.mark.slow
def test_a_process_killed_while_pruning_is_resumed_bit_identical(finished, tmp_path):
    run = tmp_path / "run"
    tiny().dump(tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "advmoe", "train", "--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(run)]
    process = subprocess.Popen([*command, "--threads", "1", "--accelerator", "cpu"], stderr=subprocess.DEVNULL)
    deadline, metrics = time.monotonic() + 300, run / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and '"prune"' in metrics.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    assert not (run / "masks.json").exists()
    resume(run)
    assert_same_runs(run, finished[0])


@pytest.mark.slow
def test_two_processes_end_with_the_same_masks_and_weights_on_both(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import torch
from pathlib import Path
from advmoe.config import Config
from advmoe.training import run as runs

class Watched(runs.Trainer):
    def validate(self):
        measured = super().validate()
        torch.save(self.model.state_dict(), Path({str(tmp_path)!r}) / f"rank{{self.fabric.global_rank}}.pt")
        return measured

runs.Trainer = Watched
if __name__ == "__main__":
    config = Config.load("{tmp_path}/tiny.yaml")
    runs.train(config, run_dir=Path({str(tmp_path)!r}) / "run", devices=2, accelerator="cpu", threads=1)
"""
    )
    tiny(training={"epochs": 1, "prune_epochs": 1}).dump(tmp_path / "tiny.yaml")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same_weights(*ranks)
    small = advmoe.compact(advmoe.load_run(tmp_path / "run"))  # of the last epoch: finetuning has one
    assert_same_weights({name: value.contiguous() for name, value in ranks[0].items()}, small.state_dict())
    assert [line["phase"] for line in lines_of(tmp_path / "run")] == ["pretrain", "prune", "finetune"]


# Where it starts, and what is left out


def test_starting_from_a_dense_run_is_pretraining_elsewhere(finished, tmp_path):
    dense = tiny(model={"kind": "dense"}, training={"method": "at", "prune_epochs": None, "finetune_epochs": None})
    start = train(dense, run_dir=tmp_path / "dense", **THREADS)
    run = train(tiny(training={"init_from": str(start)}), run_dir=tmp_path / "run", **THREADS)
    assert_same_weights(weights(run), weights(finished[0]))
    assert (run / "masks.json").read_bytes() == (finished[0] / "masks.json").read_bytes()
    assert [(line["epoch"], line["phase"]) for line in lines_of(run)] == [(1, "prune"), (2, "prune"), (3, "finetune")]


def test_starting_from_a_sparse_run_keeps_its_scores(finished, tmp_path):
    settings = {"init_from": str(finished[0]), "prune_epochs": 0}
    run = train(tiny(training=settings), run_dir=tmp_path / "run", **THREADS)
    assert (run / "masks.json").read_bytes() == (finished[0] / "masks.json").read_bytes()
    before, after = weights(finished[0]), weights(run)
    assert all(torch.equal(before[name], after[name]) == (".scores." in name) for name in before if "weight" in name)


def test_the_mask_alone(finished, tmp_path):
    start = finished[0]
    settings = {"init_from": str(start), "finetune_epochs": 0, "prune_epochs": 1}
    run = train(tiny(model={"scale": 0.25}, training=settings), run_dir=tmp_path / "run", **THREADS)
    (line,) = lines_of(run)
    assert line["phase"] == "prune"
    before, after = weights(start), load_file(run / "model.safetensors")
    fixed = [name for name in before if name.endswith((".weight", ".bias"))]
    assert fixed and all(torch.equal(before[name], after[name]) for name in fixed)
    assert [int(mask.sum()) for mask in read_masks(run / "masks.json")] == 2 * [1] + 2 * [2] + 2 * [4]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "s-dense"}, "training.init_from must hold a dense or sparse model .*, got one of kind 's-dense'"),
        (
            {"kind": "dense", "width": 8},
            r"training.init_from must hold a model of the shape in model.*, got .* a dense",
        ),
    ],
    ids=["kind", "shape"],
)
def test_a_start_that_cannot_be_is_named_before_anything_is_made(tmp_path, model, message):
    start = train(
        tiny(model=model, training={"method": "standard", "epochs": 1}), run_dir=tmp_path / "start", **THREADS
    )
    with pytest.raises(ValueError, match=message):
        train(tiny(training={"init_from": str(start)}), run_dir=tmp_path / "run", **THREADS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.name", "deit-tiny"], "model.name must be a CNN when model.kind is sparse, got 'deit-tiny'"),
        (["--training.method", "at"], "training.method must be sparse when model.kind is sparse, got 'at'"),
        (["--training.prune_epochs", "-1"], "training.prune_epochs must be >= 0, got -1"),
    ],
    ids=["transformer", "method", "epochs"],
)
def test_what_cannot_be_pruned_is_one_line_and_nothing_is_made(tmp_path, capsys, options, message):
    tiny(model={"width": 8}).dump(tmp_path / "tiny.yaml")
    words = ["train", "--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"), *options]
    assert cli.main([*words, "--accelerator", "cpu"]) == 2
    assert capsys.readouterr().err == f"advmoe: error: {message}\n"
    assert not (tmp_path / "run").exists()


def test_another_backbone_in_half_precision_without_validation(tmp_path):
    groups = {
        "model": {"name": "resnet18"},
        "data": {"val_fraction": 0.0},
        "training": {"epochs": 1, "prune_epochs": 1, "precision": "bf16-mixed"},
    }
    run = train(tiny(**groups), run_dir=tmp_path / "run", **THREADS)
    measured = [(line["phase"], line["val"]) for line in lines_of(run)]
    assert measured == [("pretrain", None), ("prune", None), ("finetune", None)]
    assert all(value.isfinite().all() for value in load_file(run / "model.safetensors").values())


def test_a_diverging_phase_is_named(tmp_path, monkeypatch):
    real = trainers.robust

    def poisoned(model, *args):
        terms, *rest = real(model, *args)
        if model.spec["kind"] == "sparse":
            terms["kl"] = terms["kl"] * float("nan")
        return terms, *rest

    monkeypatch.setattr(trainers, "robust", poisoned)
    with pytest.raises(TrainingDiverged, match=r"^prune: step 0 \(epoch 1, scores\): .*kl=nan"):
        train(tiny(training={"epochs": 1}), run_dir=tmp_path / "run", **THREADS)


@pytest.mark.slow
def test_compiled_phases_end_close_to_uncompiled(tmp_path):
    groups = {"data": {"val_fraction": 0.0}, "training": {"epochs": 1, "prune_epochs": 1, "lr": 0.01}}
    plain, compiled = (
        weights(
            train(
                tiny(**{**groups, "training": {**groups["training"], "compile": wanted}}),
                run_dir=tmp_path / str(wanted), **THREADS,
            )
        )
        for wanted in (False, True)
    )  # fmt: skip
    for name, value in plain.items():
        if ".scores." in name:  # the rest differs where a mask does
            torch.testing.assert_close(compiled[name], value, rtol=1e-2, atol=1e-3, msg=name)


# What a finished run is good for


def test_it_is_measured_as_the_network_that_is_left(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    narrow = create_model("wrn-10-1", kind="s-dense", num_classes=10, width=4, input_size=8, in_channels=1)
    evaluation = evaluate_run(run, num_examples=16, **ENGINE)
    assert evaluation["cost"]["gmacs"] == pytest.approx(gmacs(narrow), abs=1e-6)
    stored = sum(p.numel() for p in narrow.parameters())
    assert evaluation["cost"]["active_parameters"] == evaluation["cost"]["parameters"] == stored
    assert 0 <= evaluation["worst_case"] <= evaluation["clean_accuracy"] <= 1
    _, swept = sweep_run(run, epsilons=[0.0, 0.1], num_examples=16, **THREADS)
    assert swept["curves"]["worst case"]["points"][0]["robust_accuracy"] == pytest.approx(evaluation["clean_accuracy"])
    report = cost_report(run, batches=[4], threads=1, seconds=0)
    assert list(report["models"]) == ["sparse", "s-dense", "dense"] and report["model"]["kind"] == "sparse"
    assert report["models"]["sparse"] == report["models"]["s-dense"] != report["models"]["dense"]
    assert list(report["batches"][0]["ms_per_image"]) == ["sparse", "s-dense", "dense"]
    assert set(report["batches"][0]["ratio_to"]) == {"s-dense", "dense"} and report["images"] == "test images of digits"


def test_it_is_exported_compacted(finished, tmp_path):
    model, x = advmoe.load_run(finished[0]), torch.rand(1, 1, 8, 8)
    path, report = advmoe.export_run(finished[0], out=tmp_path / "net.pt2", format="torch-export", threads=1)
    assert report["model"]["kind"] == "s-dense" and report["gmacs"] == pytest.approx(gmacs(model), abs=1e-6)
    (logits,) = torch.export.load(path).module()(x)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)


def test_it_is_saved_whole_with_its_masks(finished, tmp_path):
    folder = advmoe.save_pretrained(finished[0], tmp_path / "saved")
    assert_same_weights(advmoe.from_pretrained(folder).state_dict(), advmoe.load_run(finished[0]).state_dict())
    assert (folder / "masks.json").read_bytes() == (finished[0] / "masks.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert "`wrn-10-1` pruned to 0.5 of every layer's channels (Sparse-CNN)" in card and "Method `sparse`: rob" in card
    assert "- epochs: 2 pretrain, 2 prune, 1 finetune, batch 144" in card

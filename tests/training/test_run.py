"""Whole runs, as real processes: what they leave behind, how they continue, how processes agree."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import advmoe
from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.locks import CLAIM, hold
from advmoe.training import run as run_module
from advmoe.training.run import TrainingDiverged, resume, train

TINY = {
    "model": {"name": "wrn-10-1", "width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "train_examples": 320, "val_fraction": 0.1, "augment": True},
    "threat": {"eps": "0.1"},
    # Both levels in each of the two iterations of an epoch.
    "training": {
        "alternation": "both",
        "epochs": 3,
        "batch_size": 144,
        "attack_steps": 1,
        "step_size": 0.06,
        "val_attack_steps": 1,
    },
}
THREADS = {"accelerator": "cpu", "threads": 1}


def tiny(**groups):
    merged = {name: {**TINY.get(name, {}), **groups.get(name, {})} for name in {*TINY, *groups}}
    return Config.from_dict(merged)


def weights(run):
    return load_file(run / "last" / "model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted AdvMoE run."""
    return train(tiny(), run_dir=tmp_path_factory.mktemp("runs") / "whole", name="tiny", **THREADS)


def test_run_directory_holds_what_is_needed_to_trust_and_repeat_it(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "metrics.jsonl", "model.safetensors", "model.json", "best", "last",
        "last-previous",
    }  # fmt: skip
    assert Config.load(finished / "config.yaml") == tiny()
    manifest = json.loads((finished / "manifest.json").read_text())
    assert torch.__version__.startswith(manifest["versions"]["torch"].split("+")[0])
    assert manifest["threads"] == 1 and manifest["seed"] == 0 and manifest["wall_seconds"] > 0
    assert manifest["accelerator"] == "cpu" and "resumed" not in manifest
    assert manifest["finished"] is not None


def test_metrics_name_every_level_layer_and_speed(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert set(line["train"]) == {"routers", "experts"}
        assert {"ce", "kl", "accuracy"} <= set(line["train"]["experts"])
        assert line["images_per_second"] > 0 and line["seconds"] > 0
        assert [layer["layer"] for layer in line["layers"]] == list(range(6))
        for layer in line["layers"]:
            assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)
            assert 0 <= layer["entropy"] <= 0.6932  # at most log 2 for two experts
            assert layer["dead_experts"] == [e for e, share in enumerate(layer["load"]) if share == 0]


def test_shipped_model_is_the_best_checkpoint_and_rebuilds_alone(finished, tmp_path):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    scores = [line["val"]["robust_accuracy"] for line in lines]
    state = torch.load(finished / "best" / "state.pt", weights_only=True)
    best = state["progress"]["best"]
    assert best["score"] == max(scores)
    assert_same_weights(load_file(finished / "model.safetensors"), load_file(finished / "best" / "model.safetensors"))
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    model = advmoe.load_run(tmp_path)
    assert not model.training
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), advmoe.load_run(finished)(x))
    assert advmoe.pathway(model, x).shape == (2, 6)


def test_same_seed_same_weights_other_seed_other_weights(finished, tmp_path):
    again = train(tiny(), run_dir=tmp_path / "again", **THREADS)
    assert_same_weights(weights(again), weights(finished))
    other = train(tiny(training={"seed": 1, "epochs": 1}), run_dir=tmp_path / "other", **THREADS)
    assert any(not torch.equal(a, b) for a, b in zip(weights(other).values(), weights(finished).values(), strict=True))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow),  # whose end test_signals has
    ],
)
def test_interrupted_anywhere_and_resumed_ends_bit_identical(finished, tmp_path, how):
    run = tmp_path / "run"
    tiny().dump(tmp_path / "tiny.yaml")
    command = [sys.executable, "-m", "advmoe", "train", "--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(run)]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--accelerator", "cpu"], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (run / "last" / "checksums.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), error
    if how == signal.SIGINT:
        assert error.count("\n") == 1 and "--resume" in error
    assert json.loads((run / "manifest.json").read_text())["finished"] is None
    (run / "metrics.jsonl").open("a").write('{"epoch": 9, "torn')  # a line cut off by the kill
    resume(run)
    assert_same_weights(weights(run), weights(finished))
    assert_same_weights(load_file(run / "model.safetensors"), load_file(finished / "model.safetensors"))
    epochs = [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]
    manifest = json.loads((run / "manifest.json").read_text())
    (again,) = manifest["resumed"]
    assert manifest["finished"] and again["started"] >= manifest["started"]
    assert again["versions"] == manifest["versions"] and (again["device"], again["threads"]) == ("cpu", 1)


def test_a_run_goes_on_where_it_was_begun(finished, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_module, "_start", lambda launch: asked.append((launch.accelerator, launch.threads)))
    resume(finished)
    resume(finished, accelerator="cuda", threads=3)
    assert asked == [("cpu", 1), ("cuda", 3)]


def test_two_runs_do_not_fill_one_directory(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "manifest.json").read_bytes()
    other = hold(run, folder=True)
    with pytest.raises(ValueError, match=r"run_dir must be free of other processes, got '.*/run': one is training"):
        resume(run)
    assert (run / "manifest.json").read_bytes() == before
    other.close()
    (tmp_path / "new").mkdir()
    other = hold(tmp_path / "new", folder=True)
    with pytest.raises(ValueError, match=r"run_dir must be free of other processes, got '.*/new'"):
        train(tiny(), run_dir=tmp_path / "new", **THREADS)
    other.close()
    assert not list((tmp_path / "new").iterdir())


def test_a_claim_stands_while_a_run_is_filled_and_in_nobodys_way(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    seen, real = [], run_module.fit
    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(run_module, "fit", lambda *args: seen.append((args[1] / CLAIM).exists()) or real(*args))
    run = train(tiny(training={"epochs": 1}), run_dir=tmp_path / "run", **THREADS)
    assert seen == [True] and not (run / CLAIM).exists() and (run / "model.safetensors").exists()


NOTED = ("kernels", "cpu", "device", "devices", "threads", "git_commit")


@pytest.mark.parametrize(
    "field", [*(pytest.param(field, marks=pytest.mark.slow) for field in NOTED[1:]), NOTED[0], "torch", None]
)
def test_what_a_run_goes_on_with_is_told_where_it_is_other(finished, tmp_path, capsys, field):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "last")  # as if stopped within the last of the epochs
    manifest = json.loads((run / "manifest.json").read_text())
    if field in NOTED:
        manifest[field] = {"devices": 1, "threads": 1}.get(field, "other")
        if field in ("devices", "threads"):
            manifest["resumed"] = [manifest | {field: 7}]  # not what it began with, but what it went on with
    elif field == "torch":
        manifest["versions"]["torch"] = "other"
    (run / "manifest.json").write_text(json.dumps(manifest))
    resume(run)
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note  the run goes on with")]
    called = {"git_commit": "code", "torch": "PyTorch", "cpu": "CPU"}.get(field, field)
    assert len(noted) == (field is not None) and all(f"other {called} (" in line for line in noted)
    resume(run)  # nothing is left to do, and nothing to say
    assert "note" not in capsys.readouterr().out


@pytest.mark.slow
def test_batches_too_small_for_the_processes_are_refused(tmp_path):
    rule = r"training images .* must make batches that 2 processes share equally, of >= 2 images each, got 5 a batch"
    data = {"train_examples": 5, "val_fraction": 0.0}
    with pytest.raises(ValueError, match=rule):
        train(tiny(data=data), run_dir=tmp_path / "run", devices=2, **THREADS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("images", "processes"), [(1, 1), (2, 2), (5, 2)])
def test_images_that_make_no_equal_shares_of_two_are_refused(images, processes):
    rule = rf"make batches that {processes} processes share equally, of >= 2 images each, got {images} a batch"
    with pytest.raises(ValueError, match=rule):
        run_module._require_shares(tiny(), SimpleNamespace(train=range(images)), processes)


def test_settings_are_checked_again_where_fields_were_set_since(tmp_path):
    config = tiny()
    config.training.epochs = -5
    with pytest.raises(ValueError, match=r"^training\.epochs must be >= 1, got -5$"):
        train(config, run_dir=tmp_path / "run")
    config = tiny()
    config.training.method, config.training.margin = "standard", 0.5
    with pytest.raises(ValueError, match=r"^training\.method must be .* when training\.margin is > 0, got 'standard'"):
        train(config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"devices": "2"}, "devices must be a whole number"), ({"devices": 0}, "devices must be >= 1"),
        ({"devices": True}, "devices must be a whole number"), ({"threads": -1}, "threads must be >= 1"),
        ({"threads": 1.5}, "threads must be a whole number"), ({"accelerator": "tpu"}, "accelerator must be one of"),
        ({"max_hours": "1"}, "max_hours must be a number"), ({"max_hours": math.nan}, "max_hours must be >= 0"),
        ({"config": {}}, r"config must be a Config \(advmoe.recipe makes one\), got a dict"),
        ({"config": "digits-advmoe"}, "config must be a Config"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_made(tmp_path, options, rule):
    with pytest.raises(ValueError, match=f"^{rule}"):
        train(**{"config": tiny(), "run_dir": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused_where_these_would_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    rule = r"devices must be <= the 1 CUDA devices present \(or go with --accelerator cpu\), got 2"
    for accelerator in ("auto", "cuda"):
        with pytest.raises(ValueError, match=rule):
            train(tiny(), run_dir=tmp_path / "run", devices=2, accelerator=accelerator)


def test_kernels_for_gpus_are_refused_elsewhere_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("advmoe.ops.kernels_missing", lambda device: f"a CUDA device, got {device.type}")
    monkeypatch.setattr(run_module, "load_data", lambda config: pytest.fail("data were read"))
    with pytest.raises(InputError, match=r"^training\.compute kernel needs a CUDA device, got cpu$"):
        train(tiny(training={"compute": "kernel"}), run_dir=tmp_path / "run", **THREADS)
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint_is_refused_by_name_and_the_previous_one_used(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    content = bytearray((run / "last" / "model.safetensors").read_bytes())
    content[-5] ^= 255
    (run / "last" / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r"last/model\.safetensors.*damaged.*last-previous"):
        resume(run)
    assert_same_weights(weights(run), weights(finished))


@pytest.mark.slow
def test_damaged_checkpoints_are_one_line_of_several_processes_too(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "last" / "state.pt").unlink()
    (run / "last-previous" / "state.pt").unlink()
    command = [sys.executable, "-m", "advmoe", "train", "--resume", str(run), "--devices", "2", "--accelerator", "cpu"]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 2, done.stderr
    problems = "; ".join(f"{run / name / 'state.pt'} must exist, got nothing" for name in ("last", "last-previous"))
    said = [line for line in done.stderr.splitlines() if line.startswith("advmoe: error: ")]
    assert said == [f"advmoe: error: {problems}"] and "Traceback" not in done.stderr


REMEMBERING = {"alternation": "warm-start", "attack_routing": "mixed", "balance": 0.01, "ema": 0.9, "awp": 0.005}


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", [REMEMBERING, {"method": "at"}, {"objective": "pgd-at", "optimizer": "adamw", "lr": 1e-3, "clip": 0.5}],
    ids=["warm-start", "at", "pgd-at"],
)  # fmt: skip
def test_two_processes_end_with_the_same_weights_and_memories_on_both(tmp_path, training):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, torch
from pathlib import Path
from advmoe.config import Config
from advmoe.training import run as runs

class Watched(runs.Trainer):
    def validate(self):
        measured = super().validate()
        state = self.state({{}})
        torch.save({{**state.weights, **state.more}}, Path({str(tmp_path)!r}) / f"rank{{self.fabric.global_rank}}.pt")
        return measured

runs.Trainer = Watched
if __name__ == "__main__":
    config = Config.load("{tmp_path}/tiny.yaml")
    runs.train(config, run_dir=Path({str(tmp_path)!r}) / "run", devices=2, accelerator="cpu", threads=1)
"""
    )
    tiny(training={**training, "epochs": 1}).dump(tmp_path / "tiny.yaml")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_same_weights(*ranks)
    saved = weights(tmp_path / "run")
    if training is REMEMBERING:
        more = load_file(tmp_path / "run" / "last" / "more.safetensors")
        assert more["perturbations"].flatten(1).any(1).sum() >= 288  # two batches: both processes' images
        saved |= more
    assert_same_weights({name: tensor.contiguous() for name, tensor in ranks[0].items()}, saved)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["devices"] == 2
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-5) for layer in line["layers"])


def test_diverging_loss_stops_with_step_term_and_loads_and_keeps_the_last_checkpoint(finished, tmp_path, monkeypatch):
    from advmoe.training import trainer

    real, calls = trainer.robust, []

    def poisoned(*args, **kwargs):
        terms, *rest = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 6:  # two iterations of two levels an epoch: in the second epoch
            terms["kl"] = terms["kl"] * float("nan")
        return terms, *rest

    monkeypatch.setattr(trainer, "robust", poisoned)
    with pytest.raises(TrainingDiverged, match=r"step \d+ \(epoch 2, experts\).*kl=nan.*loads per layer: \[\["):
        train(tiny(), run_dir=tmp_path / "run", **THREADS)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is None
    resume(tmp_path / "run")
    assert_same_weights(weights(tmp_path / "run"), weights(finished))


@pytest.mark.parametrize(
    "groups",
    [
        {"training": {"method": "standard"}},
        {"model": {"kind": "s-dense"}, "training": {"method": "at"}},
        {"model": {"kind": "dense"}, "training": {"method": "at", "precision": "bf16-mixed"}},
        {"model": {"router": "image"}, "training": {"router_objective": "codes", "codes": "mod"}},
        {
            "model": {"router": "embedding", "experts": "independent"},
            "training": {"router_objective": "codes", "codes": "random", "attack_routing": "soft"},
        },
        {"training": {"router_objective": "codes", "codes": "random", "precision": "bf16-mixed"}},
        {"threat": {"norm": "l2", "eps": 0.5}, "data": {"val_fraction": 0.0}},
    ],
    ids=lambda groups: "-".join(str(v) for fields in groups.values() for v in fields.values()),
)
def test_every_method_router_objective_and_precision_trains(groups, tmp_path):
    groups["training"] = {**groups.get("training", {}), "epochs": 1}
    run = train(tiny(**groups), run_dir=tmp_path / "run", **THREADS)
    line = json.loads((run / "metrics.jsonl").read_text())
    codes = groups["training"].get("router_objective") == "codes"
    assert ("codes" in line["train"].get("routers", {})) == codes
    assert (line["val"] is None) == (groups.get("data", {}).get("val_fraction") == 0.0)
    in_fp32 = groups["training"].get("precision", "32-true") == "32-true"  # as every accuracy that is reported
    assert line["train"] and all(("accuracy" in level) == in_fp32 for level in line["train"].values())
    for name, tensor in load_file(run / "model.safetensors").items():
        assert tensor.dtype in (torch.float32, torch.int64) and torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("statistics", ["keep", "refresh"])
def test_router_then_expert_training_moves_one_half_each(tmp_path, statistics):
    standard = train(tiny(training={"method": "standard", "epochs": 1}), run_dir=tmp_path / "standard", **THREADS)
    settings = {"method": "at-routers", "init_from": str(standard), "epochs": 1, "frozen_norms": statistics}
    routers = train(tiny(training=settings), run_dir=tmp_path / "routers", **THREADS)
    settings = {"method": "at-experts", "init_from": str(routers), "epochs": 1, "frozen_norms": statistics}
    experts = train(tiny(training=settings), run_dir=tmp_path / "experts", **THREADS)
    trained = weights(experts)
    shutil.move(routers, tmp_path / "elsewhere")  # a run that has a checkpoint needs no more what it started from
    assert_same_weights(weights(resume(experts)), trained)
    shutil.rmtree(experts / "last")
    with pytest.raises(ValueError, match="routers"):
        resume(experts)
    routers = tmp_path / "elsewhere"
    before, middle, after = (load_file(run / "model.safetensors") for run in (standard, routers, experts))
    for name in before:
        phi, fresh = ".router." in name, statistics == "refresh" and ".running_" in name
        assert torch.equal(before[name], middle[name]) != (phi or fresh), name
        assert torch.equal(middle[name], after[name]) == ((phi and not fresh) or name.startswith("normalize")), name


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "told"), [("dispatch", "pieces"), ("masked", "whole passes")])
def test_compiled_training_ends_close_to_uncompiled(tmp_path, compute, told):
    training = {"method": "standard", "epochs": 1, "lr": 0.01, "compute": compute}
    groups = {"data": {"val_fraction": 0.0}, "training": training}
    plain, compiled = (
        train(
            tiny(**{**groups, "training": {**groups["training"], "compile": wanted}}),
            run_dir=tmp_path / str(wanted),
            **THREADS,
        )
        for wanted in (False, True)
    )
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (plain, compiled)]
    assert [manifest["compute"] for manifest in manifests] == [compute, compute]
    assert [manifest.get("compiled") for manifest in manifests] == [None, told]
    a, b = weights(plain), weights(compiled)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)

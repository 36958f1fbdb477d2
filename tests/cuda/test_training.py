"""Training on a CUDA device: every method and setting, beside the CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from advmoe.training.run import resume, train

SETTINGS = {
    "advmoe": {},
    "dispatch": {"training": {"compute": "dispatch"}},
    "every-2": {"training": {"alternation": "every-2"}},
    "warm-start": {"training": {"alternation": "warm-start"}},
    "codes": {"training": {"router_objective": "codes"}, "model": {"router": "image"}},
    "mixed": {"training": {"attack_routing": "mixed"}, "model": {"router": "embedding"}},
    "soft": {"training": {"attack_routing": "soft"}},
    "ema, awp, balance, margin": {"training": {"ema": 0.9, "awp": 0.005, "balance": 0.1, "margin": 0.1}},
    "at": {"training": {"method": "at"}},
    "at, dense": {"training": {"method": "at"}, "model": {"kind": "dense"}},
    "at, s-dense": {"training": {"method": "at"}, "model": {"kind": "s-dense"}},
    "standard": {"training": {"method": "standard"}},
    "sparse": {"training": {"method": "sparse", "prune_epochs": 1, "finetune_epochs": 1}, "model": {"kind": "sparse"}},
    "four experts at 0.8": {"model": {"num_experts": 4, "scale": 0.8, "experts_init": "independent"}},
    "bf16": {"training": {"precision": "bf16-mixed"}},
    "deterministic": {"training": {"deterministic": True}},
    "l2": {"threat": {"norm": "l2", "eps": 0.5}, "training": {"step_size": 0.25}},
    "resnet50": {"model": {"name": "resnet50"}},
    "wrn": {"model": {"name": "wrn-10-2"}},
    "vgg": {"model": {"name": "vgg16"}, "data": {"image_size": 16}},
    "densenet": {"model": {"name": "densenet40"}},
    "vit": {"model": {"name": "deit-tiny", "width": 24}},
    "tokens": {"model": {"name": "deit-tiny", "width": 24, "route_per": "token"}},
}

OTHER_ARITHMETIC = {"bf16", "dispatch", "vit", "tokens", "densenet", "four experts at 0.8"}
"""Where CPUs compute otherwise, and routing amplifies what differs: autocast has lists of its own for CUDA, CPUs do
attention in one kernel, compute few filters for all experts at once, and add up in an order that depends on the layout.
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_those_of_the_cpu(name, tmp_path, make_config, exact):
    config = make_config(**SETTINGS[name])
    runs = {place: train(config, run_dir=tmp_path / place, accelerator=place, threads=1) for place in ("cpu", "cuda")}
    ours, theirs = (load_file(path / "last" / "model.safetensors") for path in runs.values())
    assert ours.keys() == theirs.keys()
    assert all(torch.isfinite(tensor).all() for tensor in theirs.values() if tensor.is_floating_point())
    if exact and name not in OTHER_ARITHMETIC:
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["train"] for run in runs.values()]
    for part, terms in losses[0].items():
        assert losses[1][part]["ce"] == pytest.approx(terms["ce"], rel=0.1)
    manifest = json.loads((runs["cuda"] / "manifest.json").read_text())
    assert manifest["device"] == torch.cuda.get_device_name(0)
    assert manifest["gpu"]["deterministic"] == config.training.deterministic


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_elsewhere(first, then, tmp_path, make_config, exact, capsys):
    whole = train(make_config(training={"epochs": 2}), run_dir=tmp_path / "whole", accelerator=first, threads=1)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "last")  # as if stopped within the last of the epochs
    resume(cut, accelerator=then, threads=1)
    assert "the weights need not be those" in capsys.readouterr().out
    ours, theirs = (load_file(path / "last" / "model.safetensors") for path in (whole, cut))
    assert ours.keys() == theirs.keys()
    if exact:
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

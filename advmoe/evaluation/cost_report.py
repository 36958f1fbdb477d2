"""What a run, or a backbone by name, costs beside the Dense and the S-Dense form of the same backbone.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `E` experts, `T` tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.config import ModelKind
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import Execution, placed, positive
from advmoe.evaluation.cost import activation_bytes, gmacs, in_turn, parameters, setting, timing
from advmoe.evaluation.dissection import expert_load
from advmoe.evaluation.images import input_shape, random_images, run_images
from advmoe.evaluation.subject import Options, options_of
from advmoe.models import Classifier, create_model, find_backbone
from advmoe.models.runs import load_run
from advmoe.models.sources import load_module
from advmoe.moe import moe_layers, pathway
from advmoe.pool import threads_set
from advmoe.pruning import deployed
from advmoe.rundir import DIGEST, MODEL
from advmoe.tables import BACKBONES
from advmoe.text import aligned, macs_unit, percent, tabular, wrapped

BATCHES = (1, 32, 128)
"""Batch sizes measured unless others are asked for."""

_FITTED = 64
"""Images that a new model's batch norms are fitted to."""


@dataclass(frozen=True)
class CostSubject:
    """The models whose cost is measured, and the images that measure it."""

    name: str
    models: dict[str, Classifier]
    """By kind (`moe`, `sparse`, `s-dense`, `dense`), the one asked for first; a sparse one is compacted."""
    weights: str
    """Where those of the first come from."""
    images: Tensor
    """Pixels (N, C, H, W) in [0, 1], as many as the largest batch takes."""
    which: str
    """What the images are, and why if not the run's own."""


def cost_report(
    target: str | Path,
    options: Options | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    seconds: float = 10.0,
    device: str | None = None,
    model: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """GMACs, parameters, activation memory and time of a run's model, or of a new MoE model of a backbone, beside the
    Dense and S-Dense forms of its backbone: all in this process, timed in turn, fp32, eval mode, channels-last.

    Args:
        target: a run directory, or a backbone's name. A run is measured with its weights on its own test images, a
            random sample, where they can be read; a name with new weights, whose batch norms are fitted to random
            images first. Where the images are not the run's the result says so; in both cases it holds the experts'
            loads, on which an MoE's time depends.
        options, keywords: see `Options`, of which `source`, `overrides`, `accelerator` (usually `cpu`) and `threads`
            count. `source` and `overrides` are of a run: a network of the user's own has no S-Dense form, and as its
            Dense form itself before it was converted.
        batches: batch sizes. seconds: of timing for each batch size (see `cost.in_turn`).
        device: another word for `accelerator`.
        model: of a name, arguments of `create_model`: `input_size` (32), `num_classes` (10), `width`, `router`, ...

    Raises `ValueError` for whatever cannot be used; an unknown target's says what is known.
    """
    if device is not None:
        keywords["accelerator"] = device
    options = options_of(options, keywords, accelerator="cpu")
    for batch in batches:
        positive("batch", batch)
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be cpu where no CUDA device is present, got 'cuda'")
    if not 0 <= seconds < math.inf:
        raise InputError(f"seconds must be >= 0 and finite, got {seconds!r}")
    number = max(batches)
    with threads_set(options.threads):
        if (Path(target) / MODEL).is_file():
            if model:
                raise InputError(f"{', '.join(model)} must be left out for a run, which has its model, got {target!s}")
            subject = _run(target, number, options)
        elif options.overrides or options.source is not None:
            raise InputError(f"data and --model must be left out for a backbone (random images), got {target!s}")
        else:
            subject = _backbone(str(target), number, model or {})
        return _report(subject, batches, Execution(accelerator=options.accelerator).devices()[0], seconds)


# What is measured


def _run(target: str | Path, number: int, options: Options) -> CostSubject:
    source = options.source
    own = load_run(target, source)
    input_shape(own)  # the ways to time it need one
    models = _with_references(own)
    models[own.spec["kind"]] = deployed(own)
    if source is not None and "layers" in own.spec:  # converted
        models["dense"] = Classifier(own.normalize, load_module(source), None, own.spec | {"kind": "dense"}).eval()
    images, which = run_images(target, own, number, source=source, overrides=options.overrides)
    repeated = images.repeat(-(-number // len(images)), 1, 1, 1)[:number]
    return CostSubject(str(target), models, "the run's", repeated, which)


def _backbone(name: str, number: int, model: Mapping[str, Any]) -> CostSubject:
    try:
        find_backbone(name)
    except ValueError:
        if name.startswith("wrn-"):  # a Wide ResNet that cannot be, which that error explains
            raise
        rule = f"a run directory (one that holds a model.json) or a backbone, one of {BACKBONES.known()}"
        raise InputError(f"RUN_OR_NAME must be {rule}, got {name!r}{BACKBONES.near(name)}") from None
    settings = {"num_classes": 10, "input_size": 32, **model}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moe = create_model(name, kind="moe", **settings)
    images = random_images(input_shape(moe), max(number, _FITTED))
    fit_norms(moe, images[:_FITTED])
    weights = "new, batch norms fitted to the images, routers untrained"
    return CostSubject(name, _with_references(moe), weights, images[:number], "random images")


@torch.no_grad()
def fit_norms(model: nn.Module, images: Tensor, passes: int = 2) -> None:
    """Make the batch norms' statistics those of `images` (N, C, H, W), and leave the model in eval mode.

    With the statistics that they start with, routers would send every image the same way.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    model.train()
    for part in passes * images.split(32):
        model(part.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _with_references(own: Classifier) -> dict[str, Classifier]:
    """`own` and its backbone's S-Dense and Dense forms, with new weights: what these cost does not depend on them."""
    spec = own.spec
    models = {str(spec["kind"]): own}
    if "source" in spec:  # no backbone of ours
        return models
    kinds: tuple[ModelKind, ...] = ("s-dense", "dense")
    with torch.random.fork_rng(devices=[]):
        for kind in kinds:
            if kind not in models:
                models[kind] = create_model(**{**spec, "kind": kind, "route_per": "image"}).eval()
    return models


# Measuring


def _report(subject: CostSubject, batches: Sequence[int], device: torch.device, seconds: float) -> dict[str, Any]:
    models = {kind: _on(model, device) for kind, model in subject.models.items()}
    kind, own = next(iter(models.items()))
    images = subject.images.to(device).contiguous(memory_format=torch.channels_last)
    pathways = torch.cat([pathway(own, part) for part in images.split(128)])
    spec = {name: value for name, value in own.spec.items() if name not in ("mean", "std")} | {"kind": kind}
    return {
        "target": subject.name,
        "model": spec,
        "weights": subject.weights,
        DIGEST: None if own.origin is None else own.origin.digest,
        "images": subject.which,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **setting(device),
        "torch": torch.__version__,
        "precision": "fp32, channels-last, eval mode",
        "activations": "peak bytes of live tensors" if device.type == "cpu" else "peak of the CUDA allocator",
        "models": {kind: _counts(model) for kind, model in models.items()},
        "batches": [_timed(models, images[:batch], seconds) | _loads(own, pathways[:batch]) for batch in batches],
    }


def _on(model: Classifier, device: torch.device) -> Classifier:
    moved = placed(model, device)
    assert isinstance(moved, Classifier)
    return moved.eval()


def _counts(model: Classifier) -> dict[str, Any]:
    stored, active = parameters(model)
    return {"gmacs": round(gmacs(model), 6), "parameters": stored, "active_parameters": active}


def _timed(models: Mapping[str, Classifier], x: Tensor, seconds: float) -> dict[str, Any]:
    """One batch: medians and ranges of milliseconds per image, their ratios, and peak bytes of activations."""
    x = x.contiguous(memory_format=torch.channels_last)
    with timing(*models.values()):
        times = in_turn(models, x, seconds=seconds)
    medians = {kind: statistics.median(laps) for kind, laps in times.items()}
    return {
        "batch": len(x),
        "repeats": len(next(iter(times.values()))),
        "ms_per_image": {kind: round(value, 5) for kind, value in medians.items()},
        "range_ms_per_image": {kind: [round(min(laps), 5), round(max(laps), 5)] for kind, laps in times.items()},
        "ratio_to": {
            kind: {name: round(value / medians[kind], 4) for name, value in medians.items() if name != kind}
            for kind in ("s-dense", "dense")
            if kind in medians
        },
        "activation_bytes": {kind: activation_bytes(model, x) for kind, model in models.items()},
    }


def _loads(model: Classifier, pathways: Tensor) -> dict[str, Any]:
    """The share of images, or tokens, that each expert gets, per MoE layer. `pathways`: (N, L) or (N, L, T)."""
    if pathways.shape[1] == 0:
        return {}
    loads = expert_load(pathways, max(layer.num_experts for layer in moe_layers(model)))
    busiest = statistics.mean(max(shares) for shares in loads)
    return {"loads": [[round(share, 4) for share in shares] for shares in loads], "busiest": round(busiest, 4)}


# Showing


def table(report: Mapping[str, Any]) -> str:
    """A report as aligned lines."""
    spec, batches = report["model"], report["batches"]
    named = {"num_experts": "experts", "scale": "scale", "router": "router", "width": "width"}
    known = [f"{label} {spec[field]}" for field, label in named.items() if spec.get(field) is not None]
    kernels = "" if report["kernels"] is None else f", kernels: {report['kernels']}"
    about = (
        f"{spec['name']} ({spec['kind']}): {', '.join(known)}; images of {spec['input_size']} pixels a side",
        f"weights: {report['weights']}; images: {report['images']}",
        f"{report['device']}, {report['threads']} threads, {report['precision']}, PyTorch {report['torch']}{kernels}",
    )
    models = report["models"]
    unit, factor = macs_unit(each["gmacs"] for each in models.values())
    counts = [
        [kind, f"{each['gmacs'] * factor:.4g}", f"{each['parameters']:,}", f"{each['active_parameters']:,}"]
        for kind, each in models.items()
    ]
    lines = [each for line in about for each in wrapped(line, "  ")]
    lines += ["", *aligned([["", unit, "parameters", "active"], *counts], ">"), ""]
    head = ["batch", "", "ms/image", "x S-Dense", "x Dense", "activations", "busiest expert"]
    rows = [_row(entry, kind) for entry in batches for kind in entry["ms_per_image"]]
    lines += tabular(head, rows, ">", labels=2)
    if any("busiest" in entry for entry in batches):
        note = "busiest expert: its share of the batch, mean over layers; with 100 % nothing is dispatched"
        lines += ["", *wrapped(note, "  ")]
    return "\n".join(lines)


def _row(entry: Mapping[str, Any], kind: str) -> list[str]:
    ratios = [entry["ratio_to"].get(reference, {}).get(kind) for reference in ("s-dense", "dense")]
    return [
        str(entry["batch"]),
        kind,
        f"{entry['ms_per_image'][kind]:.4g}",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        f"{entry['activation_bytes'][kind] / 2**20:.2f} MiB",
        f"{percent(entry['busiest'], 0)} %" if kind == "moe" and "busiest" in entry else "",
    ]

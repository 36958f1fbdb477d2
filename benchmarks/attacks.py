"""How much time the attacks add to the model's own, and to the official AutoAttack: one JSON line a result.

    python benchmarks/attacks.py --threads 2 --out benchmarks/results/attacks.jsonl
    python benchmarks/attacks.py --only autoattack --run runs/advmoe --root data/cifar10-jpeg --num-examples 200
    python benchmarks/attacks.py --only workers --run runs/advmoe --root data/cifar10-jpeg --num-examples 1000

`pgd`         PGD-50 on routed ResNet-18 and on S-Dense, against 50 bare forward and backward passes of the same model
`autoattack`  the standard version through the library on the model of `--run`, against the official code on the same
              weights computing every expert and masking, in NCHW; needs the extra autoattack
`workers`     an evaluation by PGD-50 of the model of `--run`, by two processes against one, each of one thread; their
              start is part of it

Lines, timing and models are those of `speed.py`. `autoattack` takes long and times each side once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import (
    EveryExpert,
    Line,
    Setting,
    Side,
    interleaved,
    loads,
    log,
    make_config,
    pixels_of,
    random_dataset,
    result,
    settled,
    write,
)
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks.autoattack import autoattack
from advmoe.attacks.pgd import pgd
from advmoe.config import AttackConfig, ModelKind
from advmoe.data import load_dataset
from advmoe.evaluation.accuracy import Execution, assess
from advmoe.evaluation.outcomes import Measurement
from advmoe.evaluation.scoring import measuring
from advmoe.models import Classifier
from advmoe.models.runs import load_run
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel
from advmoe.training.trainer import build_model

THREAT = ThreatModel("linf", 8 / 255)


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What is measured at which size, and on which model and images AutoAttack is."""

    repeats: int = 3
    steps: int = 50
    run: Path | None = None
    root: Path = Path("data/cifar10-jpeg")
    num_examples: int = 200


# PGD


def measure_pgd(options: Options) -> Iterator[Line]:
    """What PGD takes beyond the passes that it needs."""
    dataset = random_dataset(options, batches=1)
    x, y = pixels_of(dataset.train.images, options.device), dataset.train.labels.to(options.device)
    kinds: dict[str, ModelKind] = {"moe": "moe", "s-dense": "s-dense"}
    for name, kind in kinds.items():
        model = settled(build_model(make_config(options, kind), dataset), x, options.settle).eval()
        with measuring(model, x.device):
            laps = interleaved({"pgd": _pgd(model, x, y, options), "bare": _bare(model, x, y, options)}, options)
            x_adv = pgd(model, x, y, threat=THREAT, steps=options.steps)
            shares = {"eval": loads(model, x), "attacked": loads(model, x_adv)} if model.routed else {}
        line = result(
            f"pgd-{name}",
            f"PGD-{options.steps} on a batch, against {options.steps} bare passes over it (forward, and backward to "
            "the pixels alone); parameters frozen, eval mode, fp32 on both sides",
            laps,
            {"bare/pgd": ("bare", "pgd")},
            options,
            at_least={"bare/pgd": 0.85},
            changed={"attack_steps": options.steps} | ({} if model.routed else {"model": "resnet18, scale 0.5"}),
            loads=shares,
        )
        yield line | {"images_per_second": images_per_second(line, options.batch)}


def _pgd(model: Classifier, x: Tensor, y: Tensor, options: Options) -> Side:
    generator = generator_for(0, "pgd", device=options.device)

    def side() -> None:
        pgd(model, x, y, threat=THREAT, steps=options.steps, generator=generator)

    return side


def _bare(model: Classifier, x: Tensor, y: Tensor, options: Options) -> Side:
    def side() -> None:
        for _ in range(options.steps):
            inputs = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(inputs), y, reduction="sum"), inputs)

    return side


def images_per_second(line: Line, images: int) -> dict[str, float]:
    """Images attacked in a second, by side."""
    return {side: round(1000 * images / median, 3) for side, median in line["medians_ms"].items()}


# AutoAttack


def measure_autoattack(options: Options) -> Iterator[Line]:
    """AutoAttack as this library runs it, against the official code on the plain form of the model."""
    assert options.run is not None
    ours = load_run(options.run).to(options.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not ours.routed:
        raise ValueError(f"--run must hold a routed model, got model.kind {ours.spec['kind']!r}")
    x, y = chosen_images(ours, options)
    part = copy.deepcopy(ours)
    plain = EveryExpert(part.normalize, part.backbone, part.router, part.spec).eval()
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    proposals: dict[str, Tensor] = {}
    flags: list[str] = []

    def adapted() -> None:
        found = autoattack(ours, x, y, threat=THREAT, seed=0)
        proposals["ours"] = found.x_adv
        flags[:] = found.flags

    def official() -> None:
        from pyautoattack import AutoAttack

        attack = AutoAttack(plain, norm="Linf", eps=THREAT.eps, seed=0, version="standard", device=x.device)
        proposals["plain"], _ = attack.run_standard_evaluation(x, y, batch_size=len(x))

    shared: dict[str, Any] = {}

    def shares() -> None:
        measurement = Measurement(
            threat=THREAT, attack=AttackConfig(), attacks=["autoattack"], batch_size=-(-len(x) // 2)
        )
        execution = Execution(workers=2, threads=1, accelerator=options.device)
        evaluation = assess(partial(_on_device, options.run), (x, y), measurement, execution=execution)
        shared.update(evaluation.result["robust_accuracy"])

    for model in (ours, plain):
        accuracy(model, x, y)  # what a first pass sets up is not timed
    sides: dict[str, Side] = {
        "ours": measured(ours, adapted), "plain": measured(plain, official), "ours, two processes": shares,
    }  # fmt: skip
    options = replace(
        options, repeats=1, batch=len(x), width=ours.spec["width"], image_size=ours.spec["input_size"],
    )  # fmt: skip
    laps = interleaved(sides, options, warm_up=0)
    robust = {side: accuracy(model, proposals[side], y) for side, model in {"ours": ours, "plain": plain}.items()}
    robust["ours, two processes"] = shared["autoattack"]
    spec = ours.spec
    line = result(
        "autoattack",
        "AutoAttack, standard version, one batch, one run a side: the official code called directly on the plain form "
        "of the model (every expert computed and masked, NCHW) over the library on the same weights (sparse dispatch, "
        "channels-last); parameters frozen, eval mode, fp32 on both sides. `two processes`: the same images as an "
        "evaluation takes them, half to each of two processes of one thread, its checks and their start included",
        laps,
        {"plain/ours": ("plain", "ours"), "plain/ours, two processes": ("plain", "ours, two processes")},
        options,
        at_least={"plain/ours, two processes": 2.0},
        changed={
            "model": f"{spec['name']}, scale {spec['scale']}, {spec['num_experts']} experts, {spec['router']} router",
            "memory_format": {"ours": "channels_last", "plain": "contiguous"},
            "threat": {"norm": THREAT.norm, "eps": round(THREAT.eps, 6)},
            "data": "test images of a folder, chosen by seed 0",
        },
        loads={"eval": loads(ours, x)},
        clean_accuracy=accuracy(ours, x, y),
        robust_accuracy=robust,
        same_robust_accuracy=len({round(share * len(x)) for share in robust.values()}) == 1,
        flags=flags,
    )
    yield line | {"images_per_second": images_per_second(line, len(x))}


def chosen_images(model: Classifier, options: Options) -> tuple[Tensor, Tensor]:
    """`options.num_examples` test images as pixels, NCHW, with their classes: the subset that an evaluation takes."""
    dataset = load_dataset("folder", root=options.root, image_size=model.spec["input_size"])
    if dataset.num_classes != model.spec["num_classes"]:
        raise ValueError(f"--root must hold {model.spec['num_classes']} classes, got {dataset.num_classes}")
    chosen = torch.randperm(len(dataset.test), generator=generator_for(0, "examples"))[: options.num_examples]
    chosen = chosen.sort().values
    return dataset.test.pixels(chosen).to(options.device), dataset.test.labels[chosen].to(options.device)


def measured(model: Classifier, side: Side) -> Side:
    """`side` under `measuring`, one at a time: the plain model changes the mode of the routing it runs under."""

    def run() -> None:
        with measuring(model, next(model.parameters()).device):
            side()

    return run


@torch.no_grad()
def accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    """The fraction of `x` (N, C, H, W) that `model` gives the class in `y`."""
    with measuring(model, x.device):
        return (model(x).argmax(1) == y).float().mean().item()


# Processes


def measure_workers(options: Options) -> Iterator[Line]:
    """What a second process is worth, from the call of an evaluation to its numbers."""
    assert options.run is not None
    model = load_run(options.run)
    x, y = chosen_images(model, options)
    load = partial(_on_device, options.run)
    attack = AttackConfig(steps=options.steps)
    measurement = Measurement(threat=THREAT, attack=attack, attacks=[f"pgd-{options.steps}"], batch_size=125)
    found: dict[int, float] = {}

    def by(workers: int) -> Side:
        def side() -> None:
            execution = Execution(workers=workers, threads=1, accelerator=options.device)
            evaluation = assess(load, (x, y), measurement, execution=execution)
            found[workers] = evaluation.result["worst_case"]

        return side

    options = replace(options, batch=125, width=model.spec["width"], image_size=model.spec["input_size"], threads=1)
    laps = interleaved({"1 worker": by(1), "2 workers": by(2)}, options, warm_up=0)
    line = result(
        "workers",
        f"an evaluation (checks, clean pass, PGD-{options.steps}) of {len(x)} images in batches of 125, by two "
        "processes started for it over one process; one thread each, fp32",
        laps,
        {"1 worker/2 workers": ("1 worker", "2 workers")},
        options,
        at_least={"1 worker/2 workers": 1.7},
        changed={"model": f"{model.spec['name']}, {model.spec['kind']}", "images": len(x)},
        robust_accuracy=found,
    )
    yield line | {"images_per_second": images_per_second(line, len(x))}


def _on_device(run: Path, device: torch.device) -> Classifier:
    return load_run(run).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


RESULTS = {"pgd": measure_pgd, "autoattack": measure_autoattack, "workers": measure_workers}
"""Results by the name that `--only` takes."""


def main() -> None:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("threads", "width", "batch", "image-size", "repeats", "settle", "steps", "num-examples"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name.replace("-", "_")))
    parser.add_argument("--run", type=Path, help="run directory whose model `autoattack` attacks")
    parser.add_argument("--root", type=Path, default=defaults.root, help="image folder with ten classes")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="pgd", help="results, separated by commas")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    given = vars(parser.parse_args())
    names, out = given.pop("only").split(","), given.pop("out")
    options = Options(device=given.pop("accelerator"), **given)
    if unknown := sorted(set(names) - set(RESULTS)):
        parser.error(f"--only must name some of {', '.join(RESULTS)}, got {', '.join(unknown)}")
    if options.run is None and (needing := [name for name in names if name != "pgd"]):
        parser.error(f"--run must name a run directory for {needing[0]}, got None")
    torch.set_num_threads(options.threads)
    for name in names:
        log(f"{name}: {options.device}, {options.threads} threads")
        try:
            for line in RESULTS[name](options):
                write(line, out)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()

"""How fast the library is against what it replaces: one JSON line a result.

    python benchmarks/speed.py --threads 2 --out benchmarks/results/speed.jsonl

Every result times its sides in turn (A B A B ...) in this process, after a warm-up, and reports their medians.

`forward`  inference of MoE-CNN ResNet-18 with layer routers, against S-Dense and Dense, for a batch and for one image
`step`     one AdvMoE training step against one AT (S-Dense) step, and what each part of it takes
`plain`    the same AdvMoE step, against one that computes every expert and masks, in NCHW and fp32

Routing is never degenerate: each router's last bias is shifted until every expert gets an equal share of the images,
since a batch with one pathway needs no dispatch and would flatter the MoE. Routers run and decide as always; the lines
hold the loads.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.config import Config, ModelConfig, ModelKind, Precision, TrainingConfig
from advmoe.data import Dataset, ImageSet
from advmoe.evaluation.scoring import measuring
from advmoe.models import Classifier
from advmoe.models.modes import frozen
from advmoe.moe import pathway
from advmoe.moe.routers import LayerRouter, routers_of
from advmoe.moe.routing import forward_scope
from advmoe.ops import kernels_used
from advmoe.seeding import generator_for
from advmoe.tables import METHODS
from advmoe.training import manifest as manifests
from advmoe.training.monitor import LayerUse
from advmoe.training.trainer import Trainer, build_model

Line = dict[str, Any]
"""One result, as it is printed."""
Laps = dict[str, list[float]]
"""Milliseconds of every repeat, by side."""
Side = Callable[[], Mapping[str, float] | None]
"""What is timed; it may return milliseconds of its own parts."""

LEARNING_RATE = 1e-3
"""Small, so that steps on random labels leave the routers' loads where they were set. Time does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured at which size."""

    width: int = 64
    batch: int = 128
    image_size: int = 32
    threads: int = 2
    repeats: int = 7
    settle: int = 30
    """Train-mode passes that fit the batch-norm statistics before anything is timed."""
    precision: Precision = "32-true"
    """Of both sides of `step`."""
    device: str = "cpu"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Inputs and models


def random_images(count: int, size: int, *, seed: int) -> Tensor:
    """Images (N, 3, size, size), uint8, that differ as photographs do (colour, contrast, coarse shapes), and noise."""
    generator = generator_for(seed, "images")
    coarse = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=(size, size), mode="bilinear")
    level, contrast = torch.rand(2, count, 3, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    images: Tensor = 255 * (level + contrast * (coarse - 0.5) + noise).clamp(0, 1)
    return images.to(torch.uint8)


def random_dataset(setting: Setting, batches: int = 4) -> Dataset:
    """`batches` batches of random images with random labels, in place of CIFAR-10."""
    images = random_images(batches * setting.batch, setting.image_size, seed=0)
    labels = torch.randint(10, (len(images),), generator=generator_for(0, "labels"))
    empty = ImageSet(images[:0], labels[:0])
    pixels = images.float().div(255).transpose(0, 1).flatten(1)
    statistics_of = {"mean": tuple(pixels.mean(1).tolist()), "std": tuple(pixels.std(1).tolist())}
    classes = tuple(map(str, range(10)))
    return Dataset("random", ImageSet(images, labels), empty, empty, classes, flip=True, **statistics_of)


def make_config(setting: Setting, kind: ModelKind, method: str = "at", precision: Precision = "32-true") -> Config:
    """The paper's setting: r = 0.5, N = 2, layer routers, TRADES with K = 2 steps, both levels in every iteration;
    `setting`'s sizes.
    """
    training = TrainingConfig(
        method=method, alternation="both", batch_size=setting.batch, lr=LEARNING_RATE, precision=precision
    )
    return Config(model=ModelConfig(kind=kind, width=setting.width), training=training)


def pixels_of(images: Tensor, device: str) -> Tensor:
    """Pixels in [0, 1], channels-last on `device`, of uint8 images (N, C, H, W)."""
    return images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def settled(model: Classifier, x: Tensor, passes: int) -> Classifier:
    """`model`, on the device of `x` (N, C, H, W), with batch-norm statistics that fit `x` and experts that share it."""
    model = model.to(x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    for each in range(passes):
        part = x.roll(-each * 32, 0)[:32]
        model(part.contiguous(memory_format=torch.channels_last))

    def balance(module: nn.Module, _: Any, scores: Tensor) -> Tensor:
        # With two experts: half of the samples lie on either side of the median of the scores' difference, none on it.
        middle = (scores - scores[:, :1]).quantile(0.5, dim=0)
        cast(LayerRouter, module).scores.bias.sub_(middle)
        return scores - middle

    hooks = [r.register_forward_hook(balance) for r in routers_of(model) if isinstance(r, LayerRouter)]
    model.eval()
    model(x)
    for hook in hooks:
        hook.remove()
    return model


def loads(model: Classifier, x: Tensor) -> list[list[float]]:
    """The share of the images `x` that each expert gets in eval mode, per MoE layer."""
    chosen = pathway(model, x)
    experts = range(model.spec["num_experts"])
    return [[round((layer == e).float().mean().item(), 3) for e in experts] for layer in chosen.T]


class EveryExpert(Classifier):
    """A `Classifier` that computes every expert and keeps the chosen one: the plain way to run an MoE."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), equal to those of the model that dispatches."""
        with forward_scope() as routing:
            routing.mode = "masked"
            return super().forward(x)


# Timing


def now(device: str) -> float:
    """Seconds on the host's clock, once everything asked of `device` is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(sides: Mapping[str, Side], setting: Setting, warm_up: int | None = None) -> Laps:
    """Time the sides in turn, `setting.repeats` times, after unrecorded rounds; parts are kept as `side: part`."""
    if warm_up is None:
        # CUDA libraries choose algorithms anew for every group size that the dispatch makes.
        warm_up = 8 if setting.device.startswith("cuda") else 1
    laps: Laps = {}
    for attempt in range(warm_up + setting.repeats):
        for name, side in sides.items():
            start = now(setting.device)
            parts = side()
            taken = {name: 1000 * (now(setting.device) - start)}
            taken |= {f"{name}: {part}": value for part, value in (parts or {}).items()}
            if attempt >= warm_up:
                for key, value in taken.items():
                    laps.setdefault(key, []).append(value)
    return laps


def result(
    name: str,
    what: str,
    laps: Laps,
    ratios: Mapping[str, tuple[str, str]],
    setting: Setting,
    *,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    changed: Mapping[str, Any] | None = None,
    **more: Any,
) -> Line:
    """The line of one result.

    `ratios` names quotients of two sides' medians, `at_most` and `at_least` are their targets; `changed` holds what
    differs from `setting` or adds to it.
    """
    medians = {side: round(statistics.median(values), 4) for side, values in laps.items()}
    quotients = {ratio: medians[top] / medians[bottom] for ratio, (top, bottom) in ratios.items()}
    targets = [
        {"ratio": ratio, rule: bound, "met": met(quotients[ratio], bound)}
        for rule, bounds, met in (("at_most", at_most, operator.le), ("at_least", at_least, operator.ge))
        for ratio, bound in (bounds or {}).items()
    ]
    described = manifests.describe(name=name, seed=0, device=torch.device(setting.device), devices=1, command=sys.argv)
    return {
        "name": name,
        "what": what,
        "ratios": {ratio: round(value, 4) for ratio, value in quotients.items()},
        "targets": targets,
        "medians_ms": medians,
        "range_ms": {side: [round(min(values), 4), round(max(values), 4)] for side, values in laps.items()},
        "setting": {
            "model": "resnet18, scale 0.5, 2 experts, layer routers",
            "width": setting.width,
            "batch": setting.batch,
            "image_size": setting.image_size,
            "threads": setting.threads,
            "repeats": setting.repeats,
            "precision": setting.precision,
            "memory_format": "channels_last",
            **(changed or {}),
        },
        **more,
        "hardware": hardware(setting.device) | {"cpu": described["cpu"], "device": described["device"]},
        "versions": {package: described["versions"][package] for package in ("torch", "python", "advmoe")},
        "git_commit": described["git_commit"],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware(device: str) -> dict[str, Any]:
    """What decides how the numbers of `device` are read: bf16 units, TF32, and what else the machine was doing."""
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.startswith("cuda"):
        return found | {
            "bf16_units": torch.cuda.is_bf16_supported(including_emulation=False),
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return found
    units = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    return found | {"bf16_units": bool(units), "bf16_flags": units, "kernels": kernels_used()}


# Results


def forward(setting: Setting) -> Iterator[Line]:
    """Inference, in a batch and for one image."""
    setting = replace(setting, precision="32-true")
    dataset = random_dataset(setting, batches=1)
    x = pixels_of(dataset.train.images, setting.device)
    kinds: dict[str, ModelKind] = {"moe": "moe", "s-dense": "s-dense", "dense": "dense"}
    models = {
        name: settled(build_model(make_config(setting, kind), dataset), x, setting.settle).eval()
        for name, kind in kinds.items()
    }
    ratios = {"moe/s-dense": ("moe", "s-dense"), "dense/moe": ("dense", "moe")}
    for batch in dict.fromkeys((setting.batch, 1)):
        inputs = x[:batch].contiguous(memory_format=torch.channels_last)
        repeats = setting.repeats if batch > 1 else 10 * setting.repeats  # single passes are short and vary more
        with torch.no_grad():
            sides = {name: _predict(model, inputs) for name, model in models.items()}
            laps = interleaved(sides, replace(setting, batch=batch, repeats=repeats), warm_up=3)
        yield result(
            f"forward-batch-{batch}",
            "one forward pass in eval mode without gradients; the routers' own choices, "
            + ("each expert with an equal share of the batch" if batch > 1 else "one image, hence one pathway"),
            laps,
            ratios,
            replace(setting, batch=batch, repeats=repeats),
            at_most={"moe/s-dense": 1.25 if batch > 1 else 1.5},
            at_least={"dense/moe": 2.5} if batch > 1 else {},
            loads={"eval": loads(models["moe"], inputs)},
        )


def _predict(model: Classifier, x: Tensor) -> Side:
    def side() -> None:
        model(x)

    return side


@dataclass
class Stepper:
    """A trainer and the batches that its timed steps run over."""

    trainer: Trainer
    setting: Setting
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        train_set = self.trainer.train_set
        size = self.setting.batch
        chunks = zip(train_set.images.split(size), train_set.labels.split(size), strict=True)
        self.batches = [
            (pixels_of(x, self.setting.device).contiguous(memory_format=self.memory_format), y) for x, y in chunks
        ]
        self.generator = generator_for(0, "steps", device=self.setting.device)
        self.drawn = 0

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch."""
        self.drawn += 1
        return self.batches[self.drawn % len(self.batches)]

    def step(self) -> Mapping[str, float]:
        """One iteration of the method, each level on its own batch; milliseconds of each level if there are several."""
        levels, laps = METHODS[self.trainer.config.training.method].levels, {}
        for level in levels:
            start = now(self.setting.device)
            self.trainer.step(level, *self.draw(), self.generator)
            laps[f"{level.part} level"] = 1000 * (now(self.setting.device) - start)
        return laps if len(levels) > 1 else {}

    def attack(self) -> None:
        """One inner maximisation, as each level makes before its update."""
        self.trainer.attack(self.draw()[0], self.generator)

    def loads(self) -> dict[str, list[list[float]]]:
        """Loads as the steps since the last call saw them (train mode), and as their attacks see them (eval mode)."""
        training, self.trainer.use = self.trainer.use.loads(), LayerUse()
        x = torch.cat([x for x, _ in self.batches]).contiguous(memory_format=self.memory_format)
        with frozen(self.trainer.model):
            return {"train": training, "eval": loads(self.trainer.model, x)}


def make_stepper(setting: Setting, kind: ModelKind, method: str, precision: Precision, start: Classifier) -> Stepper:
    """A trainer of `method` from the weights of `start`, which it leaves as they are."""
    dataset = random_dataset(setting)
    config = make_config(setting, kind, method, precision)
    fabric = Fabric(accelerator=setting.device.split(":")[0], devices=1, precision=precision)
    fabric.launch()
    model = build_model(config, dataset)
    model.load_state_dict(start.state_dict())
    return Stepper(Trainer(config, model, dataset, fabric), setting)


def starting_model(setting: Setting, kind: ModelKind) -> Classifier:
    """A model of `kind`, settled on the images that the steps run over."""
    dataset = random_dataset(setting)
    model = build_model(make_config(setting, kind), dataset)
    return settled(model, pixels_of(dataset.train.images, setting.device), setting.settle)


def step(setting: Setting) -> Iterator[Line]:
    """One AdvMoE step, both levels, against one AT (S-Dense) step, and its parts."""
    routed, narrow = starting_model(setting, "moe"), starting_model(setting, "s-dense")
    steppers = {
        "advmoe": make_stepper(setting, "moe", "advmoe", setting.precision, routed),
        "at-moe": make_stepper(setting, "moe", "at", setting.precision, routed),
        "at-s-dense": make_stepper(setting, "s-dense", "at", setting.precision, narrow),
    }
    sides: dict[str, Side] = {name: stepper.step for name, stepper in steppers.items()}
    sides |= {f"{name}: one attack": steppers[name].attack for name in ("advmoe", "at-s-dense")}
    steppers["advmoe"].step()
    steppers["advmoe"].loads()  # the warm-up's are not reported
    laps = interleaved(sides, setting)
    ratios = {f"{side}/at-s-dense": (side, "at-s-dense") for side in laps if side != "at-s-dense"}
    yield result(
        "step",
        "Trainer.step for both levels of AdvMoE, each on a batch of its own with an attack of its own, against AT "
        "(S-Dense); the other ratios say where it goes, in the same unit: the routers' and the experts' level (each "
        "with its attack), one attack alone, AT (MoE)",
        laps,
        ratios,
        setting,
        at_most={"advmoe/at-s-dense": 2.8},
        changed={"attack_steps": 2, "lr": LEARNING_RATE, "data": "random images and labels, already on the device"},
        loads=steppers["advmoe"].loads(),
    )


def plain(setting: Setting) -> Iterator[Line]:
    """The same AdvMoE step as ours, in bf16 and in fp32, and computing every expert, masked, in NCHW and fp32."""
    start = starting_model(setting, "moe")
    precisions: tuple[Precision, ...] = ("bf16-mixed", "32-true")
    ours = {p: make_stepper(setting, "moe", "advmoe", p, start) for p in precisions}
    baseline = make_plain(make_stepper(setting, "moe", "advmoe", "32-true", start))
    difference = disagreement(ours["32-true"], baseline)
    sides: dict[str, Side] = {"plain": baseline.step, **{f"ours {p}": stepper.step for p, stepper in ours.items()}}
    laps = interleaved(sides, setting)
    for precision, stepper in ours.items():
        side = f"ours {precision}"
        yield result(
            f"plain-{precision}",
            "one AdvMoE step (both levels): every expert computed and masked, NCHW, fp32, over ours: sparse dispatch, "
            f"channels-last, {precision}; the same starting weights, batches, attack and freezing on both sides",
            {key: values for key, values in laps.items() if key.split(":")[0] in ("plain", side)},
            {"plain/ours": ("plain", side)},
            setting,
            at_least={"plain/ours": 4.0} if precision == "bf16-mixed" else None,
            changed={
                "precision": {"ours": precision, "plain": "32-true"},
                "memory_format": {"ours": "channels_last", "plain": "contiguous"},
                "attack_steps": 2,
                "lr": LEARNING_RATE,
                "data": "random images and labels, already on the device",
            },
            loads=stepper.loads(),
            largest_logit_difference_fp32=difference,
        )


def make_plain(stepper: Stepper) -> Stepper:
    """The same trainer, its model in NCHW and computing every expert; the parameters stay those of the optimisers."""
    trainer = stepper.trainer
    model = trainer.model
    plain_model = EveryExpert(model.normalize, model.backbone, model.router, model.spec).train(model.training)
    trainer.model = plain_model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Stepper(trainer, stepper.setting, torch.contiguous_format)


@torch.no_grad()
def disagreement(ours: Stepper, baseline: Stepper) -> float:
    """Largest difference of the two steppers' logits on a batch, in eval mode and fp32.

    Raises `RuntimeError` if they compute different things.
    """
    logits = []
    for stepper in (ours, baseline):
        # One at a time: the plain model changes the mode of the routing it runs under.
        with measuring(stepper.trainer.model, stepper.trainer.fabric.device):
            logits.append(stepper.trainer.model(stepper.batches[0][0]))
    a, b = logits
    difference = float((a - b).abs().max())
    if difference > 1e-3 * max(1.0, a.abs().max().item()):
        raise RuntimeError(f"the plain model must compute what ours does, got logits that differ by {difference:g}")
    return difference


RESULTS: dict[str, Callable[[Setting], Iterator[Line]]] = {"forward": forward, "step": step, "plain": plain}
"""Results by the name that `--only` takes."""


def measure(names: list[str], setting: Setting) -> Iterator[Line]:
    """The lines of the results `names`, one by one."""
    torch.set_num_threads(setting.threads)
    for name in names:
        log(f"{name}: width {setting.width}, batch {setting.batch}, {setting.device}")
        yield from RESULTS[name](setting)


def main() -> None:
    defaults = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("threads", "width", "batch", "repeats"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--image-size", type=int, default=defaults.image_size)
    parser.add_argument(
        "--settle", type=int, default=defaults.settle, help="passes that fit the batch-norm statistics first"
    )
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed"), default=defaults.precision, help="of `step`, both sides"
    )
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default=",".join(RESULTS), help="results, separated by commas")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(RESULTS)):
        parser.error(f"--only must name some of {', '.join(RESULTS)}, got {', '.join(unknown)}")
    setting = Setting(
        width=options.width, batch=options.batch, image_size=options.image_size, threads=options.threads,
        repeats=options.repeats, settle=options.settle, precision=options.precision, device=options.accelerator,
    )  # fmt: skip
    for line in measure(names, setting):
        write(line, options.out)


def write(line: Line, out: Path | None) -> None:
    """Print one line and, if `out` names a file, append it there."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()

"""What a pathway saves on the clock, backbone by backbone: MoE against S-Dense and Dense; one JSON line a backbone.

    python benchmarks/backbones.py --threads 2 --compile --out benchmarks/results/backbones.jsonl
    python benchmarks/backbones.py --markdown benchmarks/results/backbones.jsonl

Inference of one batch, fp32, eval mode, r = 0.5, two experts, layer routers. The sides are timed in turn in this
process, after a warm-up; lines hold their medians. As in `speed.py`, each router's last bias is shifted until both
experts get half of the images, the most that dispatch can cost; routers run and decide as always.

With `--compile` each side is timed compiled by `torch.compile` too, beside the same side as it is. A side that cannot
be compiled is named in the line, with the error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from speed import Line, Setting, interleaved, loads, log, pixels_of, random_images, result, settled
from torch import Tensor

from advmoe.config import ModelKind
from advmoe.evaluation.cost import gmacs, parameters
from advmoe.models import BACKBONES, Classifier, create_model, find_backbone
from advmoe.models.compiled import compile_model
from advmoe.models.modes import frozen

NAMES = (*(name for name in BACKBONES if name != "deit-tiny"), "wrn-28-10", "deit-tiny")
"""What is measured unless named otherwise: everything registered, and the paper's Wide ResNet."""

SIZES = {"deit-tiny": 224}
"""Side of the images in pixels, where it is not 32: of a transformer the size that it was designed for."""

KINDS: tuple[ModelKind, ...] = ("dense", "s-dense", "moe")

MOST = {"moe/s-dense": 1.3}
LEAST = {"densenet40": 1.5, "deit-tiny": None}
"""Targets of dense/moe that are not 2. A narrow MLP saves a transformer little: attention stays whole."""


@dataclass(frozen=True)
class Options:
    """What is asked for, besides the setting that all backbones share; None is a backbone's own."""

    width: int | None
    image_size: int | None
    compile: bool


def build(name: str, kind: ModelKind, setting: Setting, width: int | None) -> Classifier:
    """A new model, channels-last, in eval mode."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, kind=kind, input_size=setting.image_size, width=width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def measure(name: str, setting: Setting, options: Options) -> Line:
    """The line of one backbone."""
    size = options.image_size or SIZES.get(name, 32)
    setting = replace(setting, image_size=size, width=options.width or find_backbone(name).width)
    x = pixels_of(random_images(setting.batch, size, seed=0), setting.device)
    models = {kind: build(name, kind, setting, options.width) for kind in KINDS}
    settled(models["moe"], x, setting.settle).eval()  # the others' time does not depend on their statistics
    sides: dict[str, Callable[[Tensor], Tensor]] = {str(kind): model for kind, model in models.items()}
    failed: dict[str, str] = {}
    if options.compile:
        for kind, model in models.items():
            try:
                sides[f"{kind} compiled"] = compiled(model, x)
            except Exception as error:  # whatever the compiler raises is this side's result
                failed[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    for model in models.values():
        model.requires_grad_(False)
    with torch.no_grad():
        laps = interleaved({key: running(side, x) for key, side in sides.items()}, setting, warm_up=2)
    ratios = {"moe/s-dense": ("moe", "s-dense"), "dense/moe": ("dense", "moe")}
    for kind in KINDS:
        if f"{kind} compiled" in sides:
            ratios[f"{kind} compiled/{kind}"] = (f"{kind} compiled", kind)
    least = LEAST.get(name, 2.0)
    return result(
        f"backbone-{name}",
        "one forward pass in eval mode without gradients; the routers' own choices, each expert with an equal share "
        "of the batch",
        laps,
        ratios,
        setting,
        at_most=MOST,
        at_least={} if least is None else {"dense/moe": least},
        changed={"model": f"{name}, scale 0.5, 2 experts, layer routers"},
        backbone=name,
        gmacs={kind: round(gmacs(model), 6) for kind, model in models.items()},
        parameters={kind: stored_and_active(model) for kind, model in models.items()},
        loads={"eval": loads(models["moe"], x)},
        **({"not_compiled": failed} if failed else {}),
    )  # fmt: skip


def stored_and_active(model: Classifier) -> dict[str, int]:
    stored, active = parameters(model)
    return {"stored": stored, "active": active}


def running(side: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """The side's pass over `x`, to be timed."""

    def run() -> None:
        side(x)

    return run


def compiled(model: Classifier, x: Tensor) -> Classifier:
    """A copy of `model`, compiled, and called once. Raises what the compiler does, and `RuntimeError` if it differs."""
    torch.compiler.reset()  # one model's guards and limits are not another's
    made = compile_model(copy.deepcopy(model))
    with frozen(model), frozen(made), torch.no_grad():
        expected, found = model(x), made(x)
    apart = float((expected - found).abs().max())
    if apart > 1e-3 * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"the compiled model must compute the same logits, got a difference of {apart:g}")
    return made.requires_grad_(False)


# Markdown


def markdown(lines: Iterable[Line]) -> str:
    """The table of docs/performance.md, of the last line of each backbone: one row a backbone."""
    last = {line["backbone"]: line for line in lines if "backbone" in line}
    if not last:
        raise ValueError("lines must hold at least one of a backbone's, got none")
    with_compile = any(f"{kind} compiled" in line["medians_ms"] for line in last.values() for kind in KINDS)
    head = ["backbone", "GMACs Dense / S-Dense / MoE", "ms/image Dense / S-Dense / MoE", "MoE / S-Dense", "Dense / MoE"]
    head += ["ms/image with `torch.compile`"] if with_compile else []
    rows = [head, ["---"] * len(head), *(row(line, with_compile) for line in last.values())]
    return "\n".join([caption(list(last.values())), "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def row(line: Line, with_compile: bool) -> list[str]:
    size, targets = line["setting"]["image_size"], {target["ratio"]: target["met"] for target in line["targets"]}
    counts = " / ".join(f"{line['gmacs'][kind]:.3g}" for kind in KINDS)
    cells = [f"{line['backbone']}, {size}x{size}", counts, per_image(line, "")]
    for name in ("moe/s-dense", "dense/moe"):
        cells.append(f"{line['ratios'][name]:.2f}" + ("" if targets.get(name, True) else " (missed)"))
    return [*cells, per_image(line, " compiled")] if with_compile else cells


def per_image(line: Line, suffix: str) -> str:
    batch, medians = line["setting"]["batch"], line["medians_ms"]
    shown = (f"{medians[kind + suffix] / batch:.3g}" if kind + suffix in medians else "-" for kind in KINDS)
    return " / ".join(shown)


def caption(lines: Sequence[Line]) -> str:
    """Where and how the lines were measured, each value that they differ in named once."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    batches = all_of(line["setting"]["batch"] for line in lines)
    threads = all_of(line["setting"]["threads"] for line in lines)
    versions = all_of(line["versions"]["torch"] for line in lines)
    machines = all_of(line["hardware"]["cpu"] for line in lines)
    busy = [line["hardware"]["load_average"] for line in lines]
    return (
        f"Batch {batches}, {threads} threads, fp32, PyTorch {versions}, {machines} (load average {min(busy)} to "
        f"{max(busy)}, median {statistics.median(busy):.2g}); targets: MoE / S-Dense at most 1.3, Dense / MoE at least "
        "2 (DenseNet 1.5, transformers none)."
    )


def main() -> None:
    defaults = Setting(batch=64)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("threads", "batch", "repeats", "settle"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    parser.add_argument("--width", type=int, help="channels of the first stage (default: each backbone's own)")
    parser.add_argument("--image-size", type=int, help=f"side of the images (default: 32, but for {SIZES})")
    parser.add_argument("--only", default=",".join(NAMES), help="backbones, separated by commas")
    parser.add_argument("--compile", action="store_true", help="time each side under torch.compile as well")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    parser.add_argument("--markdown", type=Path, metavar="LINES", help="print the table of a file of lines, and stop")
    options = parser.parse_args()
    if options.markdown is not None:
        try:
            print(markdown(json.loads(line) for line in options.markdown.read_text().splitlines()))
        except (OSError, ValueError) as error:
            parser.error(f"--markdown: {error}")
        return
    names = options.only.split(",")
    for name in names:
        try:
            find_backbone(name)
        except ValueError as error:
            parser.error(f"--only: {error}")
    setting = replace(
        defaults, threads=options.threads, batch=options.batch, repeats=options.repeats, settle=options.settle
    )
    torch.set_num_threads(setting.threads)
    for name in names:
        log(f"{name}: batch {setting.batch}, {setting.threads} threads")
        text = json.dumps(measure(name, setting, Options(options.width, options.image_size, options.compile)))
        print(text, flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()

"""Clean and robust accuracy, always in fp32, of any classifier of [0, 1] pixels.

Axes: `N` examples, `C` channels, `H W` size, `K` classes. Fractions, not percent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from advmoe.attacks.pgd import Predict, pgd
from advmoe.config import AttackConfig, Config
from advmoe.data import ImageSet, load_dataset
from advmoe.evaluation.cost import cost
from advmoe.files import write_text
from advmoe.models import Classifier, load_model
from advmoe.models.modes import frozen
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routing import route, soft_routing
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel

EvaluationData = ImageSet | tuple[Tensor, Tensor]
"""Images with labels: an `ImageSet`, or pixels (N, C, H, W) in [0, 1] and classes (N,)."""


@contextmanager
def measuring(predict: Predict, device: torch.device) -> Iterator[None]:
    """Eval mode, frozen parameters, hard routing, full fp32 while numbers are taken; restores what was set before."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with frozen(predict), route(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _take(data: EvaluationData, index: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(data, ImageSet):
        x, y = data.pixels(index), data.labels[index]
    else:
        x, y = data[0][index], data[1][index]
    return x.to(device).contiguous(memory_format=torch.channels_last), y.to(device)


def _count(data: EvaluationData) -> int:
    images, labels = (len(data), len(data)) if isinstance(data, ImageSet) else (len(data[0]), len(data[1]))
    if images == 0 or images != labels:
        raise ValueError(
            f"data must hold at least 1 example, and a class for each, got {images} images, {labels} labels"
        )
    return images


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each row's largest logit is its class's; a row with NaN has none, whatever `argmax` says."""
    return (logits.argmax(1) == y) & logits.isfinite().all(1)


def surrogates(predict: Predict, steps: int) -> dict[str, Predict | None]:
    """The PGD variants that a model calls for, by name: its own gradients, and soft routing's for a routed model."""
    variants: dict[str, Predict | None] = {f"pgd-{steps}": None}
    if isinstance(predict, nn.Module) and any(isinstance(module, MoEConv2d) for module in predict.modules()):
        variants[f"pgd-{steps}-soft"] = soft_routing(predict)
    return variants


def outcomes(
    predict: Predict,
    data: EvaluationData,
    *,
    threat: ThreatModel,
    attack: AttackConfig,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Per example, whether it is classified correctly: clean, and under each attack, (N,) booleans by name.

    Adversarial examples are always scored by `predict` itself. An example that is wrong without an attack counts as
    broken and is not attacked. Each batch draws its random starts from the seed and its own position.
    """
    device = torch.device(device)
    count = _count(data)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size!r}")
    variants = surrogates(predict, attack.steps)
    found: dict[str, list[Tensor]] = {name: [] for name in ("clean", *variants)}
    bar = tqdm(total=count, desc="evaluate", unit="image", disable=None if progress else True)
    with measuring(predict, device), bar:
        for first in range(0, count, batch_size):
            x, y = _take(data, slice(first, first + batch_size), device)
            with torch.no_grad():
                correct = _correct(predict(x), y)
            found["clean"].append(correct)
            for name, surrogate in variants.items():
                robust = correct.clone()
                if correct.any():
                    x_adv = pgd(
                        predict,
                        x[correct],
                        y[correct],
                        threat=threat,
                        steps=attack.steps,
                        step_size=attack.step_size,
                        restarts=attack.restarts,
                        surrogate=surrogate,
                        generator=generator_for(seed, name, first, device=device),
                    )
                    with torch.no_grad():
                        robust[correct] = _correct(predict(x_adv), y[correct])
                found[name].append(robust)
            bar.update(len(y))
    return {name: torch.cat(parts).cpu() for name, parts in found.items()}


def summary(found: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies of `outcomes`: clean, per attack, and `worst_case`: robust only if every attack failed."""
    attacks = {name: correct for name, correct in found.items() if name != "clean"}
    worst = torch.stack(list(attacks.values())).all(0)
    return {
        "clean_accuracy": found["clean"].float().mean().item(),
        "robust_accuracy": {name: correct.float().mean().item() for name, correct in attacks.items()},
        "worst_case": worst.float().mean().item(),
        "num_examples": len(found["clean"]),
    }


def evaluate(
    model: Predict,
    data: EvaluationData,
    *,
    threat: ThreatModel | None = None,
    steps: int = 50,
    step_size: float = 2 / 255,
    restarts: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """SA and RA-PGD of any callable `x -> logits` on [0, 1] pixels; for a routed model of ours, under soft-routing
    gradients too.

    Args:
        data: an `ImageSet`, or pixels (N, C, H, W) and classes (N,). threat: default l-inf, 8/255.
        steps, step_size, restarts: of PGD. seed: of its random starts. progress: show a bar on a terminal.

    Returns `evaluation.json`'s content (fractions). Raises `ValueError` for empty data or pixels outside [0, 1].
    """
    threat = threat or ThreatModel()
    attack = AttackConfig(steps=steps, step_size=step_size, restarts=restarts)  # type: ignore[arg-type]
    found = outcomes(
        model, data, threat=threat, attack=attack, batch_size=batch_size, seed=seed, device=device, progress=progress
    )
    settings = {"steps": steps, "step_size": float(step_size), "restarts": restarts, "seed": seed}
    return {**summary(found), "threat": asdict(threat), "attack": settings}


def load_run(path: str | Path) -> Classifier:
    """The model of a run directory, in eval mode on the CPU. Raises `ValueError` naming what is missing or damaged."""
    return load_model(Path(path))


def evaluate_run(
    run_dir: Path,
    *,
    overrides: dict[str, dict[str, Any]] | None = None,
    num_examples: int | None = None,
    batch_size: int = 250,
    accelerator: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run on its test set and write `evaluation.json` beside it; `overrides` replace fields of its
    `config.yaml`.

    `num_examples` takes a random subset, by seed. Raises `ValueError` for a run, data or setting that cannot be used.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples must be >= 1, got {num_examples!r}")
    model = load_run(run_dir)
    settings = Config.load(run_dir / "config.yaml").to_dict()
    for group, fields in (overrides or {}).items():
        settings[group].update(fields)
    config = Config.from_dict(settings)
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    if accelerator == "cuda" and device.type != "cuda":
        raise ValueError("accelerator must be auto or cpu where no CUDA device is present, got 'cuda'")
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset = load_dataset(
        config.data.name, root=config.data.root, download=config.data.download, image_size=config.data.image_size,
        val_fraction=config.data.val_fraction, seed=config.training.seed, progress=True,
    )  # fmt: skip
    if dataset.num_classes != model.spec["num_classes"] or dataset.in_channels != model.spec["in_channels"]:
        expected, found = (
            (model.spec[key] for key in ("num_classes", "in_channels")),
            (dataset.num_classes, dataset.in_channels),
        )
        raise ValueError(f"data must have the model's (classes, channels) {tuple(expected)}, got {found}")
    seed = config.training.seed if seed is None else seed
    data = dataset.test
    if num_examples is not None and num_examples < len(data):
        chosen = torch.randperm(len(data), generator=generator_for(seed, "examples"))[:num_examples].sort().values
        data = ImageSet(data.images[chosen], data.labels[chosen])
    threat = ThreatModel(config.threat.norm, float(config.threat.eps))
    result = evaluate(
        model, data, threat=threat, steps=config.attack.steps, step_size=config.attack.step_size,
        restarts=config.attack.restarts, batch_size=batch_size, seed=seed, device=device, progress=True,
    )  # fmt: skip
    result["data"] = {"name": dataset.name, "split": "test"}
    result["cost"] = cost(model)
    write_text(run_dir / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result

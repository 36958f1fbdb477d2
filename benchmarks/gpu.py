"""The speed results and whole CIFAR-10 runs on a CUDA machine, within a time budget, into one flat directory.

    export PYTHONPATH=.
    python benchmarks/gpu.py --archive cifar10-jpeg.tar.xz --root data/cifar10-jpeg --minutes 25 --out results

Needs Python >= 3.11 with torch, numpy, pillow, scikit-learn, safetensors, tqdm, PyYAML and `lightning_fabric` (which
`pytorch_lightning` contains); nothing is installed or downloaded. `--smoke` runs all of it on digits, tiny, in a minute
on one CPU thread.

First the results of `speed.py`, then one run per method at the paper's recipe, images on the GPU, each evaluated
(clean, PGD-50 straight-through and soft, fp32) as soon as it ends. When the budget is nearly over a run stops at the
end of an epoch and is evaluated as it stands; the same command continues it from its last checkpoint. Runs and
checkpoints lie in `--runs`, one directory a method; `--out` gets `results.json` and each model's weights in half
precision, in files under 16 MiB.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import speed
import torch
from lightning_fabric import Fabric
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from advmoe.config import Config, merged
from advmoe.data import Dataset, load_dataset
from advmoe.documents import parse_yaml
from advmoe.evaluation.accuracy import evaluate
from advmoe.evaluation.runs import evaluate_run
from advmoe.files import write_text, write_whole
from advmoe.models import Classifier, create_model
from advmoe.models.modes import frozen
from advmoe.models.runs import load_run
from advmoe.recipes import recipe
from advmoe.tables import Level
from advmoe.threat import ThreatModel
from advmoe.training import manifest as manifests
from advmoe.training.loop import fit
from advmoe.training.objectives import Terms
from advmoe.training.trainer import Trainer, build_model

METHODS = ("advmoe", "at-s-dense", "at-moe", "at-dense")
"""Recipes' methods, in the order of their runs."""
FILE_LIMIT = 15 * 2**20
"""Bytes of tensors in one file of weights."""


class BudgetOver(Exception):
    """There is no time left for another epoch and what must follow it."""


@dataclass(frozen=True)
class Budget:
    """Wall clock time for everything; `minutes` None is no limit."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that remain."""
        return math.inf if self.minutes is None else self.started + 60 * self.minutes - time.monotonic()


@dataclass(kw_only=True)
class BudgetedTrainer(Trainer):
    """A `Trainer` that raises `BudgetOver` rather than begin an epoch that would not end in time."""

    budget: Budget
    reserve: float
    """Seconds to leave for the evaluation."""
    longest: float = 0.0
    """Seconds of the longest epoch so far, validation and checkpoint included."""
    began: float | None = field(init=False, default=None)

    def train_epoch(self, epoch: int, bar: Any) -> None:
        """Run an epoch if there is time for it."""
        moment = time.monotonic()
        if self.began is not None:
            self.longest = max(self.longest, moment - self.began)
        if self.budget.left() < 1.05 * self.longest + self.reserve:
            raise BudgetOver
        self.began = moment
        super().train_epoch(epoch, bar)
        speed.log(f"  epoch {epoch + 1}/{self.config.training.epochs}: {time.monotonic() - moment:.1f} s")

    def step(
        self, level: Level, x: Tensor, y: Tensor, generator: torch.Generator, x_adv: Tensor | None = None
    ) -> Terms:
        """One update; gives the epoch up if it turns out too long after all (the first one's length is not known)."""
        if self.budget.left() < self.reserve:
            raise BudgetOver
        return super().step(level, x, y, generator, x_adv)


# Data


def unpack(archive: Path, root: Path) -> None:
    """Unpack a tar archive of images into `root`; nothing is done where `root` already holds `train`.

    Raises `ValueError`, before anything is written, for a member that is no plain file or folder, or that lies outside.
    """
    if (root / "train").is_dir():
        return
    fresh = root.with_name(f".{root.name}.partial")
    with tarfile.open(archive) as file:
        members = file.getmembers()
        for member in members:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
                raise ValueError(f"--archive must hold plain files and folders at relative paths, got {member.name!r}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        file.extractall(fresh, members=members, filter="data")
    root.mkdir(parents=True, exist_ok=True)
    # `train` comes last: where it stands, everything does.
    for entry in sorted(fresh.iterdir(), key=lambda path: path.name == "train"):
        entry.replace(root / entry.name)
    fresh.rmdir()


def load(config: Config) -> Dataset:
    """The data set that `config` names."""
    data = config.data
    return load_dataset(
        data.name, root=data.root, image_size=data.image_size, val_fraction=data.val_fraction,
        train_examples=data.train_examples, seed=config.training.seed, progress=True,
    )  # fmt: skip


# Weights in half precision


def save_weights(model: Classifier, folder: Path, stem: str, limit: int = FILE_LIMIT) -> list[str]:
    """Write `stem`.safetensors, or `stem`-1-of-K.safetensors and so on where one would exceed `limit`.

    Filters and matrices are float16, vectors (norms, biases, statistics) stay float32. The description of the model is
    in the metadata of every file. Returns the names written.
    """
    parts: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor = tensor.half()
        if parts[-1] and sizes[-1] + tensor.nbytes > limit:
            parts.append({})
            sizes.append(0)
        parts[-1][name] = tensor
        sizes[-1] += tensor.nbytes
    names = []
    for number, tensors in enumerate(parts, 1):
        part = "" if len(parts) == 1 else f"-{number}-of-{len(parts)}"
        names.append(f"{stem}{part}.safetensors")
        metadata = {"model": json.dumps(model.spec)}
        write_whole(folder / names[-1], partial(save_file, tensors, metadata=metadata))
    return names


def load_weights(paths: Iterable[Path]) -> Classifier:
    """The model that `save_weights` wrote to `paths`, in eval mode and float32 on the CPU."""
    state: dict[str, Tensor] = {}
    spec: dict[str, Any] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            spec = json.loads(file.metadata()["model"])
            for name in file.keys():  # noqa: SIM118
                state[name] = file.get_tensor(name)
    model = create_model(**spec)
    model.load_state_dict(state)  # copies into float32
    return model.eval()


@torch.no_grad()
def same_predictions(first: Classifier, second: Classifier, images: Tensor, device: torch.device) -> float:
    """The share of uint8 `images` (N, C, H, W) that two models classify alike."""
    x = speed.pixels_of(images, str(device))
    predictions = []
    for model in (first, second):
        model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        predictions.append(torch.cat([model(part).argmax(1) for part in x.split(250)]))
    return float((predictions[0] == predictions[1]).float().mean())


# Runs


def make_config(method: str, options: argparse.Namespace) -> Config:
    """The recipe of `method`, on the images in `--root`, with what the command line changes."""
    training = {"seed": options.seed, "precision": options.precision, "compile": options.compile}
    changes: dict[str, dict[str, Any]] = {"training": training | {"epochs": options.epochs}}
    if options.smoke:
        setting = "digits"
        changes["model"], changes["data"] = {"width": 8}, {"val_fraction": 0.02}
        changes["training"]["batch_size"] = 128
    else:
        setting = "cifar10-resnet18"
        name = "folder" if (Path(options.root) / "train").is_dir() else "cifar10"
        changes["data"] = {"name": name, "root": options.root}
    for text in options.set:
        dotted, equals, value = text.partition("=")
        group, dot, name = dotted.partition(".")
        if not (equals and dot):
            raise ValueError(f"--set must be GROUP.FIELD=VALUE, got {text!r}")
        changes.setdefault(group, {})[name] = parse_yaml(value, dotted)
    return Config.from_dict(merged(recipe(f"{setting}-{method}"), changes))


def differences(saved: Config, wanted: Config) -> list[str]:
    """The fields in which two configurations differ."""
    a, b = saved.to_dict(), wanted.to_dict()
    return [f"{group}.{name}" for group, fields in a.items() for name in fields if fields[name] != b[group][name]]


def train(config: Config, dataset: Dataset, run: Path, method: str, budget: Budget, options: argparse.Namespace) -> str:
    """Begin or continue the run; `finished` or `stopped`."""
    fabric = Fabric(accelerator=options.accelerator, devices=1, precision=config.training.precision)
    fabric.launch()
    if (run / "manifest.json").exists():
        manifest = manifests.read(run)
        if manifest["finished"] is not None:
            return "finished"
    else:
        manifest = manifests.describe(name=method, seed=options.seed, device=fabric.device, devices=1, command=sys.argv)
        run.mkdir(parents=True, exist_ok=True)
        config.dump(run / "config.yaml")
        manifests.write(run, manifest)
    model = build_model(config, dataset)
    seconds = [line["seconds"] for line in metrics(run)]
    trainer = BudgetedTrainer(
        config, model, dataset, fabric, budget=budget, reserve=0.0, longest=1.2 * max(seconds, default=0.0)
    )
    if budget.minutes is not None:
        trainer.reserve = evaluation_seconds(trainer.model, dataset, config, options)
        speed.log(f"  {budget.left():.0f} s left, {trainer.reserve:.0f} of them for the evaluation")
    try:
        fit(trainer, run, manifest)
    except BudgetOver:
        return "stopped"
    return "finished"


def evaluation_seconds(model: Classifier, dataset: Dataset, config: Config, options: argparse.Namespace) -> float:
    """About how long the evaluation of a run takes, from two PGD steps on one batch taken as classified correctly."""
    device = next(model.parameters()).device
    count = min(len(dataset.test), options.num_examples or len(dataset.test))
    size = min(options.eval_batch, count)
    x = dataset.test.pixels(slice(0, size))
    with frozen(model), torch.no_grad():
        y = model(x.to(device)).argmax(1).cpu()
    threat = ThreatModel(config.threat.norm, float(config.threat.eps))
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        evaluate(model, (x, y), threat=threat, steps=2, batch_size=size, device=device)
        seconds = time.monotonic() - start
    attacks = config.attack.steps * config.attack.restarts / 2 * math.ceil(count / size)
    return 10 + 1.2 * seconds * float(attacks)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's epochs so far."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(run: Path, dataset: Dataset, budget: Budget, options: argparse.Namespace) -> dict[str, Any] | None:
    """`evaluation.json` of the run's model: the one there, if the model has not changed since.

    None without a model, or without time for it.
    """
    model, path = run / "model.safetensors", run / "evaluation.json"
    if not model.exists():
        return None
    count = min(len(dataset.test), options.num_examples or len(dataset.test))
    if path.exists() and path.stat().st_mtime >= model.stat().st_mtime:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["num_examples"] == count:
            return found
    if budget.left() <= 0:
        return None
    return evaluate_run(
        run, num_examples=options.num_examples, batch_size=options.eval_batch, accelerator=options.accelerator,
        threads=options.threads,
    )  # fmt: skip


def summary(run: Path, method: str, config: Config) -> dict[str, Any]:
    """What the run's own files say."""
    lines = metrics(run)
    return {
        "method": method,
        "seed": config.training.seed,
        "epochs": config.training.epochs,
        "epochs_done": len(lines),
        "seconds_per_epoch": [line["seconds"] for line in lines],
        "images_per_second": [line["images_per_second"] for line in lines],
        "train": [line["train"] for line in lines],
        "val": [line["val"] for line in lines],
        "layers": lines[-1]["layers"] if lines else [],
        "config": config.to_dict(),
        "manifest": manifests.read(run) if (run / "manifest.json").exists() else None,
    }


def run_method(
    method: str, config: Config, dataset: Dataset, budget: Budget, options: argparse.Namespace
) -> dict[str, Any]:
    """Train, evaluate and pack one method; its entry in `results.json`."""
    run = options.runs / method
    found: dict[str, Any] = {"status": "not started", "error": None, "evaluation": None, "weights": []}
    device = torch.device(options.accelerator)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        if budget.left() > 0:
            found["status"] = train(config, dataset, run, method, budget, options)
        elif (run / "manifest.json").exists():
            found["status"] = "stopped" if manifests.read(run)["finished"] is None else "finished"
    except Exception as error:  # one run's end must not take the others' results along
        traceback.print_exc()
        found |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    if device.type == "cuda":
        found["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        found["evaluation"] = measure(run, dataset, budget, options)
        if (run / "model.safetensors").exists():
            model = load_run(run)
            found["weights"] = save_weights(model, options.out, f"weights-{method}")
            packed = load_weights(options.out / name for name in found["weights"])
            images = dataset.test.images[: options.num_examples or 2000]
            found["weights_predict_alike"] = same_predictions(model, packed, images, device)
    except Exception as error:
        traceback.print_exc()
        found |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    return summary(run, method, config) | found


def speed_lines(options: argparse.Namespace) -> list[speed.Line]:
    """The lines of `speed.py` at every batch size; kept in `--runs`, so that a continued command has them."""
    path = options.runs / "speed.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text().splitlines()]
    lines: list[speed.Line] = []
    seen: Counter[str] = Counter()
    for batch in options.speed_batches:
        setting = speed.Setting(
            batch=batch, threads=options.threads, precision=options.precision, device=options.accelerator,
            **({"width": 8, "image_size": 16, "repeats": 2, "settle": 3} if options.smoke else {"repeats": 15}),
        )  # fmt: skip
        for line in speed.measure(list(speed.RESULTS), setting):
            key = f"{line['name']} {line['setting']['batch']}"
            seen[key] += 1
            if seen[key] == 1:  # one image is one image, whatever the batch
                lines.append(line)
                print(json.dumps(line), flush=True)
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
    return lines


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as lines of text, percentages."""
    rows = [f"{'method':<14}{'epochs':>9}{'s/epoch':>9}{'SA':>7}{'RA':>7}{'soft':>7}{'worst':>7}  status"]
    for run in runs:
        found = run["evaluation"] or {}
        robust = list(found.get("robust_accuracy", {}).values())
        numbers = [found.get("clean_accuracy"), *[*robust, None, None][:2], found.get("worst_case")]
        cells = "".join(f"{'-' if value is None else f'{100 * value:.1f}':>7}" for value in numbers)
        epochs = f"{run['epochs_done']}/{run['epochs']}"
        times = sorted(run["seconds_per_epoch"])
        median = f"{times[len(times) // 2]:.1f}" if times else "-"
        rows.append(f"{run['method']:<14}{epochs:>9}{median:>9}{cells}  {run['status']}")
    return "\n".join(rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, help="budget for everything (default: none)")
    add("--epochs", type=int, help="of every run (default: 100)")
    add("--root", default="data", help="image folder (train/<class>/*, test/<class>/*) or CIFAR-10's binary archive")
    add("--archive", type=Path, help="tar archive of the image folder, unpacked into --root first")
    add("--out", type=Path, default=Path("results"), help="flat directory of what is worth keeping")
    add("--runs", type=Path, default=Path("runs/gpu"), help="run directories and checkpoints")
    add("--methods", help=f"separated by commas, in order (default: {','.join(METHODS)})")
    add("--precision", choices=("bf16-mixed", "32-true"), help="of training (default: bf16-mixed, on CPU 32-true)")
    add("--compile", action="store_true", help="torch.compile in training")
    add("--seed", type=int, default=0)
    add("--set", action="append", default=[], metavar="GROUP.FIELD=VALUE", help="another field of every run's recipe")
    add("--num-examples", type=int, help="test images to evaluate on (default: all)")
    add("--eval-batch", type=int, help="images attacked at once (default: 1000, on CPU 100)")
    add("--speed-batches", help="batch sizes of the speed results, separated by commas (default: 128,1024)")
    add("--no-speed", action="store_true", help="leave the speed results out")
    add("--resume", action="store_true", help="refuse to run unless there is something in --runs to continue")
    add("--smoke", action="store_true", help="tiny sizes, digits, one epoch")
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(argv)
    if options.accelerator == "auto":
        options.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = options.accelerator == "cuda"
    options.precision = options.precision or ("bf16-mixed" if cuda else "32-true")
    options.methods = (options.methods or ("advmoe,at-s-dense" if options.smoke else ",".join(METHODS))).split(",")
    options.epochs = options.epochs or (1 if options.smoke else 100)
    options.num_examples = options.num_examples or (32 if options.smoke else None)
    options.eval_batch = options.eval_batch or (1000 if cuda else 100)
    batches = options.speed_batches or ("8" if options.smoke else "128,1024")
    options.speed_batches = [int(text) for text in batches.split(",")]
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    budget = Budget(options.minutes)
    torch.set_num_threads(options.threads)
    try:
        if options.archive is not None:
            unpack(options.archive, Path(options.root))
        configs = {method: make_config(method, options) for method in options.methods}
        for method, config in configs.items():
            saved = options.runs / method / "config.yaml"
            if saved.exists() and (changed := differences(Config.load(saved), config)):
                raise ValueError(f"{saved.parent} holds a run with other settings: {', '.join(changed)}")
        if options.resume and not any((options.runs / method / "manifest.json").exists() for method in configs):
            raise ValueError(f"--resume must find a run to continue in --runs, got {str(options.runs)!r}")
        dataset = load(configs[options.methods[0]])
    except (ValueError, OSError, tarfile.TarError) as error:
        speed.log(f"gpu.py: error: {error}")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    options.runs.mkdir(parents=True, exist_ok=True)
    described = manifests.describe(
        name="gpu", seed=options.seed, device=torch.device(options.accelerator), devices=1, command=sys.argv
    )
    results: dict[str, Any] = {
        key: described[key]
        for key in ("command", "seed", "versions", "platform", "cpu", "device", "git_commit", "started")
    }
    results |= {"hardware": speed.hardware(options.accelerator), "minutes": options.minutes, "smoke": options.smoke}
    sizes = {"train": len(dataset.train), "val": len(dataset.val), "test": len(dataset.test)}
    results |= {"data": {"name": dataset.name, **sizes}}
    results |= {"speed": [] if options.no_speed else speed_lines(options), "runs": []}
    for method, config in configs.items():
        speed.log(f"{method}: {config.training.epochs} epochs of {len(dataset.train)} images on {options.accelerator}")
        results["runs"].append(run_method(method, config, dataset, budget, options))
        results["wall_seconds"] = round(time.monotonic() - budget.started, 1)
        write_text(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    print(table(results["runs"]))
    return 1 if any(run["status"] == "failed" for run in results["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())

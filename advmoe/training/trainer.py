"""The training loop: epochs of a method's levels, measured, logged and checkpointed.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from advmoe.attacks.pgd import trades_attack
from advmoe.config import AttackConfig, Config, Pixels
from advmoe.data import Dataset, ImageSet, augment, load_dataset
from advmoe.evaluation.accuracy import outcomes, summary
from advmoe.files import write_text
from advmoe.models import Classifier, create_model, load_model, save_model, split_parameters
from advmoe.models.modes import frozen
from advmoe.moe.routing import soft_routing
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel
from advmoe.training import checkpoint as checkpoints
from advmoe.training import manifest as manifests
from advmoe.training.checkpoint import Checkpoint
from advmoe.training.methods import METHODS, Level, learning
from advmoe.training.monitor import EpochMeans, LayerUse
from advmoe.training.objectives import Terms, code_loss, codewords, cross_entropy, trades
from advmoe.training.processes import average_buffers, average_gradients, total
from advmoe.training.schedule import batches, cosine


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite."""


def build_model(config: Config, dataset: Dataset) -> Classifier:
    """The model that `config` describes for `dataset`, its weights drawn from the run's seed or taken from `training.init_from`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = create_model(
            **vars(config.model), num_classes=dataset.num_classes, input_size=dataset.image_size,
            in_channels=dataset.in_channels, mean=dataset.mean, std=dataset.std,
        )  # fmt: skip
    if config.training.init_from is not None:
        source = load_model(Path(config.training.init_from))
        try:
            model.load_state_dict(source.state_dict())
        except RuntimeError as error:
            reason = f"{config.training.init_from!r}, a {source.spec['kind']} {source.spec['name']} of other shape"
            raise ValueError(f"training.init_from must hold a model of the shape in model.*, got {reason}") from error
    return model


@dataclass
class Trainer:
    """One process's view of a run: the model, an optimiser per part, and what they are trained on.

    A user's own loop can call `step` alone; `fit` is the whole run.
    """

    config: Config
    model: Classifier
    dataset: Dataset
    fabric: Fabric
    threat: ThreatModel = field(init=False)
    optimizers: dict[str, torch.optim.SGD] = field(init=False)
    table: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        c, device = self.config, self.fabric.device
        self.threat = ThreatModel(c.threat.norm, float(c.threat.eps))
        self.model = self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_set = self.dataset.train.to(device)
        psi, phi = split_parameters(self.model)
        settings = {"lr": c.training.lr, "momentum": c.training.momentum, "weight_decay": c.training.weight_decay}
        self.optimizers = {"experts": torch.optim.SGD(psi, **settings)}
        if phi:
            self.optimizers["routers"] = torch.optim.SGD(phi, **settings)
        if c.training.router_objective == "codes":
            layers = len([name for name, _ in self.model.named_parameters() if name.endswith("bank")])
            arguments = (self.dataset.num_classes, layers, c.model.num_experts, c.training.seed)
            self.table = codewords(c.training.codes, *arguments).to(device)
        if c.training.compile:
            self.model.backbone.compile()
        self.use, self.means = LayerUse(), EpochMeans()

    def attack(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The inner maximisation on the current model, in eval mode; (N, C, H, W)."""
        t = self.config.training
        predict: Callable[[Tensor], Tensor] = self.model
        if t.attack_routing == "soft" and self.model.routed:
            predict = soft_routing(self.model)
        with frozen(self.model), self.fabric.autocast():
            return trades_attack(
                predict, x, threat=self.threat, steps=t.attack_steps, step_size=float(t.step_size), generator=generator
            )

    def step(self, level: Level, x: Tensor, y: Tensor, generator: torch.Generator) -> Terms:
        """One update of `level`'s part on images `x` (N, C, H, W) and classes `y` (N,); the loss terms before it."""
        t = self.config.training
        x_adv = self.attack(x, generator) if level.adversarial else None
        with learning(self.model, level.part):
            with self.fabric.autocast():
                if x_adv is None:
                    terms, routing, logits = cross_entropy(self.model, x, y)
                else:
                    terms, routing, adversarial, logits = trades(self.model, x, x_adv, y, t.beta)
                    if self.table is not None and level.part == "routers":
                        terms["codes"] = code_loss(adversarial, y, self.table, t.alpha)
            self.use.add(routing)
            self._require_finite(terms)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            average_gradients(self.fabric, self.model.parameters())
        for part in ("experts", "routers") if level.part == "all" else (level.part,):
            if part in self.optimizers:
                self.optimizers[part].step()
        self.means.add(level.part, {**terms, "accuracy": (logits.argmax(1) == y).float().mean()}, len(y))
        return terms

    def _require_finite(self, terms: Terms) -> None:
        values = torch.stack([value.detach().float() for value in terms.values()])
        # Every process must stop together, or the others would wait for it.
        if bool(torch.isfinite(total(self.fabric, values)).all()):
            return
        named = ", ".join(f"{name}={value:g}" for name, value in zip(terms, values.tolist(), strict=True))
        raise TrainingDiverged(f"loss terms must stay finite, got {named}; expert loads per layer: {self.use.loads()}")

    def train_epoch(self, epoch: int, bar: Any) -> None:
        """Run every iteration of `epoch` (from 0): each level of the method on its own batch."""
        t, fabric = self.config.training, self.fabric
        levels = METHODS[t.method]
        plan = batches(len(self.train_set), t.batch_size, seed=t.seed, epoch=epoch, levels=len(levels))
        generator = generator_for(t.seed, "train", epoch, fabric.global_rank, device=fabric.device)
        self.use, self.means = LayerUse(), EpochMeans()
        for iteration, indices in enumerate(plan):
            step = epoch * len(plan) + iteration
            factor = cosine(step, t.epochs * len(plan))
            for optimizer in self.optimizers.values():
                optimizer.param_groups[0]["lr"] = t.lr * factor
            for level, index in zip(levels, indices, strict=True):
                share = index[fabric.global_rank :: fabric.world_size].to(fabric.device)
                images, y = self.train_set.images[share], self.train_set.labels[share]
                if self.config.data.augment:
                    # On bytes, which is several times cheaper than on floats.
                    images = augment(images, generator=generator, padding=images.shape[-1] // 8, flip=self.dataset.flip)
                x = images.float().div_(255).contiguous(memory_format=torch.channels_last)
                try:
                    self.step(level, x, y, generator)
                except TrainingDiverged as error:
                    raise TrainingDiverged(f"step {step} (epoch {epoch + 1}, {level.part}): {error}") from None
            bar.update()

    def validate(self) -> dict[str, float] | None:
        """Clean and robust accuracy on the validation split, in fp32; None where there is no such split.

        Robust means under straight-through and, for a routed model, under soft-routing gradients: the worst of both.
        """
        val, t, fabric = self.dataset.val, self.config.training, self.fabric
        average_buffers(fabric, self.model)
        if len(val) == 0:
            return None
        share = ImageSet(val.images[fabric.global_rank :: fabric.world_size], val.labels[fabric.global_rank :: fabric.world_size])
        sums = torch.zeros(3, device=fabric.device)
        if len(share):
            attack = AttackConfig(steps=t.val_attack_steps, step_size=Pixels(2.5 * self.threat.eps / t.val_attack_steps or 1e-3))
            found = outcomes(
                self.model, share, threat=self.threat, attack=attack, seed=t.seed, device=fabric.device
            )
            numbers = summary(found)
            shares = [numbers["clean_accuracy"], numbers["worst_case"], 1.0]
            sums = len(share) * torch.tensor(shares, device=fabric.device)
        clean, robust, count = total(fabric, sums).tolist()
        return {"clean_accuracy": clean / count, "robust_accuracy": robust / count}

    def state(self, progress: dict[str, Any]) -> Checkpoint:
        """Everything that a later process needs to go on from here."""
        states = [optimizer.state_dict() for optimizer in self.optimizers.values()]
        return Checkpoint(self.model.state_dict(), states, progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to `checkpoint`."""
        self.model.load_state_dict(checkpoint.weights)
        for optimizer, state in zip(self.optimizers.values(), checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(state)


def fit(trainer: Trainer, run_dir: Path, manifest: dict[str, Any]) -> None:
    """Train from the last checkpoint in `run_dir`, or from the start, to the end; write metrics, checkpoints and the model."""
    fabric, t = trainer.fabric, trainer.config.training
    progress: dict[str, Any] = {"epoch": 0, "best": None, "wall_seconds": 0.0}
    found = checkpoints.load_latest(run_dir / "last")
    if found is not None:
        trainer.restore(found)
        progress = found.progress
    if fabric.is_global_zero:
        _trim_metrics(run_dir / "metrics.jsonl", progress["epoch"])
    iterations = len(batches(len(trainer.train_set), t.batch_size, seed=t.seed, epoch=0))
    bar = tqdm(
        total=t.epochs * iterations, initial=progress["epoch"] * iterations, desc="train", unit="it",
        disable=None if fabric.is_global_zero else True,
    )  # fmt: skip
    with bar:
        for epoch in range(progress["epoch"], t.epochs):
            started = time.perf_counter()
            bar.set_description(f"epoch {epoch + 1}/{t.epochs}")
            trainer.train_epoch(epoch, bar)
            seconds = time.perf_counter() - started
            measured = trainer.validate()
            line = _epoch_line(trainer, epoch, seconds, iterations, measured)
            score = _score(t.method, measured)
            best = progress["best"]
            better = best is None or score is None or score >= best["score"]
            progress = {
                "epoch": epoch + 1,
                "best": {"epoch": epoch + 1, "score": score, "val": measured} if better else best,
                "wall_seconds": progress["wall_seconds"] + time.perf_counter() - started,
            }
            if fabric.is_global_zero:
                with (run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")
                state = trainer.state(progress)
                if better:
                    checkpoints.save(run_dir / "best", state, keep_previous=False)
                    save_model(trainer.model, run_dir)
                checkpoints.save(run_dir / "last", state)
            fabric.barrier()
    if fabric.is_global_zero:
        _finish(trainer, run_dir, manifest, progress)


def _score(method: str, measured: dict[str, float] | None) -> float | None:
    """What the best checkpoint is chosen by; None (the last one is best) without a validation split."""
    if measured is None:
        return None
    return measured["clean_accuracy" if method == "standard" else "robust_accuracy"]


def _epoch_line(
    trainer: Trainer, epoch: int, seconds: float, iterations: int, measured: dict[str, float] | None
) -> dict[str, Any]:
    t = trainer.config.training
    seen = sum(trainer.means.counts.values()) * trainer.fabric.world_size
    return {
        "epoch": epoch + 1,
        "lr": t.lr * cosine(epoch * iterations, t.epochs * iterations),
        "train": trainer.means.report(trainer.fabric),
        "val": measured,
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1),
        "layers": trainer.use.report(trainer.fabric),
    }


def _trim_metrics(path: Path, epochs: int) -> None:
    """Drop the lines of epochs that an interrupted run logged but did not save."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["epoch"] <= epochs:
                kept.append(line)
        except ValueError:
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))


def _finish(trainer: Trainer, run_dir: Path, manifest: dict[str, Any], progress: dict[str, Any]) -> None:
    best = checkpoints.load_latest(run_dir / "best")
    if best is not None:
        trainer.model.load_state_dict(best.weights)
    save_model(trainer.model, run_dir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    manifests.write(run_dir, {**manifest, "finished": now, "wall_seconds": round(progress["wall_seconds"], 1)})


def _process(
    fabric: Fabric, config: Config, run_dir: str, threads: int, name: str, command: list[str] | None, fresh: bool
) -> None:
    """What each process of a run does."""
    torch.set_num_threads(threads)
    dataset = _load(config, progress=fabric.is_global_zero)
    model = build_model(config, dataset)
    folder = Path(run_dir)
    if fabric.is_global_zero and fresh:
        folder.mkdir(parents=True, exist_ok=True)
        config.dump(folder / "config.yaml")
        seed, devices = config.training.seed, fabric.world_size
        described = manifests.describe(name=name, seed=seed, device=fabric.device, devices=devices, command=command)
        manifests.write(folder, described)
    fabric.barrier()
    manifest = json.loads((folder / "manifest.json").read_text())
    fit(Trainer(config, model, dataset, fabric), folder, manifest)


def _load(config: Config, *, progress: bool) -> Dataset:
    data = config.data
    return load_dataset(
        data.name, root=data.root, download=data.download, image_size=data.image_size,
        val_fraction=data.val_fraction, seed=config.training.seed, progress=progress,
    )  # fmt: skip


def _launch(
    config: Config, run_dir: Path, *, name: str, devices: int, accelerator: str, threads: int | None,
    command: list[str] | None, fresh: bool,
) -> Path:  # fmt: skip
    if devices < 1 or config.training.batch_size % devices:
        raise ValueError(f"devices must be >= 1 and divide training.batch_size={config.training.batch_size}, got {devices!r}")
    if accelerator == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(f"devices must be <= the {torch.cuda.device_count()} CUDA devices present, got {devices!r}")
    threads = threads or max(1, torch.get_num_threads() // devices)
    strategy = "ddp_spawn" if devices > 1 else "auto"
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=config.training.precision)
    if devices > 1:
        # In this process first, so that bad input is one line and a first decode happens once.
        build_model(config, _load(config, progress=True))
    fabric.launch(_process, config, str(run_dir), threads, name, command, fresh)
    return run_dir


def train(
    config: Config, *, run_dir: Path, name: str, devices: int = 1, accelerator: str = "auto", threads: int | None = None,
    command: list[str] | None = None,
) -> Path:  # fmt: skip
    """Train `config` from its start and fill `run_dir`, which must be new or empty.

    Args:
        name: the recipe's, for the manifest. devices: processes, one per device; they share each batch. accelerator: `auto`, `cpu` or `cuda`.
        threads: CPU threads per process; by default what PyTorch has, shared among them. command: what the user typed, for the manifest.

    Returns `run_dir`. Raises `ValueError` before anything is created for input that cannot be used, `TrainingDiverged` for a NaN or
    infinite loss.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(f"run_dir must be new or empty (continue a run with --resume), got {str(run_dir)!r}")
    return _launch(
        config, run_dir, name=name, devices=devices, accelerator=accelerator, threads=threads, command=command, fresh=True
    )


def resume(run_dir: Path, *, devices: int | None = None, accelerator: str = "auto", threads: int | None = None) -> Path:
    """Continue the run in `run_dir` from its last sound checkpoint, by default with the processes and threads it had.

    On CPU the weights end bit-identical to those of a run that was never interrupted.
    """
    run_dir = Path(run_dir)
    for name in ("config.yaml", "manifest.json"):
        if not (run_dir / name).is_file():
            raise ValueError(f"a run to resume must hold {name}, got {str(run_dir)!r}")
    config = Config.load(run_dir / "config.yaml")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    return _launch(
        config, run_dir, name=manifest["name"], devices=devices or manifest["devices"], accelerator=accelerator,
        threads=threads or manifest["threads"], command=manifest["command"], fresh=False,
    )  # fmt: skip

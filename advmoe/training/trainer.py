"""One process's part of training: a method's levels on batches, epoch by epoch, and the measurement after each.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe.attacks.pgd import trades_attack
from advmoe.config import ROUTED_METHODS, AttackConfig, Config, Pixels
from advmoe.data import Dataset, Variation
from advmoe.evaluation.accuracy import outcomes, summary
from advmoe.evaluation.runs import load_run
from advmoe.evaluation.sources import load_module
from advmoe.models import Classifier, create_model
from advmoe.models.compiled import compile_model
from advmoe.models.convert import own_classifier
from advmoe.models.modes import frozen
from advmoe.moe import MoELayer
from advmoe.moe.routing import soft_routing
from advmoe.pruning import adopt, compact, expand
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel
from advmoe.training.checkpoint import Checkpoint
from advmoe.training.methods import METHODS, Level, learning, parts_of
from advmoe.training.monitor import EpochMeans, LayerUse
from advmoe.training.objectives import Terms, code_loss, codewords, cross_entropy, trades
from advmoe.training.processes import average_buffers, average_gradients, total
from advmoe.training.schedule import batches, cosine


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite."""


def build_model(config: Config, dataset: Dataset) -> Classifier:
    """The model that `config` describes for `dataset`, its weights drawn from the run's seed or taken from
    `training.init_from`. Executes `model.source`, if that is given.
    """
    init_from = config.training.init_from
    start = None if init_from is None else load_run(init_from, config.model.source)
    # A plain network of the user's own, trained already, is converted with the weights that it has.
    upcycled = start.backbone if start is not None and config.model.to_moe and not start.routed else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if config.model.source is not None:
            model = _own_model(config, dataset, upcycled or load_module(config.model.source))
        else:
            model = create_model(
                **config.model.backbone(), num_classes=dataset.num_classes, input_size=dataset.image_size,
                in_channels=dataset.in_channels, mean=dataset.mean, std=dataset.std,
            )  # fmt: skip
    if start is not None and upcycled is None:
        try:
            if config.model.kind == "sparse":
                adopt(model, start)
            else:
                model.load_state_dict(start.state_dict())
        except RuntimeError as error:
            reason = f"{init_from!r}, a {start.spec['kind']} {start.spec['name']} of other shape"
            raise ValueError(f"training.init_from must hold a model of the shape in model.*, got {reason}") from error
    return model


def _own_model(config: Config, dataset: Dataset, module: nn.Module) -> Classifier:
    """The user's network as the model to train, tried on images of the data's shape."""
    method, size, source = config.training.method, dataset.image_size, config.model.source
    # Three, as few axes of something else are 3 long.
    example = torch.rand(3, dataset.in_channels, size, size, generator=generator_for(config.training.seed, "example"))
    try:
        model = own_classifier(module, config.model, example)
    except ValueError as error:
        raise ValueError(f"model.source {source}: {error}") from error
    if (classes := model.spec["num_classes"]) != dataset.num_classes:
        raise ValueError(f"model.source must make logits of the data's {dataset.num_classes} classes, got {classes}")
    if method in ROUTED_METHODS and not model.routed:
        rule = f"converted (--to-moe), or have MoE layers of its own, when training.method is {method}"
        raise ValueError(f"model.source must be {rule}, got {source!r} without")
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
    whole: Classifier | None = field(default=None, kw_only=True)
    """The sparse model whose compacted form `model` is, where that is trained; checkpoints hold it whole."""
    threat: ThreatModel = field(init=False)
    optimizers: dict[str, torch.optim.SGD] = field(init=False)
    table: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        c, device = self.config, self.fabric.device
        self.threat = ThreatModel(c.threat.norm, float(c.threat.eps))
        self.model = self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_set = self.dataset.train.to(device)
        t = c.training
        self.optimizers = {
            part: torch.optim.SGD(parameters, lr=t.lr, momentum=t.momentum, weight_decay=t.weight_decay)
            for part, parameters in parts_of(self.model).items()
            if parameters
        }
        if c.training.router_objective == "codes":
            layers = sum(isinstance(module, MoELayer) for module in self.model.modules())
            arguments = (self.dataset.num_classes, layers, c.model.num_experts, c.training.seed)
            self.table = codewords(c.training.codes, *arguments).to(device)
        if c.training.compile:
            compile_model(self.model)
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
            torch.stack(list(terms.values())).sum().backward()
            average_gradients(self.fabric, self.model.parameters())
        for part, optimizer in self.optimizers.items():
            if level.part in ("all", part):
                optimizer.step()
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
        shares = [index[fabric.global_rank :: fabric.world_size] for indices in plan for index in indices]
        generator = generator_for(t.seed, "train", epoch, fabric.global_rank, device=fabric.device)
        variation = Variation(generator, purpose=(t.seed, "crops", epoch), flip=self.dataset.flip)
        self.use, self.means = LayerUse(), EpochMeans()
        with closing(self.train_set.batches(shares, variation if self.config.data.augment else None)) as drawn:
            for iteration in range(len(plan)):
                step = epoch * len(plan) + iteration
                factor = cosine(step, t.epochs * len(plan))
                for optimizer in self.optimizers.values():
                    optimizer.param_groups[0]["lr"] = t.lr * factor
                for level, (images, y) in zip(levels, islice(drawn, len(levels)), strict=True):
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
        share = val.subset(torch.arange(fabric.global_rank, len(val), fabric.world_size))
        sums = torch.zeros(3, device=fabric.device)
        if len(share):
            step_size = Pixels(2.5 * self.threat.eps / t.val_attack_steps or 1e-3)
            attack = AttackConfig(steps=t.val_attack_steps, step_size=step_size)
            found = outcomes(self.model, share, threat=self.threat, attack=attack, seed=t.seed, device=fabric.device)
            numbers = summary(found)
            shares = [numbers["clean_accuracy"], numbers["worst_case"], 1.0]
            sums = len(share) * torch.tensor(shares, device=fabric.device)
        clean, robust, count = total(fabric, sums).tolist()
        return {"clean_accuracy": clean / count, "robust_accuracy": robust / count}

    def as_saved(self) -> Classifier:
        """The model as checkpoints hold it."""
        return self.model if self.whole is None else expand(self.model, self.whole)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of a checkpoint."""
        if self.whole is None:
            self.model.load_state_dict(weights)
        else:
            self.whole.load_state_dict(weights)
            self.model.load_state_dict(compact(self.whole).state_dict())

    def state(self, progress: dict[str, Any]) -> Checkpoint:
        """Everything that a later process needs to go on from here."""
        states = [optimizer.state_dict() for optimizer in self.optimizers.values()]
        return Checkpoint(self.as_saved().state_dict(), states, progress)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to `checkpoint`."""
        self.load(checkpoint.weights)
        for optimizer, state in zip(self.optimizers.values(), checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(state)

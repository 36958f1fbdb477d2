"""One process's part of training: a method's levels on batches, epoch by epoch, and the measurement after each.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.attacks.pgd import trades_attack
from advmoe.config import AttackConfig, Config, Pixels
from advmoe.data import Dataset, Variation
from advmoe.errors import InputError
from advmoe.evaluation.halfspaces import halfspaces_of
from advmoe.evaluation.outcomes import Clean, Measurement, outcomes, summary
from advmoe.models import Classifier
from advmoe.models.compiled import Network, compiled
from advmoe.models.compute import set_compute
from advmoe.models.modes import frozen
from advmoe.moe import moe_layers
from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.moe.routing import Routing
from advmoe.progress import postfix, shown
from advmoe.pruning import compact, expand
from advmoe.seeding import drawing_for, generator_for
from advmoe.tables import Level, Part
from advmoe.threat import ThreatModel
from advmoe.training.averaging import WeightAverage, floats
from advmoe.training.awp import perturbed
from advmoe.training.checkpoint import TrainingState
from advmoe.training.finite import TrainingDiverged, Watch, glance, require_sound
from advmoe.training.inner import through
from advmoe.training.lines import terms_line
from advmoe.training.methods import epoch_plan, learning
from advmoe.training.midway import Midway
from advmoe.training.model import build_model
from advmoe.training.monitor import EpochMeans, LayerUse
from advmoe.training.objectives import (
    Terms,
    code_loss,
    codewords,
    cross_entropy,
    radius_loss,
    robust,
    routing_terms,
)
from advmoe.training.optim import clip, compile_step, make_optimizers, restore_states, set_rates, states_of
from advmoe.training.perturbations import Perturbations
from advmoe.training.processes import average_buffers, average_gradients, total
from advmoe.training.resizing import require_sizes, shrunk
from advmoe.training.runner_up import OtherWay, worst_reachable
from advmoe.training.schedule import rate
from advmoe.training.statistics import fixed_norms, refresh
from advmoe.training.teacher import Teacher, teacher_of


@dataclass
class Trainer:
    """One process's view of a run: the model, an optimiser per part, and what they are trained on.

    A user's own loop can call `step` alone; `loop.fit` is the whole run.
    """

    config: Config
    model: Classifier
    dataset: Dataset
    fabric: Fabric
    whole: Classifier | None = field(default=None, kw_only=True)
    """The sparse model whose compacted form `model` is, where that is trained; checkpoints hold it whole."""
    teacher: Teacher | None = field(default=None, kw_only=True)
    """Whom the model learns from; by default whom `training.teacher` names, which is loaded."""
    network: Network = field(init=False)
    """The model as training's passes and attacks compute it; measurements take the model itself."""
    threat: ThreatModel = field(init=False)
    optimizers: dict[Part, torch.optim.Optimizer] = field(init=False)
    steps: dict[Part, Callable[[], Any]] = field(init=False)
    """Each optimiser's."""
    attacking: tuple[int, float] = field(init=False)
    """Steps of the inner attack and the length of each, in pixel units, as of the epoch under way."""
    side: int | None = field(init=False)
    """The side in pixels to which the epoch's images are shrunk, if they are."""
    levels: tuple[Level, ...] = field(init=False)
    """Of the method, in the order in which an iteration runs those that are due."""
    table: Tensor | None = field(init=False, default=None)
    """The classes' codewords, (K, L) for L MoE layers, where routers learn these."""
    average: WeightAverage | None = field(init=False, default=None)
    perturbations: Perturbations | None = field(init=False, default=None)
    begun: Midway | None = field(init=False, default=None)
    """Where in its epoch the next one begins; None at its start."""
    after_iteration: Callable[[int, torch.Generator], None] | None = field(init=False, default=None)
    """Called after each iteration but an epoch's last: how many are done, and what this process draws from."""

    def __post_init__(self) -> None:
        c, device = self.config, self.fabric.device
        self.threat, t = ThreatModel(c.threat.norm, float(c.threat.eps)), c.training
        self.model = self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train_set = self.dataset.train.to(device)
        self.teacher = self.teacher or teacher_of(t, self.dataset, device)
        self.optimizers = make_optimizers(self.model, t)
        self.steps = {part: optimizer.step for part, optimizer in self.optimizers.items()}
        self.attacking, self.side = (t.attack_steps, float(t.step_size)), None
        sides = [each for each in map(t.image_size_at, range(t.epochs)) if each is not None]
        require_sizes(self.model, sides, self.dataset.image_size, self.dataset.in_channels)
        if t.router_objective == "codes":
            experts = [layer.num_experts for layer in moe_layers(self.model)]
            self.table = codewords(t.codes, self.dataset.num_classes, experts, t.seed).to(device)
        self.levels = t.levels()
        self.follow = None if t.fixed_norms is None else t.fixed_norms == "running"
        fixed = fixed_norms(self.model, self.levels[0].part) if t.fixed_norms == "refresh" else []
        self.refresh = partial(refresh, self.model, fixed, self.train_set, t.batch_size, t.seed)
        if t.ema > 0:
            self.average = WeightAverage(self.model, t.ema)
        if t.warm:
            self.perturbations = Perturbations(self.train_set, self.fabric)
        set_compute(self.model, t.compute, device)
        self.network = self._compiled() if t.compile else self.model
        self.use, self.means, self.watch, self._place = LayerUse(), EpochMeans(), Watch.on(self.fabric), ""
        # A network of the user's own may hold infinities on purpose, in a mask say.
        self._finite = [name for name, tensor in floats(self.model).items() if bool(tensor.isfinite().all())]

    def _compiled(self) -> Network:
        """The model, compiled; a GPU replays each graph whole, where batches have one size."""
        t, cuda = self.config.training, self.fabric.device.type == "cuda"
        replayed = cuda and t.attack_routing != "mixed" and not t.first_image_sizes and t.runner_up == 0
        network = compiled(self.model, **({"mode": "reduce-overhead", "dynamic": False} if replayed else {}))
        if cuda and network is not self.model:
            # Not replayed: gradients are what replays left, and a new replay takes their memory.
            self.steps = {part: compile_step(each) for part, each in self.optimizers.items()}
        return network

    def attack(
        self, x: Tensor, generator: torch.Generator, earlier: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The inner maximisation on the current model in eval mode, of images `x`; (N, C, H, W). It leads away from the
        clean prediction: the model's own or, where there is a teacher, that one's.

        With perturbations of an `earlier` attack, (N, C, H, W), it takes one step from these. An attack that ascends
        the cross-entropy (`training.attack_loss`) needs the images' classes `y` (N,).
        """
        t = self.config.training
        search = self._search(generator, None if earlier is None else 1)
        labels = y if t.inner[1] == "ce" else None
        if labels is None and t.inner[1] == "ce":
            raise InputError("y must be given for an attack that ascends the cross-entropy, got None")
        each = {"held": earlier, "labels": labels, "target": None if self.teacher is None else self.teacher(x)}
        with frozen(self.model), self.fabric.autocast(), shown(False):
            routing = t.attack_routing if self.model.routed else "straight-through"
            return through(routing, search, self.network, x, generator, each)

    def _other_way(self, level: Level, x: Tensor, generator: torch.Generator) -> OtherWay | None:
        """An attack on the runner-up pathways of images `x` (N, C, H, W), where experts learn to forgive a flip."""
        share, taught = self.config.training.runner_up, None if self.teacher is None else self.teacher(x)
        if share == 0 or level.part == "routers" or not level.adversarial:
            return None
        with frozen(self.model), self.fabric.autocast(), shown(False):
            search, space = self._search(generator), halfspaces_of(self.model, x)
            worst = None if space is None else partial(worst_reachable, space=space, threat=self.threat)
            return OtherWay.of(self.network, x, share, search, worst, taught)

    def _search(self, generator: torch.Generator, steps: int | None = None) -> Callable[..., Tensor]:
        """The inner attack of the epoch under way, in so many steps where they are given."""
        usual, step_size = self.attacking
        return partial(
            trades_attack, threat=self.threat, steps=steps or usual, step_size=step_size, generator=generator,
            uniform=self.config.training.inner[0] == "uniform",
        )  # fmt: skip

    def step(
        self, level: Level, x: Tensor, y: Tensor, generator: torch.Generator, x_adv: Tensor | None = None
    ) -> Terms:
        """One update of `level`'s part on images `x` (N, C, H, W) and classes `y` (N,).

        An adversarial level attacks the images, unless their adversarial ones are passed as `x_adv` (N, C, H, W).
        Returns the loss terms whose gradient the update followed: those of the weights before it or, with
        `training.awp`, of these perturbed. Raises `TrainingDiverged` for a term that is NaN or infinite: on a GPU
        within `LOOK_EVERY` steps, or at `require_finite`.
        """
        if level.adversarial and x_adv is None:
            x_adv = self.attack(x, generator, None, y)
        loss = partial(self._loss, level, x, x_adv, y, self._other_way(level, x, generator))
        with self._perturbed(level, loss), learning(self.model, level.part, follow=self.follow):
            terms, routing, logits = loss()
            self.use.add(routing)
            if self.watch.add(self._place, terms):
                self.require_finite()
            self._backward(terms)
            clip(self.model.parameters(), self.config.training.clip)
        for part, step in self.steps.items():
            if level.part in ("all", part):
                step()
        means = dict(terms)
        # Reported in the precision of fp32 or not at all; what a GPU makes of that in training is TF32.
        if self.config.training.precision == "32-true":
            means["accuracy"] = (logits.argmax(1) == y).float().mean()
        self.means.add(level.part, means, len(y))
        return terms

    def _loss(
        self, level: Level, x: Tensor, x_adv: Tensor | None, y: Tensor, other: OtherWay | None
    ) -> tuple[Terms, Routing, Tensor]:
        """The terms that `level` minimises, the clean pass's routing and logits (N, K); of PGD-AT, its only pass's."""
        t = self.config.training
        with self.fabric.autocast():
            if x_adv is None or t.objective == "pgd-at":
                seen = x if x_adv is None else x_adv
                terms, routing, logits = cross_entropy(self.network, seen, y, t.label_smoothing)
                passes = [routing]
            else:
                taught = None if self.teacher is None else self.teacher(x)
                terms, routing, adversarial, logits = robust(self.network, x, x_adv, y, t, taught)
                passes = [routing, adversarial]
                if other is not None:
                    told, weight = (logits, t.beta) if taught is None else (taught, t.distill_weight)
                    terms["runner_up"] = other.loss(self.model, self.network, told, weight)
            if self.table is not None and x_adv is not None and level.part == "routers":
                terms["codes"] = code_loss(passes[-1], y, self.table, t.alpha)
            if level.part != "experts":
                terms |= routing_terms(passes, t.balance, t.margin)
            if t.radius > 0 and level.part != "experts":
                terms["radius"] = radius_loss(cast(HalfspaceRouter, self.model.router), x, self.threat, t.radius)
        return terms, routing, logits

    def _backward(self, terms: Terms) -> None:
        """The gradients of the terms' sum, the same on every process."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        average_gradients(self.fabric, self.model.parameters())

    @contextmanager
    def _perturbed(self, level: Level, loss: Callable[[], tuple[Terms, Routing, Tensor]]) -> Iterator[None]:
        """The weights of `level`'s part moved against it by `training.awp` inside."""
        gamma = self.config.training.awp
        if gamma == 0 or level.part == "scores":  # of which there is no direction to perturb in: a number a channel
            yield
            return
        with learning(self.model, level.part, record=False):
            self._backward(loss()[0])
        with perturbed(self.model.parameters(), gamma):
            yield

    def require_finite(self) -> None:
        """Raise `TrainingDiverged` where a loss term of the steps so far is NaN or infinite, on every process alike."""
        if (problem := self.watch.look()) is not None:
            raise TrainingDiverged(f"{problem}; expert loads per layer: {self.use.loads()}")

    def train_epoch(self, epoch: int, bar: Any) -> None:
        """Run every iteration of `epoch` (from 0): the levels of the method that are due, batch by batch."""
        t, fabric = self.config.training, self.fabric
        plan = epoch_plan(self.levels, len(self.train_set), t.batch_size, seed=t.seed, epoch=epoch)
        shares = [index[fabric.global_rank :: fabric.world_size] for run in plan for index, _ in run]
        generator = generator_for(t.seed, "train", epoch, fabric.global_rank, device=fabric.device)
        variation = Variation(generator, purpose=(t.seed, "crops", epoch), flip=self.dataset.flip)
        varied = variation if self.config.data.augment else None
        self.use, self.means = LayerUse(), EpochMeans()
        self.attacking, self.side = t.attack_at(epoch), t.image_size_at(epoch)
        begun, self.begun = self.begun, None
        first = 0 if begun is None else begun.iterations
        if epoch == 0 and begun is None:
            self.refresh()
        handed_out = sum(len(run) for run in plan[:first])
        drawing = self.train_set.batches(shares, varied if self.perturbations is None else None, handed_out)
        layers = drawing_for(t.seed, "layers", epoch, fabric.global_rank, device=fabric.device)
        with layers, closing(drawing) as drawn:
            if begun is not None:
                begun.restore(self, generator)
            for done, run in enumerate(plan[first:], first + 1):
                step = epoch * len(plan) + done - 1
                set_rates(self.optimizers, t, rate(t, step, len(plan)))
                for (index, levels), (images, y) in zip(run, islice(drawn, len(run)), strict=True):
                    x, x_adv = self._prepared(levels[0], index, images, y, varied, generator)
                    for level in levels:
                        self._place = f"step {step} (epoch {epoch + 1}, {level.part})"
                        losses = self.step(level, x, y, generator, x_adv)
                    postfix(bar, partial(terms_line, losses))
                if self.average is not None:
                    self.average.update(self.model, step)
                bar.update()
                if self.after_iteration is not None and done < len(plan):
                    self.after_iteration(done, generator)
            self.require_finite()
        self._place = ""

    def _prepared(
        self,
        level: Level,
        index: Tensor,
        images: Tensor,
        y: Tensor,
        varied: Variation | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor | None]:
        """Pixels (N, C, H, W) of a batch and, for an adversarial `level`, the adversarial images.

        `images` are this process's share of those at `index`; where perturbations are stored they are yet to be varied.
        """
        view, stored = None, self.perturbations
        if stored is not None and varied is not None:
            view = varied.view(images)
            images = view.of(images)
        x = shrunk(images.float().div_(255).contiguous(memory_format=torch.channels_last), self.side)
        if not level.adversarial:
            return x, None
        x_adv = self.attack(x, generator, None if stored is None else stored.take(index, view), y)
        if stored is not None:
            stored.keep(index, view, x_adv - x)
        return x, x_adv

    @property
    def val_attack(self) -> AttackConfig:
        """The attack on the validation split, whose steps can cross the ball."""
        steps = self.config.training.val_attack_steps
        return AttackConfig(steps=steps, step_size=Pixels(2.5 * self.threat.eps / steps or 1e-3))

    def validate(self) -> dict[str, float] | None:
        """Clean and robust accuracy on the validation split, in fp32; None where there is no such split. Raises
        `TrainingDiverged` where there is nothing to measure: weights or logits that are NaN or infinite.

        Robust means under straight-through and, for a routed model, under soft-routing gradients: the worst of both.
        """
        val, t, fabric, device = self.dataset.val, self.config.training, self.fabric, self.fabric.device
        average_buffers(fabric, self.model.buffers())
        if self.average is not None:
            average_buffers(fabric, self.average.buffers(self.model))
        self.refresh()
        share = val.subset(torch.arange(len(val))[fabric.global_rank :: fabric.world_size])
        sums = torch.zeros(3, device=device)
        with self.averaged():
            if self.average is not None:
                self.refresh()
            if len(share):
                attacks = ("pgd", "pgd-soft") if self.model.routed else ("pgd",)
                measurement = Measurement(threat=self.threat, attack=self.val_attack, attacks=attacks, seed=t.seed)
                robust = outcomes(self.model, share, measurement, device=device, accept=self._require_sound)
                numbers = summary(robust)
                shares = [numbers["clean_accuracy"], numbers["worst_case"], 1.0]
                sums = len(share) * torch.tensor(shares, device=device)
            else:
                measurement = Measurement(threat=self.threat, attack=self.val_attack, seed=t.seed)
                seen = glance(self.model, self.train_set, measurement, device) if len(val) == 0 else None
                self._require_sound(seen)
        if len(val) == 0:
            return None
        clean, robust, count = total(fabric, sums).tolist()
        return {"clean_accuracy": clean / count, "robust_accuracy": robust / count}

    def _require_sound(self, clean: Clean | None) -> None:
        """Raise `TrainingDiverged`, on every process, where the weights of one, their average or the logits of `clean`
        are NaN or infinite: such a model is neither measured nor saved.
        """
        states = [floats(self.model)] if self.average is None else [floats(self.model), self.average.state]
        require_sound(
            self.fabric, [weights[name] for weights in states for name in self._finite], clean, self.use.loads
        )

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that are measured and saved: their average, if one is taken, or its own."""
        return nullcontext() if self.average is None else self.average.applied(self.model)

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

    def state(self, progress: dict[str, Any]) -> TrainingState:
        """What a later process needs to go on from here, with the `progress` counters."""
        more = {}
        if self.average is not None:
            more = {f"average.{name}": tensor for name, tensor in self.average.state.items()}
        if self.perturbations is not None:
            more["perturbations"] = self.perturbations.stored
        return TrainingState(self.as_saved().state_dict(), states_of(self.optimizers), progress, more)

    def restore(self, checkpoint: TrainingState) -> None:
        """Go back to the state in `checkpoint`."""
        self.load(checkpoint.weights)
        restore_states(self.optimizers, checkpoint.optimizers)
        if self.average is not None:
            self.average.load({name.removeprefix("average."): tensor for name, tensor in checkpoint.more.items()})
        if self.perturbations is not None:
            self.perturbations.stored.copy_(checkpoint.more["perturbations"])
        self.begun = Midway.of(checkpoint)


__all__ = ["Trainer", "TrainingDiverged", "build_model"]

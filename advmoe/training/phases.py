"""A run in phases, each with a network, optimisers and a learning-rate schedule of its own: robust structured pruning.

HYDRA (Sehwag et al., NeurIPS 2020), with channels for weights: `pretrain` the Dense backbone robustly, `prune` it
(learn scores of its channels robustly, weights fixed), `finetune` what the masks leave, as the small dense network that
it is. Every other method has one phase, which is the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from advmoe.config import Config, ModelKind
from advmoe.pruning import adopt, compact, dense_form
from advmoe.seeding import seed_for

if TYPE_CHECKING:
    from advmoe.training.trainer import Trainer

_FORMS: dict[str, tuple[ModelKind, str]] = {
    "pretrain": ("dense", "at"),
    "prune": ("sparse", "sparse"),
    "finetune": ("s-dense", "at"),
}
"""The kind of network that each phase trains, and by what method."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run."""

    name: str | None
    """None where the method has one phase."""
    first: int
    """Epochs of the run before it."""
    config: Config
    """The settings of its trainer."""

    @property
    def end(self) -> int:
        """Epochs of the run when it is over."""
        return self.first + self.config.training.epochs


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, those of no epoch left out.

    Pretraining draws what AT (Dense) of the same seed draws, and a run that starts from such a run goes on as this one
    does after it: seeds of later phases depend on their names alone.
    """
    t = config.training
    if t.method != "sparse":
        return (Phase(None, 0, config),)
    plan, first = list[Phase](), 0
    for name, epochs in t.phase_epochs().items():
        if epochs == 0:
            continue
        kind, method = _FORMS[name]
        seed = t.seed if name == "pretrain" else seed_for(t.seed, name) % 2**32
        lr = t.lr if name != "finetune" or t.finetune_lr is None else t.finetune_lr
        training = replace(
            t, method=method, epochs=epochs, prune_epochs=epochs, finetune_epochs=epochs, lr=lr, finetune_lr=None,
            seed=seed, init_from=None,
        )  # fmt: skip
        plan.append(Phase(name, first, replace(config, model=replace(config.model, kind=kind), training=training)))
        first += epochs
    return tuple(plan)


def phase_at(plan: tuple[Phase, ...], epoch: int) -> Phase:
    """The phase of `epoch` (from 0); the last one for what comes after all."""
    return next((phase for phase in plan if epoch < phase.end), plan[-1])


def enter(phase: Phase, run: Trainer) -> Trainer:
    """A new trainer for `phase`; that of the `run` has the whole run's model, as earlier phases left it."""
    if phase.name is None:
        return run
    model, whole = run.model, None
    if phase.name == "pretrain":
        model = dense_form(run.model)
    elif phase.name == "finetune":
        model, whole = compact(run.model), run.model
    data = replace(run.dataset, train=run.train_set)  # where it lies already
    return replace(run, config=phase.config, model=model, dataset=data, whole=whole)


def leave(phase: Phase, trainer: Trainer, run: Trainer, weights: dict[str, Tensor]) -> None:
    """Hand what `phase` arrived at, the `weights` of its best checkpoint, on to the model of the whole run."""
    trainer.load(weights)
    if phase.name == "pretrain":
        adopt(run.model, trainer.model)

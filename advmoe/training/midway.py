"""How far an epoch is: what a checkpoint within it holds besides weights and optimisers.

Each process has its own: what it draws from, the statistics of its batch norms, its sums for the epoch's line. A
checkpoint holds those of all, in the order of their ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.seeding import generator_for
from advmoe.training.averaging import floats
from advmoe.training.processes import total

if TYPE_CHECKING:
    from advmoe.training.checkpoint import TrainingState
    from advmoe.training.trainer import Trainer

ITERATIONS = "iterations"
"""The counter of a checkpoint within an epoch: iterations of it that are done."""
_PREFIX = "within."


@dataclass(frozen=True)
class Midway:
    """Iterations of the epoch that are done, and by name what each process had then, (processes, ...)."""

    iterations: int
    of_all: dict[str, Tensor]

    @staticmethod
    def of(checkpoint: TrainingState) -> Midway | None:
        """What `checkpoint` says; None for one at the end of an epoch."""
        iterations = checkpoint.progress.get(ITERATIONS, 0)
        of_all = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in checkpoint.more.items()
            if name.startswith(_PREFIX)
        }  # fmt: skip
        return Midway(iterations, of_all) if iterations else None

    @staticmethod
    def now(trainer: Trainer, iterations: int, generator: torch.Generator) -> Midway:
        """Of `trainer`, which draws from `generator`; to be called on every process."""
        device = trainer.fabric.device
        own = {"drawn": generator.get_state(), "layers.cpu": torch.get_rng_state()}
        if device.type == "cuda":
            own["layers.cuda"] = torch.cuda.get_rng_state(device)
        own |= {f"buffer.{name}": tensor for name, tensor in _buffers(trainer).items()}
        if trainer.use.counts is not None and trainer.use.entropy is not None:
            own |= {"use.counts": trainer.use.counts, "use.entropy": trainer.use.entropy}
        sums = [(level, each) for level, terms in trainer.means.sums.items() for each in terms.items()]
        own |= {f"count.{level}": torch.tensor(count) for level, count in trainer.means.counts.items()}
        own |= {f"sum.{place:03}.{level}.{term}": value for place, (level, (term, value)) in enumerate(sums)}
        return Midway(iterations, {name: _gathered(trainer.fabric, tensor) for name, tensor in own.items()})

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint is to hold, by name."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self.of_all.items()}

    def restore(self, trainer: Trainer, generator: torch.Generator) -> None:
        """Go on from here. With another number of processes than there were, the first one's statistics are all's, each
        draws anew, and the epoch's sums are shared out among them.
        """
        fabric, device = trainer.fabric, trainer.fabric.device
        same = len(self.of_all["drawn"]) == fabric.world_size
        # Cloned: PyTorch reads a state as numbers of 8 bytes, which need not begin at such a place in a file.
        mine = {name: tensor[fabric.global_rank if same else 0].clone() for name, tensor in self.of_all.items()}
        for name, buffer in _buffers(trainer).items():
            buffer.copy_(mine[f"buffer.{name}"])
        drawn = mine["drawn"].cpu()
        if not same or drawn.shape != generator.get_state().shape:  # as of another kind of device
            seed = trainer.config.training.seed
            drawn = generator_for(seed, "from", self.iterations, fabric.global_rank, device=device).get_state()
        generator.set_state(drawn)
        if same:
            torch.set_rng_state(mine["layers.cpu"].cpu())
            if device.type == "cuda" and "layers.cuda" in mine:
                torch.cuda.set_rng_state(mine["layers.cuda"].cpu(), device)
        else:
            mine = {name: tensor.sum(0) / fabric.world_size for name, tensor in self.of_all.items()}
        if "use.counts" in mine:
            trainer.use.counts, trainer.use.entropy = (mine[f"use.{name}"].to(device) for name in ("counts", "entropy"))
        for name, tensor in sorted(mine.items()):  # a file keeps no order: an epoch's line lists terms as they came
            kind, *parts = name.split(".", 3)
            if kind == "count":
                trainer.means.counts[parts[0]] = tensor.item()
            elif kind == "sum":
                *_, level, term = parts
                trainer.means.sums.setdefault(level, {})[term] = tensor.to(device)


def _buffers(trainer: Trainer) -> dict[str, Tensor]:
    """The statistics that each process has of its own share of the images, and their average's."""
    names = [name for name, _ in trainer.model.named_buffers()]
    all_of = {"": floats(trainer.model)} | ({} if trainer.average is None else {"average.": trainer.average.state})
    return {f"{which}{name}": state[name] for which, state in all_of.items() for name in names if name in state}


def _gathered(fabric: Fabric, tensor: Tensor) -> Tensor:
    every = torch.zeros(fabric.world_size, *tensor.shape, dtype=tensor.dtype, device=fabric.device)
    every[fabric.global_rank] = tensor.to(fabric.device)
    return total(fabric, every)

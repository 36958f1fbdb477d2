"""What a run shows in TensorBoard: the scalars of `metrics.jsonl`, and a few validation images under attack.

Every epoch has an event file of its own, written whole and named after the epoch, so that an epoch that is trained
again replaces what it had shown.

Axes: `N` images, `C` channels, `H W` size.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.pgd import pgd
from advmoe.errors import InputError
from advmoe.models.modes import frozen
from advmoe.rundir import BOARD
from advmoe.seeding import generator_for
from advmoe.training.trainer import Trainer

SHOWN = 8
"""Validation images that are shown, evenly spaced over the split."""
_STEM = "events.out.tfevents.epoch-"


def require_tensorboard() -> None:
    """Raise `ValueError`, which names the extra, where event files cannot be written."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        needed = "the extra tensorboard: pip install 'advmoe[tensorboard]'"
        raise InputError(f"--tensorboard needs {needed}, got: {error}") from error


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a line of `metrics.jsonl` by their path: `val/robust_accuracy`, `layers/03/load/00`; of dead
    experts, how many there are.
    """
    layers = [{**layer, "dead_experts": len(layer["dead_experts"])} for layer in line["layers"]]
    for layer in layers:
        del layer["layer"]  # the path says it
    return dict(_numbers("", {**{name: value for name, value in line.items() if name != "epoch"}, "layers": layers}))


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield path, float(value)
    if isinstance(value, list):
        value = {f"{place:02d}": child for place, child in enumerate(value)}
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _numbers(f"{path}/{name}" if path else name, child)


def examples(trainer: Trainer) -> dict[str, Tensor]:
    """Validation images (at most `SHOWN`, C, H, W) in [0, 1], as they are and under the attack that `validate` makes,
    through straight-through gradients, on the weights that are measured; nothing without a validation split.
    """
    val, device, attack = trainer.dataset.val, trainer.fabric.device, trainer.val_attack
    generator = generator_for(trainer.config.training.seed, "shown", device=device)
    if len(val) == 0:
        return {}
    chosen = val.subset(torch.linspace(0, len(val) - 1, min(SHOWN, len(val))).long().to(val.labels.device))
    x = chosen.pixels(slice(None)).to(device).contiguous(memory_format=torch.channels_last)
    with trainer.averaged(), frozen(trainer.model):
        x_adv = pgd(
            trainer.model, x, chosen.labels.to(device), threat=trainer.threat, steps=attack.steps,
            step_size=float(attack.step_size), generator=generator,
        )  # fmt: skip
    return {"val/clean": x, "val/adversarial": x_adv}


class Board:
    """The folder `RUN/tensorboard`, made if it is not there."""

    def __init__(self, run_dir: Path) -> None:
        self.folder, self.partial = run_dir / BOARD, run_dir / ".tensorboard.partial"
        self.folder.mkdir(exist_ok=True)

    def write(self, line: Mapping[str, Any], images: Mapping[str, Tensor]) -> None:
        """Show an epoch: its line of `metrics.jsonl`, and images (N, C, H, W) in [0, 1] by name."""
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self.partial, ignore_errors=True)
        with SummaryWriter(self.partial) as writer:
            for name, value in scalars(line).items():
                writer.add_scalar(name, value, line["epoch"])
            for name, each in images.items():
                writer.add_images(name, each, line["epoch"])
        (written,) = self.partial.iterdir()
        written.replace(self._file(line["epoch"]))
        self.partial.rmdir()

    def follow(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Show what `metrics.jsonl` holds and no more: drop later epochs, and show the scalars of those missing."""
        known = {self._file(line["epoch"]): line for line in lines}
        for path in self.folder.glob(f"{_STEM}*"):
            if path not in known:
                path.unlink()
        for path, line in known.items():
            if not path.exists():
                self.write(line, {})

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{_STEM}{epoch:06d}"

"""What must stay finite: loss terms, watched without waiting for a GPU at every step, and what is measured or saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from advmoe.data import Images
from advmoe.evaluation.outcomes import Clean, Measurement, classified, make_job
from advmoe.training.objectives import Terms
from advmoe.training.processes import total

LOOK_EVERY = 16
"""Steps, or iterations, after which a GPU is asked for what a run depends on; each time its host waits for it."""


class TrainingDiverged(RuntimeError):
    """A loss, a weight or a logit became NaN or infinite."""


@dataclass
class Watch:
    """Terms of steps whose values are yet to be looked at: those of `every` steps at once."""

    fabric: Fabric
    every: int
    steps: list[tuple[str, tuple[str, ...], Tensor]] = field(default_factory=list)
    """Where each step was, the names of its terms, and their values (number of terms,) on the device."""

    @staticmethod
    def on(fabric: Fabric) -> Watch:
        """Looks at every step, but on a GPU, whose host would wait each time, at those of `LOOK_EVERY` together."""
        return Watch(fabric, LOOK_EVERY if fabric.device.type == "cuda" else 1)

    def add(self, place: str, terms: Terms) -> bool:
        """Take in a step's terms; whether it is time to `look`."""
        self.steps.append((place, tuple(terms), torch.stack([value.detach().float() for value in terms.values()])))
        return len(self.steps) >= self.every

    def look(self) -> str | None:
        """What became NaN or infinite first, on any process, and where; None where nothing did. To be called on every
        process: all must stop together, or the others would wait for it.
        """
        if not self.steps:
            return None
        steps, self.steps = self.steps, []
        own = steps[0][2] if len(steps) == 1 else torch.cat([values for *_, values in steps])
        finite = torch.isfinite(total(self.fabric, own))
        if bool(finite.all()):
            return None
        each = finite.split([len(names) for _, names, _ in steps])
        place, names, values = next(step for step, sound in zip(steps, each, strict=True) if not bool(sound.all()))
        named = ", ".join(f"{name}={value:g}" for name, value in zip(names, values.tolist(), strict=True))
        return f"{place}{': ' if place else ''}loss terms must stay finite, got {named}"


def require_sound(
    fabric: Fabric, weights: Sequence[Tensor], clean: Clean | None, loads: Callable[[], list[list[float]]]
) -> None:
    """Raise `TrainingDiverged`, on every process, where `weights` or the logits of `clean` are NaN or infinite on one:
    such a model is neither measured nor saved. `loads` gives each expert's share, per MoE layer, for the error.
    """
    sound = torch.stack([each.isfinite().all() for each in weights]).all()
    sure = clean is None or bool(clean.finite.all())
    broken = total(fabric, torch.stack([~sound, torch.tensor(not sure, device=sound.device)]).float()).tolist()
    if any(broken):
        what = " and ".join(name for name, bad in zip(("weights", "logits"), broken, strict=True) if bad)
        raise TrainingDiverged(f"{what} must stay finite, got NaN or infinity; expert loads per layer: {loads()}")


GLANCED = 64
"""Training images whose logits must be finite, where there are none to validate with."""


def glance(model: nn.Module, images: Images, measurement: Measurement, device: torch.device) -> Clean:
    """The clean pass on a few of the training `images`."""
    few = images.subset(torch.arange(min(GLANCED, len(images)), device=images.labels.device))
    job, _ = make_job(model, few, replace(measurement, batch_size=GLANCED), device)
    return classified(model, job, device)

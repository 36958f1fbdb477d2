"""When training stops because its numbers are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.evaluation.outcomes import Clean
from advmoe.training.objectives import Terms
from advmoe.training.processes import total

Loads = Callable[[], list[list[float]]]
"""Share of samples of each expert, per MoE layer: what an error tells beside the numbers."""


class TrainingDiverged(RuntimeError):
    """A loss, a weight or a logit became NaN or infinite."""


def require_finite(fabric: Fabric, terms: Terms, loads: Loads) -> None:
    """Raise `TrainingDiverged`, on every process, where a term of a loss is NaN or infinite on one."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    # Every process must stop together, or the others would wait for it.
    if bool(torch.isfinite(total(fabric, values)).all()):
        return
    named = ", ".join(f"{name}={value:g}" for name, value in zip(terms, values.tolist(), strict=True))
    raise TrainingDiverged(f"loss terms must stay finite, got {named}; expert loads per layer: {loads()}")


def require_sound(fabric: Fabric, weights: Sequence[Tensor], clean: Clean | None, loads: Loads) -> None:
    """Raise `TrainingDiverged`, on every process, where `weights` or the logits of `clean` are NaN or infinite on one:
    such a model is neither measured nor saved.
    """
    sound = torch.stack([each.isfinite().all() for each in weights]).all()
    sure = clean is None or bool(clean.finite.all())
    broken = total(fabric, torch.stack([~sound, torch.tensor(not sure, device=sound.device)]).float()).tolist()
    if any(broken):
        what = " and ".join(name for name, bad in zip(("weights", "logits"), broken, strict=True) if bad)
        raise TrainingDiverged(f"{what} must stay finite, got NaN or infinity; expert loads per layer: {loads()}")

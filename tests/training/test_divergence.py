"""What stops a training whose numbers are none, and what it says."""

import math

import pytest
import torch
from lightning_fabric import Fabric

from advmoe.evaluation.outcomes import Clean
from advmoe.training.divergence import TrainingDiverged, require_finite, require_sound


def loads():
    return [[0.25, 0.75]]


def test_a_term_that_is_no_number_is_named_beside_the_others():
    fabric = Fabric(accelerator="cpu", devices=1)
    require_finite(fabric, {"ce": torch.tensor(1.5), "kl": torch.tensor(-2.0)}, loads)
    told = r"loss terms must stay finite, got ce=1.5, kl=inf; expert loads per layer: \[\[0.25, 0.75\]\]"
    with pytest.raises(TrainingDiverged, match=told):
        require_finite(fabric, {"ce": torch.tensor(1.5), "kl": torch.tensor(math.inf)}, loads)


@pytest.mark.parametrize(
    ("weight", "finite", "what"),
    [(1.0, True, None), (math.nan, True, "weights"), (1.0, False, "logits"), (math.inf, False, "weights and logits")],
)
def test_a_model_that_is_no_model_is_neither_measured_nor_saved(weight, finite, what):
    fabric = Fabric(accelerator="cpu", devices=1)
    weights = [torch.ones(2), torch.tensor([0.0, weight])]
    clean = Clean(torch.ones(2).bool(), torch.zeros(2), torch.zeros(2, 0), torch.tensor([True, finite]))
    if what is None:
        require_sound(fabric, weights, clean, loads)
        require_sound(fabric, weights, None, loads)
        return
    with pytest.raises(TrainingDiverged, match=f"^{what} must stay finite, got NaN or infinity; expert loads"):
        require_sound(fabric, weights, clean, loads)

"""Loss terms are looked at each step on CPUs, and those of several steps at once where a look costs a wait."""

import math

import pytest
import torch
from lightning_fabric import Fabric

from advmoe.evaluation.outcomes import Clean
from advmoe.training.finite import LOOK_EVERY, TrainingDiverged, Watch, require_sound


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_a_cpu_is_asked_at_each_step_and_says_what_broke(fabric):
    watch = Watch.on(fabric)
    assert watch.add("step 0", terms(ce=1.5, kl=0.5)) and watch.look() is None
    assert watch.add("", terms(ce=1.5, kl=math.inf))
    assert watch.look() == "loss terms must stay finite, got ce=1.5, kl=inf"
    assert watch.look() is None  # it was told


def test_steps_are_looked_at_together_and_the_first_that_broke_is_named(fabric):
    watch = Watch(fabric, every=4)
    due = [watch.add(f"step {number}", terms(ce=2.0)) for number in range(3)]
    due.append(watch.add("step 3", terms(ce=1.0, kl=2.0)))
    assert due == [False, False, False, True] and watch.look() is None
    for number, value in enumerate((1.0, math.nan, -math.inf), 4):
        watch.add(f"step {number}", terms(ce=0.25, kl=value))
    assert watch.look() == "step 5: loss terms must stay finite, got ce=0.25, kl=nan"


def test_a_gpu_is_asked_every_so_many_steps():
    class OnGpu:
        device = torch.device("cuda")

    assert Watch.on(OnGpu()).every == LOOK_EVERY > 1


@pytest.mark.parametrize(
    ("weight", "finite", "what"),
    [(1.0, True, None), (math.nan, True, "weights"), (1.0, False, "logits"), (math.inf, False, "weights and logits")],
)
def test_a_model_that_is_no_model_is_neither_measured_nor_saved(fabric, weight, finite, what):
    weights = [torch.ones(2), torch.tensor([0.0, weight])]
    clean = Clean(torch.ones(2).bool(), torch.zeros(2), torch.zeros(2, 0), torch.tensor([True, finite]))
    if what is None:
        require_sound(fabric, weights, clean, lambda: [[0.25, 0.75]])
        require_sound(fabric, weights, None, lambda: [[0.25, 0.75]])
        return
    with pytest.raises(TrainingDiverged, match=f"^{what} must stay finite, got NaN or infinity; expert loads"):
        require_sound(fabric, weights, clean, lambda: [[0.25, 0.75]])

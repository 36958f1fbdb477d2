"""Modes of a module for a while: eval, frozen, and made without drawing its weights."""

import pytest
import torch
from torch import nn

from advmoe.models.modes import Undrawn, evaluating, frozen


def network():
    made = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    made[1].eval()
    made[2].weight.requires_grad_(False)
    return made


@pytest.mark.parametrize("context", [evaluating, frozen])
def test_every_part_gets_its_own_mode_back_after_an_error_too(context):
    model = network()
    modes, learning = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), context(model):
        assert not any(m.training for m in model.modules())
        assert any(p.requires_grad for p in model.parameters()) == (context is evaluating)
        raise KeyError
    assert [m.training for m in model.modules()] == modes == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == learning == [True, True, False, True]


def test_what_is_no_module_is_left_alone():
    calls = []
    with frozen(calls.append):
        calls.append(1)
    assert calls == [1]  # not called, and no attribute of a module asked for


def test_undrawn_weights_are_zero_and_no_random_number_is_used():
    before = torch.get_rng_state()
    with Undrawn():
        layer = nn.Conv2d(3, 4, 3)
        nn.init.normal_(layer.weight)
    assert torch.equal(torch.get_rng_state(), before) and not layer.weight.any()

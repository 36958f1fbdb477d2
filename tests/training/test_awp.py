"""Adversarial weight perturbation: its size, direction and what it leaves alone."""

import pytest
import torch
from torch import nn

from advmoe.training.awp import perturbed


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model(torch.rand(5, 4)).square().sum().backward()
    return model


def test_one_weight_by_hand():
    # |w| = 5, |g| = 2: the step is 0.1 * 5 * g / 2.
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    w.grad = torch.tensor([[0.0, -2.0]])
    with perturbed([w], 0.1):
        assert w.tolist() == [[3.0, 3.5]]
    assert w.tolist() == [[3.0, 4.0]] and w.grad.tolist() == [[0.0, -2.0]]


def test_weights_move_by_their_share_and_come_back_bit_for_bit():
    model = small_model()
    model[2].weight.requires_grad_(False).grad = None  # fixed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="planned"), perturbed(model.parameters(), 0.01):
        step = model[0].weight.detach() - before["0.weight"]
        assert step.norm() / before["0.weight"].norm() == pytest.approx(0.01, rel=1e-3)
        cosine = (step * model[0].weight.grad).sum() / (step.norm() * model[0].weight.grad.norm())
        assert cosine == pytest.approx(1, abs=1e-5)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name != "0.weight"), name
        raise RuntimeError("planned")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_makes_the_loss_worse():
    model, x = small_model(), torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    with perturbed(model.parameters(), 0.01):
        assert model(x).square().sum() > loss
    assert model(x).square().sum() == loss


def test_no_gradient_no_move():
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.zeros(2, 2)
    with perturbed([w], 0.5):
        assert torch.equal(w, torch.ones(2, 2))

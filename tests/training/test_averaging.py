"""The moving average of weights: worked by hand, exchanged and back, tied and fixed ones."""

import pytest
import torch
from torch import nn

from advmoe.training.averaging import WeightAverage


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.15)
    # Decays min(0.15, (1 + n) / (10 + n)) are 1/10, then 0.15: 0.1 * 1 + 0.9 * 2 = 1.9, 0.15 * 1.9 + 0.85 * 4 = 3.685.
    for number, (weight, expected) in enumerate([(2.0, 1.9), (4.0, 3.685)]):
        nn.init.constant_(model.weight, weight)
        average.update(model, number)
        assert average.state["weight"].item() == pytest.approx(expected)
        assert model.weight.item() == weight
    assert average.state["weight"].requires_grad is False
    # Late in a run it is the decay asked for.
    slow = WeightAverage(model, 0.99)
    nn.init.constant_(model.weight, 5.0)
    slow.update(model, 10_000)
    assert slow.state["weight"].item() == pytest.approx(0.99 * 4 + 0.01 * 5)


def test_statistics_are_averaged_and_counts_are_the_models_own():
    model, x = nn.BatchNorm1d(2).train(), torch.randn(8, 2)
    average = WeightAverage(model, 0.5)
    start = model.running_mean.clone()
    model(x)
    average.update(model, 99)
    torch.testing.assert_close(average.state["running_mean"], (start + model.running_mean) / 2)
    assert average.buffers(model)[0] is average.state["running_mean"] and len(average.buffers(model)) == 2
    with average.applied(model):
        torch.testing.assert_close(model.running_mean, average_of(start, model, x))
        assert model.num_batches_tracked == 1


def average_of(start, model, x):
    return (start + 0.9 * start + 0.1 * x.mean(0)) / 2


def test_applied_exchanges_and_restores_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight  # tied
    average = WeightAverage(model, 0.9)
    before, x = state(model), torch.randn(4, 3)
    outputs = model.eval()(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tripled = state(model)
    with pytest.raises(RuntimeError, match="planned"), average.applied(model):
        assert torch.equal(model(x), outputs)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise RuntimeError("planned")
    assert all(torch.equal(tensor, tripled[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(average.state["0.weight"], before["0.weight"])


def test_what_does_not_change_keeps_its_bits():
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    before, average = state(model), WeightAverage(model, 0.999)
    for number in range(20):
        average.update(model, number)
    assert all(torch.equal(average.state[name], tensor) for name, tensor in before.items())


def test_a_saved_state_comes_back():
    model = nn.Linear(2, 2)
    average, other = WeightAverage(model, 0.9), WeightAverage(nn.Linear(2, 2), 0.9)
    other.load(average.state)
    assert all(torch.equal(other.state[name], tensor) for name, tensor in average.state.items())
    assert other.state["weight"].data_ptr() != average.state["weight"].data_ptr()

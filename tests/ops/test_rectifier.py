"""ReLU with what stands around it: the same as batch norm, sum, ReLU and mean in turn, with all gradients."""

import pytest
import torch
from torch import nn

from advmoe.ops import Grouped, norm_act, rectify

LAST = torch.channels_last
MEMBERS = (torch.tensor([3, 0]), torch.tensor([1, 2]))


class Act(nn.Module):
    """ReLU of a sum, as the networks' own."""

    def forward(self, x, shortcut=None):
        return (x if shortcut is None else x + shortcut).relu()


def batch(seed, channels=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, channels, 3, 2, generator=generator).contiguous(memory_format=LAST)


def test_a_rectified_sum_by_hand(kernels):
    y = torch.full((1, 8, 1, 2), -1.0).contiguous(memory_format=LAST)
    y[..., 1] = 2.0
    shortcut = torch.full((1, 8, 1, 2), 0.5).contiguous(memory_format=LAST)
    with kernels(), torch.no_grad():
        rectified = rectify(y, shortcut, pool=True)
    assert rectified.x[0, 0].tolist() == [[0.0, 2.5]]
    assert rectified.pooled is None or rectified.pooled.tolist() == [[1.25] * 8]


@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_a_rectified_sum_and_its_gradients(summed, pool, channels, kernels):
    y, shortcut, c = batch(0, channels), batch(1, channels), batch(2, channels)
    results = []
    for ours in (True, False):
        inputs = [y.clone().requires_grad_(), *([shortcut.clone().requires_grad_()] if summed else [])]
        # Not the leaves themselves: what is rectified is overwritten.
        first, other = inputs[0] * 1, inputs[1] if summed else None
        with kernels():
            x, pooled, _ = rectify(first, other, pool=pool) if ours else (Act()(first, other), None, None)
            loss = (x * c).sum() + (x.mean((2, 3)) if pooled is None else pooled).square().sum()
            results.append((x.detach(), torch.autograd.grad(loss, inputs)))
    (x, gradients), (expected, wanted) = results
    assert torch.equal(x, expected)
    for gradient, each in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("apart", [True, False], ids=["by expert", "whole"])
def test_a_layer_s_end_is_its_parts_in_turn(apart, summed, normed, training, kernels):
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(8).train(training)
        nn.init.normal_(norm.weight)
        y, shortcut, c = batch(0).requires_grad_(), batch(1).requires_grad_(), batch(2)
        other = shortcut if summed else None
        with kernels():
            if ours:
                parts = tuple(y[index].contiguous(memory_format=LAST) for index in MEMBERS) if apart else (y * 1,)
                layer = Grouped(parts, MEMBERS if apart else ())
                x = norm_act(layer, norm if normed else None, Act(), other, pool=True).x
            else:
                x = Act()(norm(y) if normed else y, other)
            inputs = [y, *([shortcut] if summed else []), *(norm.parameters() if normed else [])]
            gradients = torch.autograd.grad((x * c).sum(), inputs)
        results.append((x.detach(), norm.running_mean, norm.running_var, norm.num_batches_tracked, *gradients))
    for each, expected in zip(*results, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_who_listens_to_the_rectifier_hears_the_whole_batch(kernels):
    act, seen = Act(), []
    act.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    y = batch(0)
    layer = Grouped(tuple(y[index].contiguous(memory_format=LAST) for index in MEMBERS), MEMBERS)
    with kernels():
        x = norm_act(layer, None, act).x
    assert torch.equal(seen[0], y) and torch.equal(x, y.relu())

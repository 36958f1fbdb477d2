"""The batch norm with a fast pass for fixed statistics is PyTorch's batch norm."""

import pytest
import torch
from torch import nn

from advmoe.models.norm import BatchNorm2d

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def pair(*, learning):
    """(ours, PyTorch's) with the same arbitrary weights and statistics; parameters want gradients if `learning`."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
        ours.running_mean.normal_()
        ours.running_var.uniform_(1e-4, 2)
    theirs.load_state_dict(ours.state_dict())
    return ours.requires_grad_(learning), theirs.requires_grad_(learning)


def passed(norm, x, layout, weight):
    x = x.contiguous(memory_format=FORMATS[layout]).detach().requires_grad_()
    y = norm(x)
    (y * weight).sum().backward()
    return y, x.grad


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (1, 5, 7, 7), (3, 5, 1, 1), (2, 5, 1, 4)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("learning", [False, True])
def test_eval_mode_agrees_in_outputs_and_gradients(learning, layout, shape):
    ours, theirs = pair(learning=learning)
    x, weight = torch.randn(shape), torch.randn(shape)
    (y, gradient), (expected, expected_gradient) = (passed(n.eval(), x, layout, weight) for n in (ours, theirs))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)
    assert y.stride() == expected.stride()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (not learning)
        if learning:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


def is_fast(norm, x):
    return "_Affine" in type(norm(x.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_one_learning_parameter_gets_its_gradient(learns):
    ours, theirs = pair(learning=False)
    x, weight = torch.randn(4, 5, 6, 3), torch.randn(4, 5, 6, 3)
    gradients = []
    for norm in (ours.eval(), theirs.eval()):
        getattr(norm, learns).requires_grad_()
        passed(norm, x, "nhwc", weight)
        gradients.append(getattr(norm, learns).grad)
    torch.testing.assert_close(*gradients)


def test_the_fast_pass_is_taken_only_where_nothing_is_learnt():
    x = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    norm = pair(learning=False)[0]
    assert is_fast(norm.eval(), x)
    assert not is_fast(norm.train(), x)
    assert not is_fast(norm.eval(), torch.randn(2, 5, 4, 4))
    assert not is_fast(norm.requires_grad_(True).eval(), x)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_train_mode_normalises_by_the_batch_and_updates_statistics(layout, learning):
    ours, theirs = pair(learning=learning)
    before = ours.running_mean.clone()
    x, weight = torch.randn(4, 5, 6, 3), torch.randn(4, 5, 6, 3)
    (y, gradient), (expected, expected_gradient) = (passed(n.train(), x, layout, weight) for n in (ours, theirs))
    assert torch.equal(y, expected) and torch.equal(gradient, expected_gradient)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.running_mean, 0.9 * before + 0.1 * x.mean((0, 2, 3)))


def test_half_precision_goes_the_ordinary_way():
    ours, theirs = (norm.eval() for norm in pair(learning=False))
    x = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last).bfloat16()
    assert ours(x).dtype == torch.bfloat16
    assert torch.equal(ours(x), theirs(x))

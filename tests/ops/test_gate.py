"""A choice's probability, the gradient that it gets, and the mixture of all choices: by hand and by definition."""

import math

import pytest
import torch

from advmoe.ops import chosen_probability, mix, straight_through

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def test_straight_through_by_hand():
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    gate = torch.tensor([0.9, 0.2], requires_grad=True)
    c = torch.tensor([[0.5, -1.0], [2.0, 0.25]])  # L = <c, output>, so dL/dy = c
    output = straight_through(y, gate)
    assert torch.equal(output, y)
    (output * c).sum().backward()
    assert torch.equal(y.grad, c)
    # <c, y> per sample: 0.5 - 2 = -1.5 and 6 + 1 = 7, whatever the gate's own value.
    assert gate.grad.tolist() == [-1.5, 7.0]


@pytest.mark.parametrize("grad_layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("y_layout", ["nchw", "nhwc"])
def test_straight_through_in_any_memory_format(y_layout, grad_layout):
    y = torch.rand(7, 3, 4, 2).contiguous(memory_format=FORMATS[y_layout]).requires_grad_()
    gate = torch.rand(7, requires_grad=True)
    c = torch.rand(7, 3, 4, 2).contiguous(memory_format=FORMATS[grad_layout])
    straight_through(y, gate).backward(c)
    torch.testing.assert_close(gate.grad, (c * y).sum((1, 2, 3)).detach())
    reference = torch.rand(7, requires_grad=True)
    (y * (1 + reference - reference.detach()).view(-1, 1, 1, 1)).backward(c)
    torch.testing.assert_close(gate.grad, reference.grad)


def test_the_gate_of_a_half_precision_output_has_its_own_dtype_and_is_rounded_once():
    y, gate = torch.rand(2, 3, 4, 4, dtype=torch.bfloat16), torch.rand(2, requires_grad=True)
    straight_through(y, gate).sum().backward()
    assert gate.grad.dtype == torch.float32
    torch.testing.assert_close(gate.grad, y.float().sum((1, 2, 3)), rtol=2**-8, atol=0)


def test_the_probability_of_a_choice_by_hand(kernels):
    # softmax of (log 1, log 3) is (1/4, 3/4); p has gradient p (1[i = k] - softmax_i) in score i.
    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], requires_grad=True)
    with kernels():
        p = chosen_probability(scores, torch.tensor([0, 1]))
        (p * torch.tensor([1.0, 2.0])).sum().backward()
    torch.testing.assert_close(p.detach(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(scores.grad, torch.tensor([[3 / 16, -3 / 16], [-2 * 3 / 16, 2 * 3 / 16]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_by_hand(kernels, dtype):
    every = torch.empty(1, 2, 8, 1, 1, dtype=dtype)
    every[0, 0], every[0, 1] = 2.0, 10.0
    every = every.requires_grad_()
    weights = torch.tensor([[0.75, 0.25]], dtype=dtype, requires_grad=True)
    with kernels():
        y = mix(every, weights)
        y.sum().backward()
    assert y.dtype == dtype and y.flatten().tolist() == [4.0] * 8  # 3/4 of 2 and 1/4 of 10
    assert every.grad[0, 0].unique().item() == 0.75 and every.grad[0, 1].unique().item() == 0.25
    assert weights.grad.tolist() == [[16.0, 80.0]]  # the sum of the 8 numbers that each made


def test_a_mixture_of_tokens(kernels):
    every, weights = torch.rand(3, 2, 5, 4), torch.rand(3, 2)
    with kernels():
        y = mix(every, weights)
    torch.testing.assert_close(y, torch.einsum("netc,ne->ntc", every, weights))

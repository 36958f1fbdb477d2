"""A batch norm whose statistics are fixed: a scale and a shift, by hand and against PyTorch's."""

import pytest
import torch
from torch import nn

from advmoe.ops import fixed_norm


def test_a_scale_and_a_shift_by_hand():
    norm = nn.BatchNorm2d(2, eps=0.0).eval()
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    norm.weight.data, norm.bias.data = torch.tensor([3.0, 2.0]), torch.tensor([0.5, -1.0])
    x = torch.tensor([5.0, 2.0]).view(1, 2, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = fixed_norm(norm, x)
    y.sum().backward()
    assert y.flatten().tolist() == [6.5, 3.0]  # 3 (5 - 1) / 2 + 1/2, and 2 * 2 - 1
    assert x.grad.flatten().tolist() == [1.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_it_is_pytorch_s_batch_norm(layout, dtype):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).to(dtype)
    norm(torch.rand(16, 5, 3, 4, dtype=dtype))
    norm.eval().requires_grad_(False)
    x = torch.rand(3, 5, 4, 2, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    c = torch.rand(3, 5, 4, 2, dtype=dtype)
    ours, theirs = fixed_norm(norm, x), nn.functional.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
    torch.testing.assert_close(ours, theirs)
    assert ours.is_contiguous(memory_format=layout)
    gradients = (torch.autograd.grad((y * c).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(*gradients)

"""What the kernels' tests share: batches, closeness, gradients of all that a kernel makes, a router."""

import pytest
import torch
from torch import nn

from advmoe.ops import raw
from advmoe.ops.raw import Parts

LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16)
kernels = pytest.mark.skipif(not raw.available(), reason=f"no kernels: {raw.missing()}")
tiles = pytest.mark.skipif(
    not raw.Packed.suits(torch.ones(32, 32, 1, 1, dtype=torch.bfloat16), 1), reason="a CPU without tiles"
)
PRECISIONS = [torch.float32, pytest.param(torch.bfloat16, marks=tiles)]


def batch(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).contiguous(memory_format=LAST)


def assert_close(actual, expected, dtype=torch.float32):
    """Equal but for the rounding of `dtype`, as a share of the largest entry."""
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    atol = rounding * max(1e-6, expected.abs().max().item())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def in_parts(y):
    members = (torch.tensor([3, 0]), torch.tensor([1, 2]))
    return Parts(tuple(y[index].contiguous(memory_format=LAST) for index in members), members)


def some_gradients(x, rectified, pool):
    """Gradients of all that a kernel makes of a rectified tensor, and what of PyTorch's `rectified` has them."""
    g, branch = batch(*x.shape, dtype=x.dtype, seed=2), batch(*x.shape, dtype=x.dtype, seed=4)
    m = batch(*x.shape[:2], 1, 1, seed=3)[:, :, 0, 0].contiguous() if pool else None
    total = (rectified.double() * (g.double() + branch.double())).sum()
    if pool:
        total = total + (rectified.double().mean((2, 3)) * m).sum()
    return raw.Gradients(g, branch, m), total


def router(channels, experts):
    torch.manual_seed(0)
    norm, hidden, last = nn.BatchNorm1d(channels), nn.Linear(channels, 11), nn.Linear(11, experts)
    for each in (norm.running_mean, norm.bias.data):
        nn.init.normal_(each)
    for each in (norm.running_var, norm.weight.data):
        nn.init.uniform_(each, 0.5, 2)
    parts = nn.Sequential(norm, hidden, nn.ReLU(), last).eval().requires_grad_(False)
    return raw.Scorer(norm, hidden, last), parts

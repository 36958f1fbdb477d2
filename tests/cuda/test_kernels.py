"""Kernels in Triton on a CUDA device, against PyTorch on the same."""

import pytest
import torch
from torch.nn import functional as F

from advmoe.ops import routed
from advmoe.precision import full_fp32


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=["fp32", "fp16", "bf16"],
)
def test_a_routed_convolution_and_its_gradients(dtype, tolerance, kernel, gpu_kernels, exact):
    if exact and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter knows no bf16")
    torch.manual_seed(0)
    n, channels, size = (4, 5, 5) if exact else (128, 96, 15)  # what an interpreter can do
    x = torch.randn(n, channels, size, size, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    filters = (torch.randn(3, 2 * channels, channels, kernel, kernel, device="cuda") / channels).to(dtype)
    choice = torch.randint(0, 2, (n,), device="cuda")  # the last expert has no image
    x, filters = x.requires_grad_(), filters.requires_grad_()
    with full_fp32():
        y = routed(x, None, choice, (filters,), (2, 2), (kernel // 2, kernel // 2)).merged()
        every = F.conv2d(x, filters.flatten(0, 1), None, 2, kernel // 2).unflatten(1, (3, -1))
        expected = every[torch.arange(n, device="cuda"), choice]
        grad = torch.randn_like(expected)
        for got, wanted in zip(
            (y, *torch.autograd.grad(y, (x, filters), grad)),
            (expected, *torch.autograd.grad(expected, (x, filters), grad)),
            strict=True,
        ):
            error = (got.double() - wanted.double()).norm() / wanted.double().norm()
            assert error.item() < tolerance

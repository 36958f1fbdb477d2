"""Kernels in Triton on a CUDA device, against PyTorch on the same."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from advmoe.moe import MoEConv2d, MoEMLP, route
from advmoe.ops import routed
from advmoe.precision import full_fp32


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "flags", "tolerance"),
    [
        (torch.float32, full_fp32, 1e-5), (torch.float32, nullcontext, 3e-3),  # TF32, as in training
        (torch.float16, nullcontext, 2e-3), (torch.bfloat16, nullcontext, 2e-2),
    ],
    ids=["fp32", "tf32", "fp16", "bf16"],
)  # fmt: skip
def test_a_routed_convolution_and_its_gradients(dtype, flags, tolerance, kernel, gpu_kernels, exact):
    if exact and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter knows no bf16")
    torch.manual_seed(0)
    n, channels, size = (4, 5, 5) if exact else (128, 96, 15)  # what an interpreter can do
    x = torch.randn(n, channels, size, size, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    filters = (torch.randn(3, 2 * channels, channels, kernel, kernel, device="cuda") / channels).to(dtype)
    choice = torch.randint(0, 2, (n,), device="cuda")  # the last expert has no image
    x, filters = x.requires_grad_(), filters.requires_grad_()
    with flags():
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


def product(a, b, *, offs):
    """`F.grouped_mm` as a GPU computes it, and the CPU does not: without a look at the ends `offs` of the groups."""
    row = torch.arange(len(a), device=a.device)
    return torch.einsum("rk,ekn->ern", a, b)[(row[:, None] >= offs).sum(1), row]


@pytest.mark.parametrize(("kind", "otherwise"), [("MLP", 1), ("pixels", 0)])  # so few are multiplied one by one
def test_products_sorted_by_expert_wait_for_no_choice(kind, otherwise, pretended, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", product)
    torch.manual_seed(0)
    rows = {"bank_rows": 32, "num_experts": 2, "layer": 0}
    layer = MoEMLP(8, 16, **rows) if kind == "MLP" else MoEConv2d(8, 16, 1, **rows)
    layer, shape = layer.to("cuda", torch.bfloat16), (6, 5, 8) if kind == "MLP" else (6, 8, 3, 5)
    layer.router.float()
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if kind == "pixels":
        x = x.contiguous(memory_format=torch.channels_last)
    with pretended.counting() as counts:
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert counts.waited == 0
    layer, x = layer.double(), x.double()
    with pretended.counting() as counts:
        layer(x)
    assert counts.waited == otherwise


@pytest.mark.parametrize("kind", ["MLP", "pixels"])
def test_products_of_a_gpu_agree_with_every_experts(kind, exact):
    """An expert without samples among them, whose gradient is 0."""
    if exact:
        pytest.skip("products in bf16 are a real GPU's")
    torch.manual_seed(0)
    rest = {"num_experts": 3, "layer": 0}
    layer = MoEMLP(64, 128, bank_rows=384, **rest) if kind == "MLP" else MoEConv2d(64, 64, 1, bank_rows=192, **rest)
    layer = layer.to("cuda")
    shape = (32, 5, 64) if kind == "MLP" else (32, 64, 3, 5)
    x, forced, results = torch.randn(shape, device="cuda"), 2 * torch.randint(0, 2, (32, 1), device="cuda"), []
    for mode in ("hard", "masked"):
        layer.zero_grad()
        with route(mode, forced=forced), torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.float().square().mean().backward()
        results.append({"y": y.detach().float()} | {name: p.grad for name, p in layer.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=3e-2, atol=1e-3)

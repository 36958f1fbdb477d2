"""Kernels over activations against PyTorch's operations, on shapes that fill vector units and shapes that do not."""

import pytest
import torch
from kernel_checks import DTYPES, LAST, assert_close, batch, in_parts, kernels, some_gradients
from torch.nn import functional as F

from advmoe.ops import raw
from advmoe.ops.raw import Parts

pytestmark = kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 20, 24, 40, 96])
def test_a_pool_is_the_mean_over_pixels_in_fp32(dtype, channels):
    x = batch(5, channels, 7, 3, dtype=dtype)
    pooled = raw.pooled(x)
    assert pooled.dtype == torch.float32
    assert_close(pooled, x.double().mean((2, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [1, 15, 64, 200])
def test_products_are_inner_products(dtype, row):
    a, b = batch(6, row, 1, 1, dtype=dtype), batch(6, row, 1, 1, dtype=dtype, seed=1)
    assert_close(raw.products(a, b), (a.double() * b.double()).flatten(1).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64, 120])
def test_a_rectified_sum_and_its_gradient(dtype, pool, summed, channels):
    y = batch(4, channels, 5, 2, dtype=dtype)
    shortcut = batch(4, channels, 5, 2, dtype=dtype, seed=1) if summed else None
    expected = y.clone().requires_grad_()
    rectified = (expected if shortcut is None else expected + shortcut).relu()
    x = y.clone()
    _, mean = raw.rectify(Parts((x,)), shortcut, pool=pool, out=x)
    assert torch.equal(x, rectified)
    apart = in_parts(y)
    again, same = raw.rectify(apart, shortcut, pool=pool)
    assert torch.equal(again, x) and (mean is None or torch.equal(mean, same))
    gradients, total = some_gradients(x, rectified, pool)
    if pool:
        assert_close(mean, x.double().mean((2, 3)))
    (back,) = raw.unrectify(x, gradients, Parts((torch.empty_like(x),)))
    for part, index in zip(raw.unrectify(x, gradients, apart.like()), apart.members, strict=True):
        assert torch.equal(part, back[index])
    (wanted,) = torch.autograd.grad(total, expected)
    assert_close(back, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("channels", [8, 24, 64])
def test_a_batch_norm_and_its_rectifier(dtype, pool, summed, channels):
    exact = (3 * batch(4, channels, 5, 2) + 20).to(dtype)  # far from 0, as squares alone would not do
    weight, bias = batch(channels, 1, 1, 1).flatten() + 1, batch(channels, 1, 1, 1, seed=1).flatten()
    shortcut = batch(4, channels, 5, 2, dtype=dtype, seed=1) if summed else None
    inputs = [each.double().requires_grad_() for each in (exact, weight, bias, *([shortcut] if summed else []))]
    normed = F.batch_norm(inputs[0], None, None, *inputs[1:3], training=True)
    rectified = (normed + inputs[3] if summed else normed).relu()
    for y in (Parts((exact,)), in_parts(exact)):
        made = raw.norm_rectify(y, weight, bias, 1e-5, shortcut, pool=pool)
        assert_close(made.x, rectified.detach(), dtype)
        assert_close(made.mean, exact.double().mean((0, 2, 3)))
        assert_close(made.variance, exact.double().var((0, 2, 3), correction=0))
        if pool:
            assert_close(made.pooled, made.x.double().mean((2, 3)))
        # Where rounding has decided what is above 0, the gradient follows.
        gradients, total = some_gradients(made.x, rectified * (made.x > 0), pool)
        dy, *others = raw.unnorm_rectify(y, made, weight, 1e-5, gradients, shortcut=summed)
        wanted = torch.autograd.grad(total, inputs, retain_graph=True)
        for part, index in zip(dy, y.members or (slice(None),), strict=True):
            assert_close(part, wanted[0][index], dtype)
        for found, each in zip(others, wanted[1:], strict=False):
            assert_close(found, each, dtype)
        assert summed or others[2] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_rectified_as_by_pytorch(dtype):
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-40, 3.4e38])
    y = odd.to(dtype).view(1, 8, 1, 1).contiguous(memory_format=LAST)
    x = y.clone()
    raw.rectify(Parts((x,)), None, pool=False, out=x)
    # A CPU's own instructions for bf16 may take what is below the smallest normal number for 0.
    flushed = dtype == torch.bfloat16 and x.flatten()[5] == 0
    expected = torch.where(y.abs() < 1e-38, 0, y) if flushed else y
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(x.nan_to_num(), expected.relu().nan_to_num())
    (back,) = raw.unrectify(x, raw.Gradients(torch.ones_like(x)), Parts((torch.empty_like(x),)))
    assert back.flatten().tolist() == [1, 1, 0, 0, 0, 0 if flushed else 1, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_in_order_with_their_products(dtype):
    x = batch(7, 5, 3, 2, dtype=dtype)
    members = (torch.tensor([1, 3, 6]), torch.tensor([0, 2, 4, 5]))
    parts = [batch(len(m), 5, 3, 2, dtype=dtype, seed=9 + i) for i, m in enumerate(members)]
    out, products = raw.unsplit(Parts(tuple(parts), members), x)
    for part, index in zip(parts, members, strict=True):
        assert torch.equal(out[index], part)
    assert_close(products, (out.double() * x.double()).flatten(1).sum(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("channels", [8, 16, 24, 120])
def test_a_mixture_and_its_gradients(dtype, experts, channels):
    every = batch(5, experts * channels, 4, 3, dtype=dtype)
    weights = batch(5, experts, 1, 1, seed=1).flatten(1).contiguous()
    exact, shares = every.double().requires_grad_(), weights.double().requires_grad_()
    expected = (exact.unflatten(1, (experts, channels)) * shares.view(5, experts, 1, 1, 1)).sum(1)
    assert raw.mixes(every, experts) and not raw.mixes(every.contiguous(), experts)
    assert not raw.mixes(every[:, 4:].contiguous(memory_format=LAST), experts)
    y = raw.mixed(every, weights)
    assert y.is_contiguous(memory_format=LAST) and y.dtype == dtype
    assert_close(y, expected.detach(), dtype)
    g = batch(*y.shape, dtype=dtype, seed=2)
    wanted = torch.autograd.grad(expected, (exact, shares), g.double())
    for ours, theirs in zip(raw.unmixed(g, every, weights), wanted, strict=True):
        assert_close(ours, theirs, dtype)

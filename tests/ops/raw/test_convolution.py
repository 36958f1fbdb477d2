"""The convolution kernels against PyTorch's: each sample by its expert, with its rectifier, and a layer as a whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import LAST, PRECISIONS, assert_close, batch, kernels, router, some_gradients, tiles
from torch import nn
from torch.nn import functional as F

from advmoe.ops import raw
from advmoe.ops.raw import Parts, build

pytestmark = kernels
sides = st.integers(1, 9)
pairs = st.tuples


def convolved(x, filters, bias, choice, stride, padding):
    """Each sample by its expert's filters, in fp64."""
    each = [
        F.conv2d(
            x[i : i + 1].double(), filters[e].double(), None if bias is None else bias[e].double(), stride, padding
        )
        for i, e in enumerate(choice.tolist())
    ]
    return torch.cat(each)


def assert_convolves(x, filters, bias, choice, stride, padding):
    """The kernels' convolution of these and both its gradients are those in fp64, but for the rounding of results."""
    x, dtype = x.detach().requires_grad_(), x.dtype
    expected = convolved(x, filters, bias, choice, stride, padding)
    made = raw.Packed.of(filters, bias, stride, padding)
    y = made.convolve(x.detach(), choice)
    assert y.is_contiguous(memory_format=LAST) and y.dtype == dtype and y.shape == made.made_of(x.shape)
    assert_close(y, expected.detach(), dtype)
    grad = batch(*y.shape, seed=1, dtype=dtype)
    (wanted,) = torch.autograd.grad(expected, x, grad.double())
    dx, products = made.backward(grad, x.detach(), choice, products=True)
    assert_close(dx, wanted, dtype)
    terms = (dx.double() * x.detach()).flatten(1)
    assert bool(((products - terms.sum(1)).abs() <= 1e-5 * terms.abs().sum(1) + 1e-6).all())  # terms may cancel
    assert made.backward(grad, x.detach(), choice, products=False)[1] is None


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 5), c_in=st.integers(1, 20), c_out=st.integers(1, 40), experts=st.integers(1, 3),
    size=pairs(sides, sides), kernel=pairs(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs(st.integers(1, 3), st.integers(1, 3)), padding=pairs(st.integers(0, 4), st.integers(0, 4)),
    biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_each_sample_is_convolved_by_its_expert(n, c_in, c_out, experts, size, kernel, stride, padding, biased, seed):
    kernel = tuple(min(k, side + 2 * p) for k, side, p in zip(kernel, size, padding, strict=True))
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(experts, c_out, c_in, *kernel, generator=generator)
    bias = torch.randn(experts, c_out, generator=generator) if biased else None
    choice = torch.randint(experts, (n,), generator=generator)
    assert_convolves(batch(n, c_in, *size, seed=seed), filters, bias, choice, stride, padding)


@tiles
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 9), c_in=st.sampled_from([3, 24, 32, 64]), c_out=st.sampled_from([5, 16, 32, 48, 64]),
    experts=st.integers(1, 3),
    size=pairs(st.sampled_from([1, 2, 4, 7, 8, 16, 17]), st.sampled_from([1, 4, 8, 13, 16, 32])),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 4), (1, 3)]), stride=pairs(st.integers(1, 3), st.integers(1, 3)),
    padding=pairs(st.integers(0, 2), st.integers(0, 2)), biased=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_tiles_convolve_each_sample_by_its_expert(n, c_in, c_out, experts, size, kernel, stride, padding, biased, seed):
    kernel = tuple(min(k, side + 2 * p) for k, side, p in zip(kernel, size, padding, strict=True))
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(experts, c_out, c_in, *kernel, generator=generator).bfloat16()
    bias = torch.randn(experts, c_out, generator=generator).bfloat16() if biased else None
    choice = torch.randint(experts, (n,), generator=generator)
    assert_convolves(batch(n, c_in, *size, seed=seed, dtype=torch.bfloat16), filters, bias, choice, stride, padding)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(("pool", "summed"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_rectified_convolution_is_its_parts(dtype, pool, summed, stride, size):
    x, choice = batch(6, 32, size, size, dtype=dtype), torch.tensor([0, 1, 1, 0, 2, 1])
    filters, bias = (
        batch(3 * 64, 32, 3, 3, dtype=dtype).view(3, 64, 32, 3, 3),
        batch(3, 64, 1, 1, dtype=dtype)[:, :, 0, 0],
    )
    made = raw.Packed.of(filters, bias, (stride, stride), (1, 1))
    shortcut = batch(*made.made_of(x.shape), dtype=dtype, seed=2) if summed else None
    y, pooled = made.rectified(x, choice, shortcut, pool=pool)
    alone = made.convolve(x, choice)
    expected, mean = raw.rectify(Parts((alone,)), shortcut, pool=pool, out=alone)
    assert torch.equal(y, expected) and (torch.equal(pooled, mean) if pool else pooled is None)
    gradients, _ = some_gradients(y, y, pool)
    dx, products, kept = made.unrectified(y, gradients, x, choice, products=True, shortcut=summed)
    (back,) = raw.unrectify(y, gradients, Parts((torch.empty_like(y),)))
    wanted, dots = made.backward(back, x, choice, products=True)
    assert torch.equal(dx, wanted) and torch.equal(products, dots)
    assert torch.equal(kept, back) if summed else kept is None


@pytest.mark.parametrize(
    ("dtype", "channels", "size"),
    [(torch.float32, c, 6) for c in (8, 16, 32, 48)]
    + [pytest.param(torch.bfloat16, 32, size, marks=tiles) for size in (4, 6, 8, 16)],
)
def test_a_sample_is_computed_alike_alone_and_among_others(dtype, channels, size):
    x, choice = batch(9, channels, size, size, dtype=dtype), torch.arange(9) % 2
    filters = batch(2 * channels, channels, 3, 3, dtype=dtype).view(2, channels, channels, 3, 3)
    made = raw.Packed.of(filters, None, (1, 1), (1, 1))
    together = made.convolve(x, choice)
    back, _ = made.backward(together, x, choice, products=False)
    for i in range(9):
        one = slice(i, i + 1)
        alone = made.convolve(x[one].contiguous(memory_format=LAST), choice[one])
        assert torch.equal(alone, together[one])
        assert torch.equal(made.backward(alone, x[one], choice[one], products=False)[0], back[one])


def test_an_expert_that_is_not_there_is_refused():
    made = raw.Packed.of(torch.ones(2, 4, 3, 1, 1), None, (1, 1), (0, 0))
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=r"forced must hold experts from 0 to 1, got \[0, "):
            made.convolve(batch(2, 3, 2, 2), torch.tensor([0, wrong]))


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (3, 3, 3), (2, 3, 1, 5)])
def test_images_that_do_not_fit_the_filters_are_refused(shape):
    made = raw.Packed.of(torch.ones(1, 4, 3, 3, 3), None, (1, 1), (0, 0))
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\), with its padding no smaller than the kernel of 3"):
        made.convolve(torch.ones(shape), torch.zeros(2, dtype=torch.long))


def test_large_filters_and_other_precisions_are_left_to_pytorch():
    assert raw.Packed.suits(torch.ones(256, 128, 3, 3), 2)
    assert not raw.Packed.suits(torch.ones(256, 256, 3, 3), 1)
    assert not raw.Packed.suits(torch.ones(64, 32, 3, 3, dtype=torch.float16), 2)
    assert not raw.Packed.suits(torch.ones(4, 4, 3, 3, device="meta"), 1)
    narrow = ((8, 32), (32, 16), (96, 32))  # of two experts; where there are no tiles, wide ones too
    assert not any(raw.Packed.suits(torch.ones(*each, 3, 3, dtype=torch.bfloat16), 2) for each in narrow)
    with raw.without_kernels():
        assert not raw.Packed.suits(torch.ones(4, 4, 3, 3), 1)


def test_tiles_are_used_where_a_cpu_has_them():
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "amx_bf16" not in cpu.read_text():
        pytest.skip("a CPU without tiles")
    asked = [*build._compiler(), "-march=native", "-dM", "-E", "-xc++", os.devnull]
    if "__AMX_BF16__" not in subprocess.run(asked, capture_output=True, text=True, check=True).stdout:
        pytest.skip("a compiler that does not know them")
    assert raw.Packed.suits(torch.ones(64, 32, 3, 3, dtype=torch.bfloat16), 2)


def test_bf16_filters_are_refused_where_there_are_no_tiles():
    # In a process of its own: nobody has asked for tiles there yet.
    code = """if True:
        import os, torch
        from advmoe.ops import raw
        filters = torch.ones(1, 32, 32, 1, 1, dtype=torch.bfloat16)
        x = torch.ones(3, 32, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for switch in ("0", "1"):
            os.environ["ADVMOE_NATIVE"] = switch
            raw.build.built.cache_clear()
            try:
                y = raw.Packed.of(filters, None, (1, 1), (0, 0)).convolve(x, torch.zeros(3, dtype=torch.long))
                print(y.unique().tolist())
            except ValueError as error:
                print(error)
    """
    without, there = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    refusal = "filters must be fp32 on this CPU, which has no tiles, got bf16"
    assert without == refusal and there in ("[32.0]", refusal)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_whole_layer_is_its_parts(dtype, summed, stride):
    scorer, parts = router(32, 3)
    x = batch(9, 32, 6, 6, dtype=dtype).relu()
    filters, bias = (
        batch(3 * 16, 32, 3, 3, dtype=dtype).view(3, 16, 32, 3, 3),
        batch(3, 16, 1, 1, dtype=dtype)[:, :, 0, 0],
    )
    fixed = raw.Packed.of(filters, bias, (stride, stride), (1, 1))
    pooled = raw.pooled(x)
    scorer.norm.running_mean, scorer.norm.running_var = pooled.mean(0), pooled.var(0)
    shortcut = batch(9, 16, 6 // stride, 6 // stride, seed=2, dtype=dtype) if summed else None
    made = raw.whole_layer(scorer, pooled, fixed, x, shortcut, pool=True)
    assert_close(made.scores, parts(pooled))
    assert torch.equal(made.choice, made.scores.argmax(1)) and len(made.choice.unique()) > 1
    y = fixed.convolve(x, made.choice)
    y, after = raw.rectify(Parts((y,)), shortcut, pool=True, out=y)
    assert torch.equal(made.y, y) and torch.equal(made.pooled, after)
    with pytest.raises(ValueError, match=r"shortcut must be \(9, 16, "):
        raw.whole_layer(scorer, pooled, fixed, x, batch(9, 16, 1, 1, dtype=dtype), pool=True)


def test_scores_that_are_equal_or_no_numbers_choose_as_pytorch_does():
    scorer, _ = router(8, 3)
    nn.init.zeros_(scorer.last.weight)
    x = batch(4, 8, 2, 2)
    fixed = raw.Packed.of(torch.ones(3, 8, 8, 1, 1), None, (1, 1), (0, 0))
    nan = float("nan")
    for biases in ([1, 1, 1], [0, 2, 2], [nan, 9, 9], [0, 9, nan], [0, nan, nan], [float("inf"), nan, 0]):
        scorer.last.bias.data = torch.tensor(biases, dtype=torch.float32)
        made = raw.whole_layer(scorer, raw.pooled(x), fixed, x, None, pool=False)
        assert made.pooled is None
        assert made.choice.tolist() == [torch.tensor(biases).argmax().item()] * 4

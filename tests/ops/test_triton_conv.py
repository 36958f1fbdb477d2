"""Kernels in Triton, in its interpreter, against PyTorch over random shapes; and compiled for GPUs."""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F


def case(seed):
    """A random convolution of images by their experts', with all that may be done to its result."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    n, ci, co, experts = draw.randint(1, 6), draw.randint(1, 20), draw.randint(1, 20), draw.randint(1, 4)
    kernel = draw.choice([(1, 1), (3, 3), (3, 3), (2, 3)])
    stride, padding = draw.choice([(1, 1), (2, 2), (2, 3)]), draw.choice([(0, 0), (1, 1), (1, 2)])
    h, w = (draw.randint(max(1, k - 2 * p), 9) for k, p in zip(kernel, padding, strict=True))

    def normal(*shape, last=True):
        return torch.randn(*shape, generator=generator).contiguous(
            memory_format=torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        )

    x, filters, biases = normal(n, ci, h, w), normal(experts, co, ci, *kernel), normal(experts, co)
    choice = torch.randint(0, experts, (n,), generator=generator)
    own = [F.conv2d(x[i : i + 1], filters[e], biases[e], stride, padding) for i, e in enumerate(choice.tolist())]
    return x, filters, biases, choice, (stride, padding), normal(*torch.cat(own).shape)


def reference(x, filters, biases, choice, geometry):
    """Each image by its expert's filters, by PyTorch."""
    each = enumerate(choice.tolist())
    return torch.cat([F.conv2d(x[i : i + 1], filters[e], biases[e], *geometry) for i, e in each])


@pytest.fixture(params=[16, 64], ids="tiles of {}".format)
def kernels(request, launched, monkeypatch):
    """The module, with tiles of so few rows that images have several, and experts' pixels are shared by programs."""
    from advmoe.ops import triton_conv

    monkeypatch.setattr(triton_conv, "ROWS", request.param)
    return triton_conv


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("n", [1, 7, 1025])
def test_samples_are_sorted_by_expert(n, experts, launched):
    from advmoe.ops.triton_conv import sort

    choice = torch.randint(0, experts, (n,), generator=torch.Generator().manual_seed(n))
    choice[choice == 1] = 0  # the second expert has none
    order, starts = sort(choice, experts)
    assert torch.equal(order, choice.argsort(stable=True).int())
    counts = torch.bincount(choice, minlength=experts).tolist()
    assert starts.tolist() == [sum(counts[:e]) for e in range(experts + 1)]


@pytest.mark.parametrize("seed", range(3))
def test_a_convolution_and_its_gradients_are_pytorch_s(seed, kernels):
    seed = 10 * seed + kernels.ROWS % 10
    x, filters, biases, choice, geometry, grad = case(seed)
    leaves = [each.requires_grad_() for each in (x, filters, biases)]
    expected = reference(*leaves, choice, geometry)
    dx, dw, db = torch.autograd.grad(expected, leaves, grad)
    x, filters, biases = (each.detach() for each in leaves)
    samples, geometry = kernels.sort(choice, len(filters)), kernels.Geometry(*geometry)
    y, pooled = kernels.convolve(x, filters, samples, geometry, kernels.Finish(biases))
    assert pooled is None and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(kernels.unconvolve(grad, filters, samples, geometry, tuple(x.shape[2:])), dx)
    got = kernels.filter_gradients(x, grad, samples, geometry, list(filters.shape[3:]))
    torch.testing.assert_close(got[0], dw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], db, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [2, 5])
def test_what_follows_a_convolution_is_done_with_it(seed, kernels):
    x, filters, biases, choice, geometry, shortcut = case(seed)
    x[0, 0, 0, 0] = torch.nan  # which a rectifier leaves, as PyTorch's does
    expected = (reference(x, filters, biases, choice, geometry) + shortcut).relu()
    samples, geometry = kernels.sort(choice, len(filters)), kernels.Geometry(*geometry)
    finish = kernels.Finish(biases, shortcut, rectify=True, pool=True)
    y, pooled = kernels.convolve(x, filters, samples, geometry, finish)
    torch.testing.assert_close(y, expected, equal_nan=True)
    torch.testing.assert_close(pooled, expected.mean((2, 3)), equal_nan=True)
    assert expected.isnan().any() and not expected.isnan().all()


def test_an_expert_without_samples_has_no_gradient_and_pixels_are_shared_out(launched, monkeypatch):
    from advmoe.ops import triton_conv as kernels

    monkeypatch.setattr(kernels, "ROWS", 16)
    x, grad = (torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2))
    samples = kernels.sort(torch.tensor([0, 2, 2, 0, 2, 2]), 3)
    shares = []
    monkeypatch.setattr(
        kernels, "_launch", lambda *a, launch=kernels._launch, **k: (shares.append(k["SHARES"]), launch(*a, **k))
    )
    dw, db = kernels.filter_gradients(x, grad, samples, kernels.Geometry((1, 1), (0, 0)), [1, 1])
    assert shares == [2]  # 384 pixels are 8 steps of 16 for each of 3 experts, and 4 steps are worth a program
    assert dw[1].count_nonzero() == db[1].count_nonzero() == 0
    for e, own in ((0, [0, 3]), (2, [1, 2, 4, 5])):
        products = torch.einsum("nchw,ndhw->dc", x[own], grad[own])
        torch.testing.assert_close(dw[e, :, :, 0, 0], products, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db[e], grad[own].sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_half_precision_sums_up_in_fp32(launched):  # the interpreter takes bf16's bits for whole numbers
    from advmoe.ops import triton_conv as kernels

    x, filters, _, choice, _, _ = case(3)
    x, filters = x.half(), filters.half()
    samples, geometry = kernels.sort(choice, len(filters)), kernels.Geometry((1, 1), (1, 1))
    y, _ = kernels.convolve(x, filters, samples, geometry, kernels.Finish())
    zeros = torch.zeros(filters.shape[:2])
    expected = reference(x.float(), filters.float(), zeros, choice, ((1, 1), (1, 1)))
    torch.testing.assert_close(y, expected.half())


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from advmoe.ops import triton_conv as kernels
constants = dict(
    E=2, KH=3, KW=3, SH=2, SW=2, PH=1, PW=1, PRECISION="ieee", BM=64, BN=64, BK=64, BI=64, BO=64, BP=64, SHARES=2,
    BIAS=True, SHORTCUT=True, RECTIFY=True, POOL=True, BLOCK=128, WI=1,
)
pointers = dict.fromkeys("x w g y dx bias shortcut".split(), "*bf16") | dict.fromkeys(["pool", "dw", "db"], "*fp32")
pointers |= {"choice": "*i64", "order": "*i32", "starts": "*i32"}
for kernel in (kernels._sort, kernels._convolve, kernels._unconvolve, kernels._filter_gradients):
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr"}
    source = ASTSource(kernel, types, {name: constants[name] for name in names if name in constants}, even)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(kernel.fn.__name__, "wgmma.mma_async" in ptx, "cp.async" in ptx)
"""


@pytest.mark.usefixtures("launched")  # where `make triton` runs
def test_the_kernels_compile_for_gpus_and_use_their_tensor_cores(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "_sort False False", "_convolve True True", "_unconvolve True True", "_filter_gradients True True",
    ]  # fmt: skip

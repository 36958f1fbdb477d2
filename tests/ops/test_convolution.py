"""Convolutions by filters that do not learn, and the pixels of strided ones: as PyTorch computes them."""

import pytest
import torch
from torch.nn import functional as F

from advmoe.ops import convolved, fixed_convolution, kept_pixels, pack, without_kernels, worth_packing

LAST = torch.channels_last
CHOICE = torch.tensor([1, 0, 0, 2])


def case(rows=None):
    """Images, filters and biases of three experts, and what each image's own expert makes of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=generator).contiguous(memory_format=LAST)
    filters, biases = torch.randn(12, 3, 3, 3, generator=generator), torch.randn(12, generator=generator)
    rows = torch.arange(12).view(3, 4) if rows is None else rows
    own = [
        F.conv2d(x[i : i + 1], filters[rows[e]], biases[rows[e]], (2, 1), (1, 1)) for i, e in enumerate(CHOICE.tolist())
    ]
    return x, filters, biases, torch.cat(own)


def packed(*arguments, **options):
    filters = pack(*arguments, **options)
    return pytest.skip("no kernels") if filters is None else filters


@pytest.mark.parametrize("overlapping", [False, True])
def test_each_image_is_convolved_by_its_expert(overlapping):
    rows = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 10, 11]]) if overlapping else None
    x, filters, biases, expected = case(rows)
    fixed = packed(filters, biases, (2, 1), (1, 1), experts=3, rows=rows)
    torch.testing.assert_close(convolved(x, None, CHOICE, fixed).merged(), expected)


def test_the_gradients_of_the_images_and_of_the_gate():
    x, filters, biases, expected = case()
    x, gate = x.requires_grad_(), torch.rand(4, requires_grad=True)
    c = torch.rand_like(expected)
    y = convolved(x, gate, CHOICE, packed(filters, biases, (2, 1), (1, 1), experts=3)).merged()
    torch.testing.assert_close(y, expected)  # the gate changes nothing
    dx, dgate = torch.autograd.grad((y * c).sum(), (x, gate))
    per_image = [
        F.conv2d(x[i : i + 1], filters[4 * e : 4 * e + 4], biases[4 * e : 4 * e + 4], (2, 1), (1, 1))
        for i, e in enumerate(CHOICE.tolist())
    ]
    (wanted,) = torch.autograd.grad((torch.cat(per_image) * c).sum(), x)
    torch.testing.assert_close(dx, wanted)
    torch.testing.assert_close(dgate, (wanted * x).sum((1, 2, 3)).detach())  # <dL/dx, x>


def test_one_expert_for_all():
    x, filters, biases, _ = case()
    fixed = packed(filters, biases, (1, 1), (0, 0))
    torch.testing.assert_close(fixed_convolution(x, fixed), F.conv2d(x, filters, biases))
    assert fixed_convolution(x.double(), fixed) is None and fixed_convolution(x, None) is None


def test_what_no_kernel_computes_is_left_to_pytorch():
    x, filters, _, _ = case()
    fixed = packed(filters, None, (1, 1), (0, 0), experts=3)
    assert convolved(x[:1], None, CHOICE[:1], fixed) is None  # one sample alone
    assert convolved(x.double(), None, CHOICE, fixed) is None
    assert convolved(x, None, CHOICE, None) is None
    with without_kernels():
        assert convolved(x, None, CHOICE, fixed) is None and pack(filters, None, (1, 1), (0, 0)) is None


def test_filters_are_packed_for_one_pass_only_where_many_images_follow():
    filters = torch.rand(12, 3, 3, 3)
    packed(filters, None, (1, 1), (1, 1), experts=3)
    few, many = (torch.rand(n, 3, 5, 5).contiguous(memory_format=LAST) for n in (2, 64))
    assert pack(filters, None, (1, 1), (1, 1), experts=3, once=few) is None
    assert pack(filters, None, (1, 1), (1, 1), experts=3, once=many) is not None
    assert not worth_packing(filters, many, 3)  # with gradients
    with torch.no_grad():
        assert worth_packing(filters, many, 3) and not worth_packing(filters, few, 3)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
def test_the_pixels_of_a_stride_and_their_gradient(stride, layout):
    x = torch.rand(2, 3, 5, 7).contiguous(memory_format=layout).requires_grad_()
    y = kept_pixels(x, stride)
    expected = x[..., :: stride[0], :: stride[1]]
    assert torch.equal(y, expected)
    c = torch.rand_like(y)
    ours, theirs = (torch.autograd.grad((each * c).sum(), x)[0] for each in (y, expected))
    assert torch.equal(ours, theirs)


def test_the_pixels_of_a_stride_have_second_derivatives():
    x = torch.rand(1, 2, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda each: kept_pixels(each, (2, 2)).pow(3), x)

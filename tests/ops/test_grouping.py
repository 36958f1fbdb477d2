"""Samples to their experts and back: indexing, whatever the memory format and precision, and its gradient."""

import pytest
import torch

from advmoe.ops import Grouped, merge, split

FORMATS = {"flat": None, "nchw": torch.contiguous_format, "nhwc": torch.channels_last}

MEMBERS = (torch.tensor([1, 3, 6]), torch.tensor([2]), torch.tensor([0, 4, 5]))
TWO = (torch.tensor([1, 3, 6]), torch.tensor([0, 2, 4, 5]))


def batch(layout, *, channels=3):
    torch.manual_seed(0)
    if layout == "flat":
        return torch.rand(7, 5)
    return torch.rand(7, channels, 4, 2).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("layout", FORMATS)
def test_split_and_merge_are_indexing(layout):
    x = batch(layout)
    parts = split(x, MEMBERS)
    for part, members in zip(parts, MEMBERS, strict=True):
        assert torch.equal(part, x[members])
    merged = merge(parts, MEMBERS)
    assert torch.equal(merged, x)
    if layout == "nhwc":
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (*parts, merged))


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_are_those_of_indexing(layout):
    factors = [torch.rand(len(m), *batch(layout).shape[1:]) for m in MEMBERS]
    weight = torch.rand_like(batch(layout))
    fast, plain = batch(layout).requires_grad_(), batch(layout).requires_grad_()
    scaled = tuple(p * f for p, f in zip(split(fast, MEMBERS), factors, strict=True))
    (merge(scaled, MEMBERS) * weight).sum().backward()
    out = torch.zeros_like(plain)
    for members, factor in zip(MEMBERS, factors, strict=True):
        out = out.index_copy(0, members, plain[members] * factor)
    (out * weight).sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("row", [1, 5, 8, 24])  # rows of whole units of 16 bytes, and others
def test_rows_of_any_length_and_precision_come_back(row, dtype):
    x = torch.rand(7, row).to(dtype)
    first, second = split(x, TWO)
    shifted = torch.cat((torch.zeros(1, dtype=dtype), second.flatten()))[1:].view_as(second)  # off those units
    assert torch.equal(merge((first, second), TWO), x)
    assert torch.equal(merge((first, shifted), TWO), x)


@pytest.mark.parametrize("layout", FORMATS)
def test_what_was_merged_may_be_changed_in_place(layout):
    x = batch(layout).requires_grad_()
    merged = merge(split(x, MEMBERS), MEMBERS)
    merged += 1
    merged.mul_(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_parts_of_different_memory_formats_merge():
    x = batch("nhwc")
    first, second = split(x, TWO)
    assert torch.equal(merge((first, second.contiguous()), TWO), x)
    assert torch.equal(merge((first.contiguous(), second), TWO), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_expert_whose_output_goes_unused_gives_zero_gradient(channels):
    x = batch("nhwc", channels=channels).requires_grad_()
    split(x, TWO)[1].sum().backward()
    expected = torch.tensor([1.0, 0, 1, 0, 1, 1, 0]).view(7, 1, 1, 1).expand_as(x)
    assert torch.equal(x.grad, expected)


def test_one_part_that_has_all_the_samples_is_not_moved():
    x = batch("nhwc")
    (part,) = split(x, ())
    assert part is x and merge((x,), ()) is x and Grouped((x,)).merged() is x


def test_no_samples_at_all():
    x, nobody = torch.rand(0, 3, 6, 6), (torch.empty(0).long(),) * 2
    assert merge(split(x, nobody), nobody).shape == x.shape


@pytest.mark.parametrize("layout", FORMATS)
def test_a_gate_ahead_gets_each_sample_s_product_with_its_gradient(layout, kernels):
    x, gate = batch(layout).requires_grad_(), torch.rand(7, requires_grad=True)
    c = 2 * batch(layout) - 1
    with kernels():
        y = Grouped(split(x, MEMBERS, gate), MEMBERS).merged()
        assert torch.equal(y, x)
        (y * c).sum().backward()
    assert torch.equal(x.grad, c)
    torch.testing.assert_close(gate.grad, (c * x.detach()).flatten(1).sum(1))

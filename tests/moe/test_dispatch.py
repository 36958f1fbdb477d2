"""Sending samples to experts and back, and the gate's straight-through gradient."""

import pytest
import torch

from advmoe.moe import MoEConv2d, route
from advmoe.moe.dispatch import Plan
from advmoe.ops import merge, split, straight_through

FORMATS = {"flat": None, "nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def batch(layout, *, channels=3):
    torch.manual_seed(0)
    if layout == "flat":
        return torch.rand(7, 5)
    return torch.rand(7, channels, 4, 2).contiguous(memory_format=FORMATS[layout])


def test_plan_groups_in_order_and_leaves_out_idle_experts():
    plan = Plan.of(torch.tensor([3, 0, 3, 0, 0]), num_experts=4)
    assert plan.experts == (0, 3)
    assert [members.tolist() for members in plan.members] == [[1, 3, 4], [0, 2]]
    assert Plan.of(torch.tensor([2, 2]), 4).experts == (2,)
    assert Plan.of(torch.tensor([1]), 4).experts == (1,)


@pytest.mark.parametrize("layout", FORMATS)
def test_split_and_merge_are_indexing(layout):
    x, plan = batch(layout), Plan.of(torch.tensor([2, 0, 1, 0, 2, 2, 0]), 3)
    parts = split(x, plan.members)
    for part, members in zip(parts, plan.members, strict=True):
        assert torch.equal(part, x[members])
    merged = merge(parts, plan.members)
    assert torch.equal(merged, x)
    if layout == "nhwc":
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (*parts, merged))


@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_are_those_of_indexing(layout):
    plan = Plan.of(torch.tensor([2, 0, 1, 0, 2, 2, 0]), 3)
    factors = [torch.rand(len(m), *batch(layout).shape[1:]) for m in plan.members]
    weight = torch.rand_like(batch(layout))
    fast, plain = batch(layout).requires_grad_(), batch(layout).requires_grad_()
    made = tuple(p * f for p, f in zip(split(fast, plan.members), factors, strict=True))
    (merge(made, plan.members) * weight).sum().backward()
    out = torch.zeros_like(plain)
    for members, factor in zip(plan.members, factors, strict=True):
        out = out.index_copy(0, members, plain[members] * factor)
    (out * weight).sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("row", [1, 5, 8, 24])  # rows of whole units of 16 bytes, and others
def test_rows_of_any_length_and_precision_come_back(row, dtype):
    x, plan = torch.rand(7, row).to(dtype), Plan.of(torch.tensor([1, 0, 1, 0, 1, 1, 0]), 2)
    first, second = split(x, plan.members)
    shifted = torch.cat((torch.zeros(1, dtype=dtype), second.flatten()))[1:].view_as(second)  # off those units
    assert torch.equal(merge((first, second), plan.members), x)
    assert torch.equal(merge((first, shifted), plan.members), x)


@pytest.mark.parametrize("layout", FORMATS)
def test_what_was_merged_may_be_changed_in_place(layout):
    x, plan = batch(layout).requires_grad_(), Plan.of(torch.tensor([2, 0, 1, 0, 2, 2, 0]), 3)
    merged = merge(split(x, plan.members), plan.members)
    merged += 1
    merged.mul_(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_parts_of_different_memory_formats_merge():
    x, plan = batch("nhwc"), Plan.of(torch.tensor([1, 0, 1, 0, 1, 1, 0]), 2)
    first, second = split(x, plan.members)
    assert torch.equal(merge((first, second.contiguous()), plan.members), x)
    assert torch.equal(merge((first.contiguous(), second), plan.members), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_expert_whose_output_goes_unused_gives_zero_gradient(channels):
    x, plan = batch("nhwc", channels=channels).requires_grad_(), Plan.of(torch.tensor([1, 0, 1, 0, 1, 1, 0]), 2)
    split(x, plan.members)[1].sum().backward()
    expected = torch.tensor([1.0, 0, 1, 0, 1, 1, 0]).view(7, 1, 1, 1).expand_as(x)
    assert torch.equal(x.grad, expected)


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
    y, gate = batch(y_layout).requires_grad_(), torch.rand(7, requires_grad=True)
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["hard", "soft", "masked"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_batch_without_images_has_a_gradient(kernel, mode, layout):
    layer = MoEConv2d(3, 8, kernel, bank_rows=16, num_experts=2, layer=0, bias=True).eval()
    x = torch.rand(0, 3, 6, 6).to(memory_format=layout).requires_grad_()
    with route(mode):
        y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 8, 7 - kernel, 7 - kernel) and x.grad.shape == x.shape and not layer.bank.grad.any()
    members = (torch.empty(0).long(),) * 2
    assert merge(split(x, members), members).shape == x.shape

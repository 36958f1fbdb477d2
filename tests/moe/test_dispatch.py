"""Which samples go to which expert, and a layer without samples."""

import pytest
import torch

from advmoe.moe import MoEConv2d, route
from advmoe.moe.dispatch import Plan


def test_plan_groups_in_order_and_leaves_out_idle_experts():
    plan = Plan.of(torch.tensor([3, 0, 3, 0, 0]), num_experts=4)
    assert plan.experts == (0, 3)
    assert [members.tolist() for members in plan.members] == [[1, 3, 4], [0, 2]]
    assert Plan.of(torch.tensor([2, 2]), 4).experts == (2,)
    assert Plan.of(torch.tensor([1]), 4).experts == (1,)


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

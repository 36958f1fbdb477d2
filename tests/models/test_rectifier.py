"""ReLU of a residual sum: by hand, what it overwrites, and the mean that it leaves for the next router."""

import pytest
import torch

from advmoe.models import fused
from advmoe.models.rectifier import Rectifier, registered
from advmoe.moe.routing import active_routing, forward_scope
from advmoe.ops import Rectified, raw

LAST = torch.channels_last
needs_kernels = pytest.mark.skipif(not raw.available(), reason=f"no kernels: {raw.missing()}")


def pooled_before(x):
    return active_routing().pooled(x)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_a_rectified_sum_by_hand(layout):
    y = torch.tensor([-3.0, -1.0, 2.0, 5.0]).view(1, 4, 1, 1).expand(2, 4, 2, 2).contiguous(memory_format=layout)
    shortcut = torch.tensor([4.0, -2.0, 1.0, -9.0]).view(1, 4, 1, 1).expand(2, 4, 2, 2).contiguous(memory_format=layout)
    with torch.no_grad():
        assert Rectifier()(y.clone(), shortcut)[1, :, 0, 1].tolist() == [1.0, 0.0, 3.0, 0.0]
        x = Rectifier()(y)
    assert x[0, :, 1, 0].tolist() == [0.0, 0.0, 2.0, 5.0]
    assert x.data_ptr() == y.data_ptr()  # in place


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_it_is_pytorch_s_own(layout):
    torch.manual_seed(0)
    y, shortcut, weights = (torch.randn(2, 8, 3, 3).contiguous(memory_format=layout) for _ in range(3))
    results = []
    for ours in (True, False):
        inputs = [each.clone().requires_grad_() for each in (y, shortcut)]
        x = Rectifier()(inputs[0] * 1, inputs[1]) if ours else (inputs[0] + inputs[1]).relu()
        results.append((x.detach(), *torch.autograd.grad((x * weights).sum(), inputs)))
    for each, expected in zip(*results, strict=True):
        torch.testing.assert_close(each, expected)


@needs_kernels
def test_one_that_pools_leaves_the_mean_for_the_next_router():
    y = torch.full((1, 8, 1, 2), -1.0).contiguous(memory_format=LAST)
    y[..., 1] = 3.0
    with forward_scope(shares=True), torch.no_grad():
        x = Rectifier(pools=True)(y.clone())
        assert pooled_before(x).tolist() == [[1.5] * 8]  # of 0 and 3
        assert pooled_before(Rectifier()(y)) is None
    assert pooled_before(x) is None  # the pass is over


def test_what_comes_with_activations_is_kept_for_the_pass_alone():
    x, pooled = torch.rand(2, 4, 3, 3), torch.rand(2, 4)
    assert registered(Rectified(x, pooled, None)) is x
    assert pooled_before(x) is None
    with forward_scope(shares=True):
        assert registered(Rectified(x, pooled, None)) is x
        assert pooled_before(x) is pooled
        assert registered(Rectified(other := x.clone(), None, None)) is other
        assert pooled_before(other) is None


@needs_kernels
def test_what_was_known_of_a_tensor_that_changed_is_forgotten():
    with forward_scope(shares=True):
        x = Rectifier(pools=True)(torch.randn(2, 8, 3, 3).contiguous(memory_format=LAST))
        torch.testing.assert_close(pooled_before(x), x.mean((2, 3)))
        assert pooled_before(x.clone()) is None
        x += 1
        assert pooled_before(x) is None and fused.fork(x) is x


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_what_a_gradient_needs_is_not_overwritten_unnoticed(layout):
    leaf = torch.randn(2, 8, 3, 3).contiguous(memory_format=layout).requires_grad_()
    y = leaf.exp()  # whose gradient needs it as it is
    with torch.no_grad():
        Rectifier()(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_a_leaf_is_not_overwritten(layout):
    y = torch.randn(2, 8, 3, 3).contiguous(memory_format=layout).requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        Rectifier()(y)

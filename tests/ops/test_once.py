"""Derivatives that there are not are refused, and never left out in silence."""

import pytest
import torch

from advmoe import create_model, route
from advmoe.errors import InputError
from advmoe.ops.once import once


class Cube(torch.autograd.Function):
    """x^3, whose backward pass keeps x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_the_first_derivative_is_had_and_the_second_refused():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (first,) = torch.autograd.grad(Cube.apply(x).sum(), x)
    assert first.tolist() == [12, 27]
    with pytest.raises(InputError, match=r"^a backward pass with create_graph must be made of a pass within "):
        torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_routed_model_s_too(dtype, mode):
    model = create_model("resnet18", num_classes=3, width=8, input_size=8).to(dtype).eval()
    x = torch.rand(4, 3, 8, 8, dtype=dtype).requires_grad_()
    with route(mode):
        logits = model.to(memory_format=torch.channels_last)(x)
    try:
        (first,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
    except InputError as error:
        assert "without_kernels" in str(error)
    else:  # of PyTorch's own operations alone
        assert mode == "soft"
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert second.isfinite().all() and second.abs().max() > 0

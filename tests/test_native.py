"""The public switch of the kernels."""

import torch

from advmoe import create_model
from advmoe.native import without_kernels
from advmoe.ops import kernels_used


def test_inside_pytorch_computes_everything_and_nothing_else_changes():
    before = kernels_used()
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=8, input_size=8).eval().to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        with without_kernels():
            assert kernels_used().startswith("PyTorch (")
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert kernels_used() == before


def test_second_derivatives_are_had_without_kernels():
    model = create_model("vgg16", num_classes=3, width=4, input_size=32, kind="s-dense").eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    with without_kernels():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all() and second.abs().max() > 0

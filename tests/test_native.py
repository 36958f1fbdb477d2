"""The public switch of the kernels."""

import pytest
import torch

from advmoe import create_model, route
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


def second(model, x, mode):
    """A second derivative of the model's logits by pixels, (N, C, H, W)."""
    x = x.clone().requires_grad_()
    with route(mode):
        logits = model(x)
    (first,) = torch.autograd.grad(logits.logsumexp(1).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    ("name", "width", "router"),
    [("resnet18", 8, "layer"), ("resnet18", 8, "image"), ("densenet40", 4, "layer"), ("deit-tiny", 64, "layer")],
)
def test_second_derivatives_are_right_without_kernels(name, width, router, learns):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, width=width, input_size=16, router=router, experts_init="independent")
    model = model.double().eval().requires_grad_(learns).to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with without_kernels():
        torch.testing.assert_close(second(model, x, "hard"), second(model, x, "masked"))
        model, x = model.float(), x.float()
        torch.testing.assert_close(second(model, x, "soft"), second(model.double(), x.double(), "soft").float(),
                                   rtol=1e-3, atol=1e-5)  # fmt: skip

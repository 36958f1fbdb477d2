"""Products by experts' matrices that leave the experts' shares on the device: by the CPU's `F.grouped_mm`."""

import sys
from types import SimpleNamespace

import pytest
import torch

from advmoe.moe import MoEConv2d, MoELinear, MoEMLP, route
from advmoe.ops import sorted_by_expert

module = sys.modules[sorted_by_expert.__module__]
LAYERS = {
    "linear": (lambda **k: MoELinear(8, 16, **k), 16, (6, 8)),
    "tokens": (lambda **k: MoELinear(8, 16, **k), 16, (6, 5, 8)),
    "overlapping": (lambda **k: MoELinear(8, 16, **k), 24, (6, 5, 8)),
    "mlp": (lambda **k: MoEMLP(8, 16, **k), 16, (6, 5, 8)),
    "each token": (lambda **k: MoEMLP(8, 16, per_token=True, **k), 16, (6, 5, 8)),
    "pixels": (lambda **k: MoEConv2d(8, 16, 1, **k), 16, (6, 8, 3, 5)),
}
"""Name -> how a layer is made, rows that three experts share where they overlap or one's own, and its input's shape."""


@pytest.fixture
def products(monkeypatch):
    """The shapes of what `F.grouped_mm` multiplies; the CPU's may be used."""
    monkeypatch.setattr(module, "_without_waiting", lambda x: True)
    shapes, product = [], torch.nn.functional.grouped_mm

    def recorded(a, b, **options):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return product(a, b, **options)

    monkeypatch.setattr(module.F, "grouped_mm", recorded)
    return shapes


def results(layer, x, mode, forced):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with route(mode, forced=forced):
        y = layer(x)
    (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_agrees_with_the_definition_in_its_output_and_all_gradients(name, products):
    make, rows, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make(bank_rows=rows if name == "overlapping" else 3 * rows, num_experts=3, layer=0)
    x, forced = torch.randn(shape), 2 * torch.randint(0, 2, (6, 1, 5) if name == "each token" else (6, 1))  # never 1
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    hard, masked = (results(layer, x, mode, forced) for mode in ("hard", "masked"))
    assert len(products) == (2 if "MLP" in type(layer).__name__ else 1)
    assert hard["router.scores.weight"].count_nonzero() and forced.unique().tolist() == [0, 2]
    torch.testing.assert_close(hard, masked, rtol=1e-4, atol=1e-5)


def test_an_expert_without_samples(products):
    by_expert = sorted_by_expert(torch.ones(4, 8), torch.tensor([2, 0, 2, 0]), 3, 8)
    assert by_expert.order.tolist() == [1, 3, 0, 2] and by_expert.ends.tolist() == [2, 2, 4]
    assert by_expert.expert.tolist() == [0, 0, 2, 2]
    matrices = torch.stack([torch.eye(8), 7 * torch.eye(8), 3 * torch.eye(8)])
    y = by_expert.merge(by_expert.product(by_expert.split(torch.ones(4, 8)), matrices))
    assert y[:, 0].tolist() == [3, 1, 3, 1]


@pytest.mark.parametrize(
    ("capability", "dtype", "used"),
    [
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, False),
        ((9, 0), torch.float32, False),
    ],
)
def test_the_host_would_wait_elsewhere(capability, dtype, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module._without_waiting(SimpleNamespace(device=torch.device("cuda"), dtype=dtype)) is used
    assert not module._without_waiting(torch.ones(2, dtype=dtype))


def test_widths_that_the_product_does_not_take_are_left_to_grouping(products):
    x, choice = torch.ones(2, 8), torch.tensor([0, 1])
    assert sorted_by_expert(x, choice, 2, 8, 6) is None and sorted_by_expert(x, choice, 2, 8, 4) is not None

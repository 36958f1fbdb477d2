"""Convolutions and linear layers by kernels for GPUs, in Triton's interpreter, against PyTorch."""

import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from advmoe.ops import kernels_missing, norm_act, routed, routed_linear, straight_through
from advmoe.ops import routed as function

CHOICE = torch.tensor([1, 0, 0, 1])
module = sys.modules[function.__module__]


def case():
    """Images, a gate, filters and biases of two experts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, generator=generator).contiguous(memory_format=torch.channels_last)
    filters, biases = torch.randn(2, 4, 3, 3, 3, generator=generator), torch.randn(2, 4, generator=generator)
    return [each.requires_grad_() for each in (x, torch.rand(4, generator=generator), filters, biases)]


def reference(x, gate, filters, biases):
    """Each image, `straight_through` its gate, by its expert's filters."""
    x = straight_through(x, gate)
    return torch.cat(
        [F.conv2d(x[i : i + 1], filters[e], biases[e], (2, 1), (1, 1)) for i, e in enumerate(CHOICE.tolist())]
    )


def test_the_output_and_all_gradients(launched):
    leaves = x, gate, *banks = case()
    y = routed(x, gate, CHOICE, tuple(banks), (2, 1), (1, 1)).merged()
    expected = reference(*leaves)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), wanted)
    assert launched == ["sort", "convolve", "unconvolve", "filter_gradients"]


@pytest.mark.parametrize("uses", [(1,), (0, 1, 2)], ids=["its mean alone", "all"])
def test_a_rectified_sum_its_mean_and_second_use(uses, launched):
    leaves = x, gate, *banks = case()
    layer = routed(x, gate, CHOICE, tuple(banks), (2, 1), (1, 1))
    shortcut = torch.randn(layer.shape).requires_grad_()
    outputs = norm_act(layer, None, torch.nn.ReLU(), shortcut, pool=True)
    y = (reference(*leaves) + shortcut).relu()
    expected = y, y.mean((2, 3)), y.clone()
    torch.testing.assert_close(tuple(outputs), expected)
    leaves, loss = [*leaves, shortcut], [torch.randn_like(each) for each in expected]
    got, wanted = (
        torch.autograd.grad([each[i] for i in uses], leaves, [loss[i] for i in uses]) for each in (outputs, expected)
    )
    torch.testing.assert_close(got, wanted)
    assert launched.count("convolve") == 1


def test_what_does_not_learn_costs_nothing(launched):
    x, _, *banks = case()
    y = routed(x, None, CHOICE, tuple(bank.detach() for bank in banks), (1, 1), (1, 1)).merged()
    y.sum().backward()
    assert launched == ["sort", "convolve", "unconvolve"] and x.grad is not None
    del launched[:]
    y = routed(x.detach(), None, CHOICE, tuple(banks), (1, 1), (1, 1)).merged()
    y.sum().backward()
    assert launched == ["sort", "convolve", "filter_gradients"]


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)], ids=["features", "tokens"])
def test_rows_for_features_and_tokens(shape, launched):
    leaves = [torch.randn(*each, requires_grad=True) for each in (shape, (2, 6, 5), (2, 6))]
    x, rows, biases = leaves
    y = routed_linear(x, CHOICE, rows, biases)
    expected = torch.stack([F.linear(x[i], rows[e], biases[e]) for i, e in enumerate(CHOICE.tolist())])
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad))
    turned = routed_linear(x, CHOICE, rows.mT.contiguous().mT)  # whichever axis is the last in memory
    torch.testing.assert_close(turned, expected.detach() - biases[CHOICE].view(4, *[1] * (len(shape) - 2), 6))


def test_what_kernels_do_not_take_is_left_to_pytorch(launched):
    x, gate, filters, biases = case()
    assert routed(x.double(), gate, CHOICE, (filters.double(),)) is None
    assert routed(x, gate, CHOICE, (filters.half(), biases)) is None
    assert routed(x[:0], gate[:0], CHOICE[:0], (filters,)) is None
    assert routed(x[:, :, :2], gate, CHOICE, (filters,)) is None  # PyTorch says what is wrong
    assert routed(x.bfloat16(), gate, CHOICE, (filters.bfloat16(),)) is None  # in the interpreter alone
    layer = routed(x, gate, CHOICE, (filters,))
    assert layer.adds(None) and layer.adds(torch.zeros(4, 4, 3, 4)) and not layer.adds(torch.zeros(4, 1, 3, 4))
    assert launched == []


@pytest.mark.parametrize(
    ("device", "capability", "lacking"),
    [
        ("cpu", None, "a CUDA device, got cpu"),
        ("cuda", (7, 5), "a GPU of compute capability 8.0 or later, got 7.5"),
        ("cuda", (9, 0), None),
    ],
)
def test_where_the_kernels_run(device, capability, lacking, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(module, "_triton", lambda: SimpleNamespace(interpreted=lambda: False))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels_missing.__wrapped__(torch.device(device)) == lacking


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    expected = "the extra triton (pip install 'advmoe[triton]'), got none installed"
    assert kernels_missing.__wrapped__(torch.device("cuda")) == expected

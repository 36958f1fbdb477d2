"""A router's scores and the mean that it begins with, in every mode, and a layer in one pass."""

import pytest
import torch
from torch import nn

from advmoe.ops import global_pool, pack, router_scores, whole_layer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_in_bf16_adds_in_fp32_and_its_gradient_is_the_mean_s(memory_format):
    values = torch.rand(5, 7, 6, 4, generator=torch.Generator().manual_seed(0))
    x = values.bfloat16().contiguous(memory_format=memory_format).requires_grad_()
    pooled = global_pool(x)
    assert pooled.dtype == torch.float32
    exact = x.detach().double().mean((2, 3))
    assert ((pooled - exact).abs() / exact).max() <= 24 * 2**-24  # 24 numbers, each addition rounded to 24 bits
    weights = torch.arange(35.0).view(5, 7)
    (pooled * weights).sum().backward()
    assert torch.equal(x.grad, (weights / 24).bfloat16()[:, :, None, None].expand_as(x))


def test_the_mean_of_tokens_and_of_features():
    tokens = torch.arange(12.0).view(1, 3, 4)
    assert global_pool(tokens).tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert global_pool(tokens.bfloat16()).dtype == torch.float32
    features = torch.rand(2, 4)
    assert torch.equal(global_pool(features), features)


def router(channels):
    """A router's parts with statistics of their own, in eval mode, and the same as modules in turn."""
    torch.manual_seed(0)
    norm, hidden, last = nn.BatchNorm1d(channels), nn.Linear(channels, 8), nn.Linear(8, 3)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return (norm, hidden, last), nn.Sequential(norm, hidden, nn.ReLU(), last).eval()


@pytest.mark.parametrize("known", [False, True], ids=["pooled here", "pooled before"])
@pytest.mark.parametrize(
    ("mode", "n"), [("eval", 1), ("eval", 5), ("frozen", 1), ("frozen", 5), ("learnt", 1), ("learnt", 5), ("train", 5)]
)
def test_scores_are_those_of_the_modules_in_turn(mode, n, known, kernels):
    parts, network = router(6)
    network.train(mode == "train").requires_grad_(mode != "frozen")
    x = torch.rand(n, 6, 4, 3).contiguous(memory_format=torch.channels_last).requires_grad_(mode != "eval")
    with kernels(), torch.set_grad_enabled(mode != "eval"):
        pooled = x.mean((2, 3))
        scores = router_scores(x, pooled if known else None, *parts, training=mode == "train")
        expected = network(pooled)
        torch.testing.assert_close(scores, expected)
        if mode == "eval":
            return
        c = torch.rand(n, 3)
        inputs = [x, *(p for p in network.parameters() if p.requires_grad)]
        ours, theirs = (torch.autograd.grad((each * c).sum(), inputs, retain_graph=True) for each in (scores, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_whole_layers_are_computed_without_gradients_alone():
    parts, network = router(8)
    x = torch.rand(4, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    filters = pack(torch.rand(24, 8, 1, 1), None, (1, 1), (0, 0), experts=3)
    if filters is None:
        pytest.skip("no kernels")
    pooled = x.mean((2, 3))
    assert whole_layer(parts, pooled, filters, x, None, pool=False) is None
    with torch.no_grad():
        layer = whole_layer(parts, pooled, filters, x, None, pool=False)
        choice = network(pooled).argmax(1)
        assert torch.equal(layer.choice, choice)
        by_expert = filters.filters[choice][..., 0, 0]
        torch.testing.assert_close(layer.y, torch.einsum("nchw,noc->nohw", x, by_expert).relu())

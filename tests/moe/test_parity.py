"""The fast path computes what the reference (every expert computed, the chosen one kept) computes: outputs and all gradients."""

import pytest
import torch
from torch.nn import functional as F

from advmoe.models import create_model
from advmoe.moe import route


def _model(**kwargs):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=5, width=8, **kwargs).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(20):  # running statistics that spread the samples over the experts
            model(torch.rand(32, 3, 16, 16))
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer"},
        {"router": "embedding", "experts": "independent"},
        {"router": "image", "num_experts": 3, "scale": 0.5},
        {"router": "layer", "num_experts": 4, "scale": 0.25},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_hard_and_masked_agree_in_outputs_and_gradients(kwargs, training):
    model = _model(**kwargs).double().train(training)
    torch.manual_seed(1)
    x = torch.rand(16, 3, 16, 16, dtype=torch.double).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = torch.randint(0, 5, (16,))
    results = {}
    for mode in ("hard", "masked"):
        model.zero_grad()
        x.grad = None
        with route(mode) as routing:
            logits = model(x)
        F.cross_entropy(logits, y).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results[mode] = (logits.detach(), x.grad, gradients, routing.pathway())
    hard, masked = results["hard"], results["masked"]
    assert torch.equal(hard[3], masked[3])
    assert len(hard[3].unique()) > 1
    torch.testing.assert_close(hard[0], masked[0])
    torch.testing.assert_close(hard[1], masked[1])
    for name, gradient in masked[2].items():
        zero = torch.zeros_like(gradient)
        torch.testing.assert_close(hard[2][name] if hard[2][name] is not None else zero, gradient, msg=name)
    assert any("router" in name and g is not None and g.abs().sum() > 0 for name, g in hard[2].items())

"""Compiled models compute what they computed, with several experts at work."""

import copy

import pytest
import torch

from advmoe.models import BACKBONES, create_model
from advmoe.models.compiled import compile_model
from advmoe.moe import pathway

NAMES = [*(name for name in BACKBONES if name != "resnet34"), "wrn-10-1"]


@pytest.mark.slow
@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_gives_the_same_logits(name, make_images):
    images = make_images(24)
    for seed in range(20):
        torch.manual_seed(seed)
        model = create_model(name, num_classes=5, width=8, input_size=16)
        with torch.no_grad():
            for _ in range(8):
                model(images)
        model.eval().requires_grad_(False)
        if len(pathway(model, images).unique(dim=0)) > 1:
            break
    expected, taken = model(images), pathway(model, images)
    assert len(taken.unique(dim=0)) > 1
    names = list(model.state_dict())
    torch.compiler.reset()
    compiled = compile_model(copy.deepcopy(model))
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    assert counters["unique_graphs"] > before  # something was compiled
    assert torch.equal(pathway(compiled, images), taken)
    assert list(compiled.state_dict()) == names

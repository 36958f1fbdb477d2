"""Interval bounds: what they prove no attack changes, and on a router worked by hand they are exact."""

import pytest
import torch
from torch import nn

from advmoe import create_model, pathway
from advmoe.attacks.routed.flips import changed_choices
from advmoe.evaluation.bounds import bounded, proved_choices
from advmoe.evaluation.scoring import OpenRouting
from advmoe.threat import ThreatModel


@pytest.mark.parametrize("router", ["image", "embedding"])
def test_no_attack_changes_a_proved_choice(router):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=4, input_size=8, router=router).eval().requires_grad_(False)
    nn.init.normal_(model.router.heads.bias, std=0.05)
    x = torch.rand(48, 3, 8, 8)
    eps = next(each / 255 for each in (2, 1, 0.5, 0.2, 0.1, 0.05, 0.02) if proved_choices(model, x, each / 255).any())
    proved = proved_choices(model, x, eps)
    assert bounded(model)
    assert not proved_choices(model, x, 1.0).any()
    threat, before = ThreatModel("linf", eps), pathway(model, x)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        assert not (
            changed_choices(OpenRouting(model), x, threat=threat, sizes=[eps / 3] * 8, generator=generator) & proved
        ).any()
        near = threat.random_start(x, generator)
        assert not ((pathway(model, near) != before).any(1) & proved).any()


def test_a_linear_router_is_bounded_exactly():
    model = create_model(
        "resnet18", num_classes=4, width=4, in_channels=1, input_size=8, router="image", mean=[0.0], std=[1.0]
    ).eval()
    router = model.router
    with torch.no_grad():
        for each in router.embedding:
            if isinstance(each, nn.Conv2d):  # the pixel itself, in the first channel; ReLU leaves it, as it is positive
                each.weight.zero_()
                each.weight[0, 0, 1, 1] = 1
        router.heads.weight.zero_()
        router.heads.bias.copy_(torch.tensor([0.0, -0.5]))
        router.heads.weight[1, 0] = 1
    x = torch.full((1, 1, 8, 8), 0.6)  # 0.1 of brightness above the threshold, but for batch norm's 1e-5
    assert proved_choices(model, x, 0.0995).tolist() == [True]
    assert proved_choices(model, x, 0.1005).tolist() == [False]


def test_what_is_not_bounded():
    assert not bounded(create_model("resnet18", num_classes=4, width=4, input_size=8))
    assert not bounded(lambda x: x)

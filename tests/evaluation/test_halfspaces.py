"""A model's choices as half-spaces: what they say is what the model does."""

import pytest
import torch

from advmoe import create_model, pathway
from advmoe.attacks.routed.regions import distances
from advmoe.evaluation.halfspaces import halfspaces_of


@pytest.mark.parametrize(("router", "channels"), [("fixed-top-bottom", 1), ("linear-2", 3)])
def test_half_spaces_tell_the_pathway(router, channels):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=4, in_channels=channels, input_size=8, router=router).eval()
    x = torch.rand(32, channels, 8, 8)
    space = halfspaces_of(model, x)
    away = distances(space, x)
    clear = (away.abs() > space.slack).all(1)
    assert clear.sum() > 30 and (space.slack < 1e-3).all()
    assert (away > 0).long()[:, space.layers][clear].equal(pathway(model, x)[clear])


def test_other_models_have_none():
    model = create_model("resnet18", num_classes=4, width=4, input_size=8)
    x = torch.rand(1, 3, 8, 8)
    assert halfspaces_of(model, x) is None and halfspaces_of(lambda x: model(x), x) is None

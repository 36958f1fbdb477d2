"""How the inner attack sees the routing: as it is, mixed, or either by image."""

import pytest
import torch

from advmoe.moe.routing import active_routing
from advmoe.training.inner import through


def predict(x):
    """1 for every image where experts are mixed, else 0."""
    return torch.full((len(x),), float(active_routing().mode == "soft"))


def search(model, x, *, labels, held):
    """Images that are what the model says of them, plus their labels."""
    assert held is None and len(labels) == len(x)
    return (model(x) + labels)[:, None, None, None].expand_as(x)


@pytest.mark.parametrize(("routing", "said"), [("straight-through", {0.0}), ("soft", {1.0}), ("mixed", {0.0, 1.0})])
def test_each_image_is_attacked_once_in_the_way_asked_for(routing, said):
    x, labels = torch.zeros(64, 3, 2, 2), torch.arange(64.0) * 10
    x_adv = through(routing, search, predict, x, torch.Generator().manual_seed(0), {"labels": labels, "held": None})
    told = x_adv[:, 0, 0, 0] - labels
    assert x_adv.shape == x.shape and set(told.tolist()) == said
    if routing == "mixed":
        assert 16 < told.sum() < 48

"""Routers by name: where each chooses, and what is built."""

import pytest
import torch

from advmoe.moe.halfspace import HalfspaceRouter
from advmoe.moe.routers import ImageRouter, LayerRouter
from advmoe.tables import ROUTERS


def test_where_each_chooses():
    assert {name: (each.in_layers, each.apart) for name, each in ROUTERS.items()} == {
        "layer": (True, True), "embedding": (False, True), "image": (False, False), "fixed-top": (False, False),
        "fixed-top-bottom": (False, False), "fixed-mean": (False, False), "fixed-late": (False, False),
        "linear": (False, False), "linear-2": (False, False),
    }  # fmt: skip
    for each in ROUTERS.values():  # one of the two, never both
        assert (each.build is None) != (each.layer is None)


@pytest.mark.parametrize(("name", "differ"), [("embedding", True), ("image", False)])
def test_a_router_ahead_scores_for_all_layers(name, differ):
    torch.manual_seed(0)
    router = ROUTERS[name].build(1, 8, 3, 2, pool=1)
    assert isinstance(router, ImageRouter)
    scores = router(torch.rand(4, 1, 8, 8))
    assert [each.shape for each in scores] == [(4, 2)] * 3
    assert scores[0].equal(scores[1]) != differ


@pytest.mark.parametrize("name", [name for name, each in ROUTERS.items() if each.pixels])
def test_a_router_by_half_spaces(name):
    router = ROUTERS[name].build(1, 8, 3, 2, pool=1)
    assert isinstance(router, HalfspaceRouter)
    assert [each.shape for each in router(torch.rand(4, 1, 8, 8))] == [(4, 2)] * 3
    assert bool(list(router.parameters())) == ROUTERS[name].learnt and ROUTERS[name].experts == 2


def test_a_router_in_a_layer_scores_its_input():
    router = ROUTERS["layer"].layer(8, 3)
    assert isinstance(router, LayerRouter) and router(torch.rand(4, 8, 5, 5)).shape == (4, 3)

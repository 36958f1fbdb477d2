"""A mixture that starts from a plain network: it says what that one says whichever way it is routed, and no more is
taken than fits.
"""

import pytest
import torch

from advmoe.models import create_model
from advmoe.models.upcycle import upcycle
from advmoe.moe import MoELayer
from advmoe.moe.routing import route
from advmoe.pruning import compact

KINDS = [
    ("resnet18", {"router": "layer"}), ("resnet50", {"router": "image"}), ("wrn-10-1", {"router": "fixed-top-bottom"}),
    ("vgg16", {"router": "embedding"}), ("densenet40", {"router": "linear"}), ("deit-tiny", {"router": "layer"}),
    ("deit-tiny", {"router": "layer", "route_per": "token"}),
    ("wrn-10-1", {"num_experts": 3, "experts": "independent"}),
]  # fmt: skip


def made(name, kind, seed, width=8, scale=0.5, **more):
    torch.manual_seed(seed)
    width = 16 if name == "deit-tiny" else width
    model = create_model(name, num_classes=4, kind=kind, width=width, scale=scale, input_size=16, **more)
    model(torch.rand(8, 3, 16, 16))  # statistics of its own
    return model.eval()


@pytest.mark.parametrize(("name", "more"), KINDS)
def test_every_pathway_says_what_the_plain_network_says(name, more):
    plain, model, x = made(name, "s-dense", 1), made(name, "moe", 2, **more), torch.rand(6, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        routers = [layer.router for layer in model.modules() if isinstance(layer, MoELayer)] + [model.router]
        states = [{k: v.clone() for k, v in each.state_dict().items()} for each in routers if each is not None]
        upcycle(model, plain)
        assert not torch.allclose(before, model(x), atol=1e-3)
        layers = sum(isinstance(module, MoELayer) for module in model.modules())
        for forced in (None, torch.randint(0, more.get("num_experts", 2), (6, layers))):
            with route(forced=forced):
                assert torch.allclose(model(x), plain(x), atol=1e-5)
    kept = [each.state_dict() for each in routers if each is not None]
    assert all(torch.equal(v, now[k]) for state, now in zip(states, kept, strict=True) for k, v in state.items())


def test_what_masks_leave_of_a_sparse_network_is_a_start_too():
    sparse, model, x = made("resnet18", "sparse", 1), made("resnet18", "moe", 2), torch.rand(4, 3, 16, 16)
    upcycle(model, compact(sparse))
    with torch.no_grad():
        assert torch.allclose(model(x), sparse(x), atol=1e-5)


def test_another_shape_and_experts_that_overlap_are_refused():
    plain = made("resnet18", "s-dense", 1)
    for other in (made("resnet18", "moe", 2, width=16), made("wrn-10-1", "moe", 2)):
        with pytest.raises(RuntimeError, match="must be"):
            upcycle(other, plain)
    with pytest.raises(ValueError, match="experts overlap"):
        upcycle(made("resnet18", "moe", 2, num_experts=3), plain)

"""Who listens to a module, and to a part of a network."""

import pytest
from torch import nn

from advmoe.ops import heard, listened


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "before forward", "backward", "before backward"],
)
def test_every_kind_of_hook_is_noticed_until_it_is_removed(register):
    inner = nn.ReLU()
    network = nn.Sequential(nn.Sequential(inner), nn.Flatten())
    assert not listened(inner) and not heard(network)
    handle = register(inner)
    assert listened(inner) and not listened(network) and heard(network)
    handle.remove()
    assert not listened(inner) and not heard(network)


def test_a_hook_on_all_modules_is_heard_everywhere():
    network = nn.Sequential(nn.ReLU())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert heard(network) and listened(network)
    finally:
        handle.remove()
    assert not heard(network)


def test_a_part_that_is_none_is_passed_over():
    network = nn.Module()
    network.register_module("absent", None)
    assert not heard(network)


def test_a_forward_that_was_replaced_is_listened_to():
    inner = nn.ReLU()
    network = nn.Sequential(inner)
    inner.forward = lambda x: -x
    assert listened(inner) and heard(network) and not listened(network)
    del inner.forward
    assert not heard(network)


def test_a_part_of_somebody_else_s_may_hold_what_it_sees():
    class Keeps(nn.Sequential):
        pass

    assert heard(nn.Sequential(Keeps(nn.ReLU()))) and not listened(Keeps())

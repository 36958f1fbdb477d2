"""Backbones by name, and Wide ResNets by their numbers."""

import pytest
import torch

from advmoe.config import ModelConfig
from advmoe.errors import InputError
from advmoe.models import create_model
from advmoe.models.layers import LayerFactory
from advmoe.models.wide_resnet import WideResNet
from advmoe.moe.routing import pathway
from advmoe.tables import BACKBONES


def test_a_wide_resnet_is_known_by_its_numbers():
    assert BACKBONES.find("wrn-40-4").width == 64 and BACKBONES.find("wrn-40-4").label == "WRN-40-4"


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-4-1", "wrn-28-0", "wrn-1006-1", "wrn-10-101"])
def test_a_wide_resnet_has_a_depth_and_a_width(name):
    with pytest.raises(InputError, match=rf"^model.name wrn-D-K must have D = 6n \+ 4 .* K >= 1 .*got '{name}'$"):
        BACKBONES.find(name)


@pytest.mark.parametrize(
    "name", ["wrn", "wrn-28", "wrn-28-10-1", "wrn--28-10", "wrn-\u0661\u0660-1", "wrn-1000000000000-1"]
)
def test_what_is_spelt_otherwise_is_no_wide_resnet(name):
    with pytest.raises(InputError, match=r"^model.name must be one of resnet18, .*wrn-D-K"):
        BACKBONES.find(name)


def test_a_family_s_entry_builds_what_its_numbers_say():
    entry = BACKBONES.find("wrn-16-2")
    net = entry.build(LayerFactory(ModelConfig(kind="dense")), width=8, in_channels=1, num_classes=3, input_size=8)
    assert isinstance(net, WideResNet) and len(net.blocks) == 3 * 2 and entry.width == 16 * 2


@pytest.mark.parametrize("name", [*BACKBONES, "wrn-10-2", "wrn-16-2"])
def test_the_number_of_moe_layers_is_that_of_the_network(name):
    model = create_model(name, num_classes=3, width=32 if "tiny" in name else 8, input_size=16).eval()
    assert pathway(model, torch.rand(1, 3, 16, 16)).shape == (1, BACKBONES.find(name).moe_layers)

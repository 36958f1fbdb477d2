"""Masks as a static pathway, in the MoE form's layers."""

import json

import pytest
import torch

from advmoe.evaluation.overlap import iou, read_masks, require_same_banks, units_of
from advmoe.models import create_model
from advmoe.models.sparse import scores_of
from advmoe.moe import MoELayer
from advmoe.pruning import masks, write_masks

SETTINGS = {"num_classes": 3, "width": 6, "input_size": 16}


def pruned(name, **kwargs):
    torch.manual_seed(0)
    model = create_model(name, kind="sparse", **{**SETTINGS, **kwargs})
    with torch.no_grad():
        for score in scores_of(model):
            score.uniform_()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn-10-2", "vgg16", "densenet40"])
def test_one_mask_for_each_layer_of_the_moe_form(tmp_path, name):
    # What would be no MoE of its own (copies of experts that overlap) says nothing about the masks.
    model = pruned(name, num_experts=3, experts_init="shared", experts="independent", router="image")
    routed = create_model(name, **SETTINGS)
    write_masks(model, tmp_path)
    units, others = read_masks(tmp_path / "masks.json"), units_of(routed)
    require_same_banks("masks", others, units)
    assert [int(mask.sum()) for mask in units] == [int(unit[0].sum()) for unit in others]
    # The rows kept of a layer are those that its own scores keep.
    slices = model.backbone.layout.slices(model.backbone.surviving_channels())
    layers = {m.layer: path for path, m in routed.backbone.named_modules() if isinstance(m, MoELayer)}
    found = json.loads((tmp_path / "masks.json").read_text())["layers"]
    assert found == masks(model)
    assert [each["rows"] for each in found] == [slices[layers[index]][0].tolist() for index in range(len(found))]


def test_the_masks_of_a_stream_are_one():
    found = masks(pruned("resnet18"))
    assert found[1]["rows"] == found[3]["rows"] != found[0]["rows"]
    assert [each["of"] for each in found] == 4 * [6] + 4 * [12] + 4 * [24] + 4 * [48]


def test_the_first_channels_are_the_first_expert():
    model = pruned("resnet18")
    with torch.no_grad():
        for score in scores_of(model):
            score.copy_(torch.arange(len(score), 0, -1))
    mask = [torch.zeros(1, each["of"], dtype=torch.bool) for each in masks(model)]
    for unit, each in zip(mask, masks(model), strict=True):
        unit[0, each["rows"]] = True
    pathways = torch.tensor([16 * [0], 16 * [1], 8 * [0] + 8 * [1]])
    shared = iou(pathways, torch.zeros(3, 16, dtype=torch.long), units_of(create_model("resnet18", **SETTINGS)), mask)
    # Half of 4 * (6 + 12 + 24 + 48) units; the last pathway shares those of the first two stages alone.
    assert shared.tolist() == pytest.approx([1, 0, 36 / (180 + 180 - 36)])


def test_other_kinds_have_no_masks():
    with pytest.raises(ValueError, match=r"^model.kind must be sparse, got 'moe'$"):
        masks(create_model("resnet18", **SETTINGS))

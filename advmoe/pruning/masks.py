"""A sparse model's masks as a static pathway, layer by layer as an MoE-CNN of the same backbone has its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from advmoe.files import write_text
from advmoe.models import Classifier, create_model
from advmoe.moe import MoELayer
from advmoe.pruning.compaction import sparse_backbone
from advmoe.rundir import MASKS


def masks(model: Classifier) -> list[dict[str, Any]]:
    """The output channels that a sparse model keeps of each layer that is an MoE layer in the MoE form of its backbone,
    in a pathway's order: {"layer": index, "of": channels of the Dense layer, "rows": those that survive}.

    Raises `ValueError` for a model of another kind.
    """
    masked = sparse_backbone(model)
    plain = {"kind": "moe", "router": "layer", "experts": "subset", "num_experts": 1, "experts_init": "independent"}
    with torch.device("meta"):
        routed = create_model(**{**model.spec, **plain})
    layers = {name: layer for name, layer in routed.backbone.named_modules() if isinstance(layer, MoELayer)}
    slices, surviving = masked.layout.slices(masked.surviving_channels()), list[dict[str, Any]]()
    for name, layer in sorted(layers.items(), key=lambda item: item[1].layer):
        rows, _ = slices[name]
        assert rows is not None, "an MoE layer's channels are of a group"
        surviving.append({"layer": layer.layer, "of": layer.bank_rows, "rows": rows.tolist()})
    return surviving


def write_masks(model: Classifier, folder: Path) -> None:
    """Write `masks.json`, whole or not at all: what `evaluation.overlap.read_masks` reads."""
    write_text(folder / MASKS, json.dumps({"layers": masks(model)}) + "\n")

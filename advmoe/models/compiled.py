"""`torch.compile` for a model with MoE layers."""

from __future__ import annotations

import torch

from advmoe.models.classifier import Classifier
from advmoe.moe.layer import MoELayer

_RECOMPILES = 64
"""Blocks share their code, which is compiled anew for each shape and each mode (attack, loss, measurement)."""


def compile_model(model: Classifier) -> Classifier:
    """Have `torch.compile` speed up `model`'s backbone, in train and eval mode, from its next pass on; returns `model`.

    MoE layers run as they are, between compiled pieces: they group samples by a choice that they read on the host,
    which a compiled graph cannot. State dicts, modules and parameters keep their names.
    """
    torch._dynamo.config.recompile_limit = max(_RECOMPILES, torch._dynamo.config.recompile_limit)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]
    model.backbone.compile()
    return model

"""Small models, warmed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from advmoe.evaluation.images import random_images
from advmoe.models import Classifier, create_model
from advmoe.moe import pathway

SIDE = 16


@pytest.fixture(scope="session")
def _models() -> dict[str, Classifier]:
    return {}


@pytest.fixture
def warmed(shallow_backbones: None, _models: dict[str, Classifier]) -> Callable[..., Classifier]:
    """Makes small models of shallow backbones in eval mode (5 classes, 16x16 pixels), whose routers (if any) send
    `random_images` several ways.
    """

    def warm(seed: int, name: str, settings: dict[str, Any]) -> Classifier:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = create_model(name, **settings)
            for _ in range(8):
                model(random_images((settings["in_channels"], SIDE, SIDE)))
        return model.eval()

    def several(model: Classifier) -> bool:
        images = random_images((model.spec["in_channels"], SIDE, SIDE))[:24]
        return not model.routed or len(pathway(model, images).flatten(1).unique(dim=0)) > 1

    def make(name: str = "resnet18", **kwargs: Any) -> Classifier:
        settings = {"num_classes": 5, "width": 8, "input_size": SIDE, "in_channels": 3, **kwargs}
        key = f"{name} {sorted(settings.items())}"
        if key not in _models:
            _models[key] = next(m for m in (warm(seed, name, settings) for seed in range(20)) if several(m))
        return copy.deepcopy(_models[key])

    return make

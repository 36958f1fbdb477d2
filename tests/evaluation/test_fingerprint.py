"""An evaluation continues only where all that its numbers depend on is the same."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from advmoe.config import AttackConfig
from advmoe.data import ImageSet
from advmoe.evaluation.checks import Check
from advmoe.evaluation.fingerprint import fingerprint
from advmoe.evaluation.harness import Job
from advmoe.evaluation.suite import Setting
from advmoe.threat import ThreatModel

CPU = torch.device("cpu")
CHANGES = {
    "attacks": {"names": ["pgd-4"]},
    "batch_size": {"batch_size": 2},
    "seed": {"seed": 1},
    "threat": {"threat": ThreatModel("linf", 1 / 255)},
    "attack": {"attack": AttackConfig(restarts=2)},
    "data": {"labels": [1, 0]},
    "model": {"model": nn.Linear(4, 2, bias=False)},
}


def told(model=None, labels=(0, 1), checks=(), names=("pgd-3",), **changes):
    """The fingerprint of a job on two images, with `changes` to its settings."""
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    settings = {"threat": ThreatModel(), "attack": AttackConfig(), "batch_size": 1, "seed": 0, **changes}
    setting = Setting(threat=settings.pop("threat"), attack=settings.pop("attack"), routed=False)
    job = Job(data=ImageSet(images, torch.tensor(labels)), setting=setting, **settings)
    if model is None:
        model = nn.Linear(4, 2)
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
    return fingerprint(model, job, names, CPU, checks)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_shows_under_its_name_alone(name):
    before, after = told(), told(**CHANGES[name])
    assert before == told() == json.loads(json.dumps(before))
    assert {key for key in before if before[key] != after[key]} == {name}


def test_pixels_count():
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    setting = Setting(threat=ThreatModel(), attack=AttackConfig(), routed=False)
    job = Job(data=(images, labels), setting=setting, batch_size=1, seed=0)
    shifted = replace(job, data=(images.flip(0), labels))
    model = nn.Linear(4, 2)
    assert (
        fingerprint(model, job, ["pgd-3"], CPU, [])["data"] != fingerprint(model, shifted, ["pgd-3"], CPU, [])["data"]
    )


def test_a_callable_is_known_by_its_answers_where_they_repeat():
    def ones(x):
        return torch.eye(2)[torch.ones(len(x), dtype=torch.long)]

    def zeros(x):
        return torch.eye(2)[torch.zeros(len(x), dtype=torch.long)]

    assert told(ones)["model"] == told(ones)["model"] != told(zeros)["model"]
    random = Check("deterministic", False, 1.0, "logits differ")
    assert told(ones, checks=[random])["model"] is None

"""A model's choices as half-spaces: what they say is what the model does."""

import pytest
import torch

from advmoe import create_model, pathway
from advmoe.attacks.routed import Combination, RoutedPlan
from advmoe.attacks.routed.regions import distances
from advmoe.config import AttackConfig
from advmoe.evaluation.halfspaces import halfspaces_of
from advmoe.evaluation.outcomes import Measurement, make_job
from advmoe.evaluation.suite import build
from advmoe.models import Classifier
from advmoe.threat import ThreatModel


@pytest.mark.parametrize(("router", "channels"), [("fixed-top-bottom", 1), ("linear-2", 3)])
def test_half_spaces_tell_the_pathway(router, channels):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=4, in_channels=channels, input_size=8, router=router).eval()
    x = torch.rand(32, channels, 8, 8)
    space = halfspaces_of(model, x)
    away = distances(space, x)
    clear = (away.abs() > space.slack).all(1)
    assert clear.sum() > 30 and (space.slack < 1e-3).all()
    assert (away > 0).long()[:, space.layers][clear].equal(pathway(model, x)[clear])


def test_other_models_have_none():
    model = create_model("resnet18", num_classes=4, width=4, input_size=8)
    x = torch.rand(1, 3, 8, 8)
    assert halfspaces_of(model, x) is None and halfspaces_of(lambda x: model(x), x) is None


class Shifted(Classifier):
    def forward(self, x):
        return super().forward(1 - x)


def test_a_model_that_may_do_something_else_has_none():
    model, x = (
        create_model("resnet18", num_classes=4, width=4, input_size=8, router="fixed-top"),
        torch.rand(1, 3, 8, 8),
    )
    assert halfspaces_of(model, x) is not None
    for module in (model, model.router):
        handle = module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
        assert halfspaces_of(model, x) is None
        handle.remove()
    assert halfspaces_of(model, x) is not None
    assert halfspaces_of(Shifted(model.normalize, model.backbone, model.router, model.spec), x) is None


@pytest.mark.parametrize(("router", "complete"), [("fixed-top", True), ("image", False)])
def test_routed_says_where_it_is_complete_in_the_routing(router, complete):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=4, in_channels=1, input_size=8, router=router).eval()
    data = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    measurement = Measurement(threat=ThreatModel(), attack=AttackConfig(queries=0), attacks=["routed"])
    job, (name,) = make_job(model, data, measurement, torch.device("cpu"))
    attack = build(name, model, job.setting, RoutedPlan(Combination(), (), 0, 0, ()))
    assert (attack.settings.get("routing") == "complete") == complete
    assert ({"own region", "other regions"} <= {part.name for part in attack.parts}) == complete

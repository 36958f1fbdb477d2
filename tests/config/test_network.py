"""The model's fields: what they demand of one another, and what a description of a model holds."""

import pytest

from advmoe import extend
from advmoe.config import Config, ModelConfig
from advmoe.models import create_model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_norm": "instance"}, "model.router_norm must be one of batch, layer, none, got 'instance'"),
        (
            {"router_norm": "layer", "source": "net.py:make"},
            "model.source must be left out when model.router_norm is layer, got 'net.py:make'",
        ),
        (
            {"router_norm": "none", "router": "theirs"},
            "model.router must be layer or embedding or image when model.router_norm is none, got 'theirs'",
        ),
    ],
)
def test_errors_name_field_rule_and_value(nothing_stays_registered, fields, message):
    extend.register_router("theirs", in_layers=True)(lambda channels, num_experts, *, per_token=False: None)
    with pytest.raises(ValueError) as caught:
        ModelConfig(**fields)
    assert str(caught.value) == message


def test_descriptions_of_models_say_nothing_of_younger_fields_at_their_defaults():
    assert "router_norm" not in ModelConfig().backbone()
    assert ModelConfig(router_norm="layer").backbone()["router_norm"] == "layer"
    assert "router_norm" not in create_model("resnet18", num_classes=3, width=4, input_size=8).spec


def test_norms_of_routers_change_nothing_without_routers():
    notes = Config.from_dict({"model": {"kind": "dense", "router_norm": "none"}, "training": {"method": "at"}}).notes(
        ["model.router_norm"]
    )
    assert notes[0] == "model.router_norm changes nothing: model.kind is dense"

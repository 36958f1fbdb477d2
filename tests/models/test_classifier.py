"""A model at its outermost: pixels are normalised first, and a router that sees the image decides for all layers."""

import torch
from torch import nn

from advmoe.models import create_model
from advmoe.models.runs import load_run
from advmoe.moe import pathway, route
from advmoe.rundir import stored_digest


def small(**kwargs):
    torch.manual_seed(0)
    settings = {"num_classes": 3, "width": 8, "input_size": 16, **kwargs}
    return create_model("resnet18", **settings).eval()


def test_the_backbone_sees_normalised_images():
    model, x, seen = small(kind="dense"), torch.rand(2, 3, 16, 16), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    assert torch.equal(seen[0], model.normalize(x))


def test_whether_it_is_routed_is_its_kind():
    assert small().routed and not small(kind="dense").routed and not small(kind="s-dense").routed


def test_a_router_of_the_image_decides_for_every_layer(make_routed, make_images):
    model, x = make_routed(router="image"), make_images()
    with torch.no_grad(), route() as routing:
        model(x)
        expected = model.router(model.normalize(x))
    chosen = pathway(model, x)
    assert torch.equal(chosen, routing.pathway()) and torch.equal(
        chosen, torch.stack([s.argmax(1) for s in expected], 1)
    )
    assert all(torch.equal(routing.scores[layer], scores) for layer, scores in enumerate(expected))


def test_where_it_came_from_is_known_of_a_loaded_model_alone(make_digits_run, tmp_path):
    run = make_digits_run(tmp_path / "run")
    loaded = load_run(run)
    assert small().origin is None
    assert loaded.origin.run == run and loaded.origin.digest == stored_digest(run / "model.safetensors")


def test_predict_leaves_each_part_in_its_own_mode():
    model = create_model("resnet18", num_classes=3, width=4, input_size=8).train()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    model.predict(torch.rand(3, 8, 8))
    assert model.training and not any(norm.training for norm in norms)

"""Every router: built, saved and loaded, put into a network of the user's own, exported."""

import pytest
import torch
from torch import nn

from advmoe import create_model, pathway, to_moe
from advmoe.models import load_model, save_model, split_parameters
from advmoe.moe import route
from advmoe.tables import ROUTERS


def small(router):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=5, width=4, input_size=16, router=router)
    with torch.no_grad():
        for _ in range(4):
            model(images())
    return model.eval()


def images(number=12):
    shades = torch.linspace(0.1, 0.9, number).view(-1, 1, 1, 1)
    noise = torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return (shades + 0.3 * (noise - 0.5)).clamp(0, 1)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_is_saved_and_loaded_with_all_that_its_router_knows(tmp_path, router):
    model, x = small(router), images()
    if ROUTERS[router].pixels:
        model.router.fit([x])
        assert len(pathway(model, x).unique(dim=0)) > 1
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(x), model(x)) and torch.equal(pathway(loaded, x), pathway(model, x))
    assert bool(split_parameters(loaded)[1]) == ROUTERS[router].learnt


@pytest.mark.parametrize("router", ROUTERS)
def test_ways_of_a_pass_agree(router):
    model, x = small(router), images()
    with torch.no_grad(), route("masked"):
        torch.testing.assert_close(model(x), small(router)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_network_of_ones_own_computes_the_same(router):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = to_moe(net, 2, router, example=images(3), mean=None, std=None)
    assert len(model.conversion.converted) == 2
    torch.testing.assert_close(model(images()), net(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["fixed-top-bottom", pytest.param("linear", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_half_spaces_are_exported(tmp_path, router):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from advmoe.export import export_model

    model = small(router)
    model.router.fit([images()])
    export_model(model, tmp_path / "net.onnx", images=images(), threads=1)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for x in images().split(1):
        logits, chosen = session.run(None, {"pixels": x.numpy()})
        assert chosen.tolist() == pathway(model, x).tolist()
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-3, atol=1e-4)

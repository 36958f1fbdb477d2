"""How a model computes its experts, by device and by what is asked for; kernels for GPUs agree with the other ways."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from advmoe.config import Config, merged
from advmoe.data import load_dataset
from advmoe.errors import InputError
from advmoe.models import create_model
from advmoe.models.compute import compute_on, computing, set_compute
from advmoe.models.folding import folding
from advmoe.moe import MoEConv2d, route
from advmoe.recipes import recipe
from advmoe.tables import BACKBONES
from advmoe.training.trainer import Trainer, build_model


@pytest.mark.parametrize(
    ("device", "wanted", "experts", "expected"),
    [
        ("cpu", "auto", 2, "dispatch"), ("cuda", "auto", 2, "masked"), ("cuda", "auto", 4, "masked"),
        ("cuda", "auto", 5, "dispatch"), ("cuda", "dispatch", 2, "dispatch"), ("cpu", "masked", 8, "masked"),
    ],
)  # fmt: skip
def test_a_gpu_computes_few_experts_masked(device, wanted, experts, expected):
    assert compute_on(torch.device(device), wanted, experts) == expected


def test_every_layer_computes_by_its_own_number_of_experts():
    few, many = (MoEConv2d(2, 2, 1, bank_rows=2 * number, num_experts=number, layer=0) for number in (4, 5))
    model = nn.Sequential(few, nn.Conv2d(2, 2, 1), many)
    for device, wanted, expected in (("cuda", "auto", (True, False)), ("cpu", "masked", (True, True)),
                                     ("cpu", "auto", (False, False))):  # fmt: skip
        set_compute(model, wanted, torch.device(device))
        assert (few.masks, many.masks) == expected and not few.kernels


def test_a_measurement_computes_in_its_own_way_and_leaves_the_model_s(monkeypatch):
    few, many = (MoEConv2d(2, 2, 1, bank_rows=2 * number, num_experts=number, layer=0) for number in (4, 5))
    model = nn.Sequential(few, many)
    few.kernels = many.masks = True
    with pytest.raises(RuntimeError), computing(model, "auto", torch.device("cuda")):
        assert (few.masks, few.kernels, many.masks, many.kernels) == (True, False, False, False)
        raise RuntimeError
    assert (few.masks, few.kernels, many.masks, many.kernels) == (False, True, True, False)
    with computing(lambda x: x, "auto", torch.device("cuda")):  # no network: nothing to set
        pass


def test_kernels_are_refused_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr("advmoe.ops.kernels_missing", lambda device: f"a CUDA device, got {device.type}")
    with pytest.raises(InputError, match=r"^training\.compute kernel needs a CUDA device, got cpu$"):
        compute_on(torch.device("cpu"), "kernel", 2)
    monkeypatch.setattr("advmoe.ops.kernels_missing", lambda device: None)
    assert compute_on(torch.device("cuda"), "kernel", 8) == "kernel"


@pytest.fixture
def one_block(monkeypatch):
    """ResNet-18 with a block alone, and DeiT-Tiny too."""
    for name, keyword, value in (("resnet18", "depths", (1,)), ("deit-tiny", "depth", 1)):
        build = BACKBONES[name].build
        build = partial(build.func, *build.args, **build.keywords | {keyword: value})
        monkeypatch.setitem(BACKBONES, name, replace(BACKBONES[name], build=build))


def passed(model, x, compute):
    """Logits, pathway and all gradients of a pass over images `x`."""
    set_compute(model, compute, x.device)
    model.zero_grad()
    x = x.detach().requires_grad_()
    with route() as routing:
        logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x)) % 5).backward()
    return logits.detach(), routing.pathway(), x.grad, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {"router": "layer"}),
        ("resnet18", {"router": "image", "num_experts": 3}),  # windows that overlap and wrap around
        ("deit-tiny", {"router": "layer"}),
        ("deit-tiny", {"router": "layer", "route_per": "token"}),
    ],
    ids=["layer", "overlapping", "MLP", "tokens"],
)
def test_kernels_agree_with_masks_and_dispatch(name, kwargs, launched, one_block):
    torch.manual_seed(0)
    size, width = (8, 8) if name == "resnet18" else (16, 16)
    model = create_model(name, num_classes=5, width=width, input_size=size, **kwargs)
    model = model.to(memory_format=torch.channels_last)
    x = (torch.rand(6, 3, size, size) + torch.rand(6, 3, 1, 1)) / 2
    with torch.no_grad():
        model(x)  # spreads the router's batch norm
    reference = passed(model, x, "masked")
    assert not launched and len(reference[1].unique()) > 1
    for compute in ("kernel", "dispatch"):
        result = passed(model, x, compute)
        assert torch.equal(result[1], reference[1])
        torch.testing.assert_close(result[0], reference[0])
        torch.testing.assert_close(result[2], reference[2], rtol=1e-4, atol=1e-6)
        for key, value in reference[3].items():
            torch.testing.assert_close(
                result[3][key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    layers = 2 if name == "resnet18" else 1
    products = 1 if name == "resnet18" else 2
    assert launched.count("convolve") == launched.count("filter_gradients") == layers * products
    assert any("router" in key and value.abs().sum() > 0 for key, value in result[3].items())


@pytest.mark.parametrize("method", ["standard", "at", "advmoe"])  # at-routers and at-experts are AdvMoE's two levels
def test_a_training_step_by_kernels_ends_where_one_by_masks_does(method, launched, one_block):
    config = recipe("digits-advmoe")
    groups = {
        "model": {"width": 8},
        "data": {"image_size": 8, "val_fraction": 0.2},
        "training": {"method": method, "alternation": "both", "attack_steps": 1},
    }
    dataset = load_dataset("digits", image_size=8, val_fraction=0.2, train_examples=64, seed=0)
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    weights, counts = [], []
    for compute in ("masked", "kernel"):
        settings = Config.from_dict(merged(merged(config, groups), {"training": {"compute": compute}}))
        fabric = Fabric(accelerator="cpu", devices=1)
        trainer = Trainer(settings, build_model(settings, dataset), dataset, fabric)
        generator = torch.Generator().manual_seed(1)
        for level in trainer.levels:
            trainer.step(level, x, torch.arange(6), generator)
        weights.append(trainer.model.state_dict())
        counts.append(len(launched))
    assert counts[0] == 0 < counts[1]
    for key, value in weights[0].items():
        torch.testing.assert_close(
            weights[1][key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_an_attack_s_pass_is_a_kernel_from_the_choice_to_the_rectifier(launched, one_block):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=5, width=8, input_size=8).to(memory_format=torch.channels_last)
    x = torch.rand(6, 3, 8, 8)
    model(x)
    model.eval().requires_grad_(False)
    expected = model(x)
    set_compute(model, "kernel", x.device)
    with folding():
        y = model(x.requires_grad_())
        torch.testing.assert_close(y, expected)
        y.sum().backward()
    assert launched == ["sort", "convolve"] * 2 + ["unconvolve"] * 2

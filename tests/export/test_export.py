"""Exported files compute what PyTorch computes, of the chosen experts alone, and nothing half-written stays."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import advmoe
from advmoe import cli
from advmoe import export as exporting
from advmoe.config import Config
from advmoe.evaluation.cost import gmacs
from advmoe.evaluation.images import random_images
from advmoe.export import export_model
from advmoe.models import create_model, save_model
from advmoe.models.convert import to_moe
from advmoe.moe import MoELayer, pathway

ROOT = Path(__file__).parents[2]
SIDE = 16

pytestmark = pytest.mark.usefixtures("shallow_backbones")


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def agree(model, path, *, batches=(1,)):
    """The file's logits and pathways are PyTorch's; the pathways, which are several."""
    session = session_of(path)
    images = random_images((model.spec["in_channels"], SIDE, SIDE))
    taken = []
    for batch in batches:
        for x in images[: 24 - 24 % batch].split(batch):
            with torch.no_grad():
                expected = model(x)
            logits, choices = session.run(None, {"pixels": x.numpy()})
            np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(choices, pathway(model, x).numpy())
            taken += choices.reshape(batch, -1).tolist()
    assert len({tuple(each) for each in taken}) > 1
    return taken


def macs_of(path) -> int:
    """Multiply-accumulates of the graph's convolutions and matrix products, from the shapes that ONNX infers."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    for each in (*graph.value_info, *graph.input, *graph.output):
        shapes[each.name] = tuple(side.dim_value for side in each.type.tensor_type.shape.dim)
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(shapes[node.output[0]]) * np.prod(shapes[node.input[1]][1:]))
        elif node.op_type in ("Gemm", "MatMul"):
            total += int(np.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1])
    return total


@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer"},
        pytest.param({"router": "embedding", "experts": "independent", "num_experts": 3}, marks=pytest.mark.slow),
        # Windows that overlap and wrap around.
        pytest.param({"router": "image", "num_experts": 3, "scale": 0.5}, marks=pytest.mark.slow),
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_onnx_runtime_computes_the_chosen_experts_and_nothing_else(tmp_path, kwargs, warmed):
    model = warmed(**kwargs)
    report = export_model(model, tmp_path / "net.onnx", threads=1)
    agree(model, tmp_path / "net.onnx")
    # Not a convolution or a product more than one pathway and its routers have.
    assert macs_of(tmp_path / "net.onnx") == round(1e9 * gmacs(model))
    assert report["gmacs"] == pytest.approx(gmacs(model), abs=1e-6)
    assert report["computes"] == "the chosen experts alone"
    layers = sum(isinstance(module, MoELayer) for module in model.modules())
    assert report["outputs"] == {"logits": [1, 5], "pathway": [1, layers]}
    assert report["check"]["pathways"] == len(pathway(model, random_images((3, SIDE, SIDE))).unique(dim=0)) > 1
    assert report["check"]["images"] == 100 and 0 < report["check"]["largest_difference"] < 1e-4
    assert report["time"]["speedup"] == pytest.approx(
        report["time"]["pytorch_ms"] / report["time"]["exported_ms"], rel=0.1
    )
    assert json.loads((tmp_path / "net.onnx.json").read_text()) == report


# ResNet-18 is above, and 34 has its blocks.
@pytest.mark.parametrize(
    "name", ["vgg16", "deit-tiny", *(slow(name) for name in ("resnet50", "densenet40", "wrn-10-1"))]
)
@pytest.mark.slow
def test_every_backbone_gathers_its_banks(tmp_path, name, warmed):
    model = warmed(name)
    export_model(model, tmp_path / "net.onnx", images=random_images((3, SIDE, SIDE))[:24], threads=1)
    agree(model, tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    plain = create_model(name, num_classes=5, width=8, input_size=SIDE, kind="s-dense")
    convolutions = sum(isinstance(module, nn.Conv2d) for module in plain.modules())
    assert Counter(node.op_type for node in graph.node)["Conv"] == convolutions
    banks = {
        f"model.{name}.{own}"
        for name, layer in model.named_modules()
        if isinstance(layer, MoELayer)
        for own, bank in layer.named_parameters(recurse=False)
        if len(bank) == layer.bank_rows and any(bank is each for each in layer.banks())
    }
    users = [node.op_type for node in graph.node for each in node.input if each in banks]
    assert users == ["Gather"] * len(banks)  # one for each, where equal banks are kept once too


@pytest.mark.slow
def test_a_converted_network_and_a_plain_one(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()
    images = random_images((3, SIDE, SIDE))
    report = export_model(network, tmp_path / "plain.onnx", images=images, threads=1)
    assert (report["computes"], report["outputs"]) == ("the whole of a plain model", {"logits": [1, 5]})
    converted = to_moe(network, 3, example=images)
    with torch.no_grad():
        for layer in converted.modules():
            if isinstance(layer, MoELayer):
                for bank in layer.banks():  # experts that differ, as after training
                    bank.add_(0.1 * torch.randn_like(bank))
        converted.train()(images)
    converted.eval()
    assert export_model(converted, tmp_path / "moe.onnx", threads=1)["outputs"]["pathway"] == [1, 2]
    agree(converted, tmp_path / "moe.onnx")
    plain = create_model("resnet18", num_classes=5, width=8, input_size=SIDE, kind="s-dense")
    report = export_model(plain, tmp_path / "plain.pt2", format="torch-export", dynamic_batch=True, threads=1)
    assert report["outputs"] == {"logits": ["N", 5]} and report["check"]["pathways"] == 0


@pytest.mark.slow
def test_a_dynamic_batch_of_any_size(tmp_path, warmed):
    model = warmed(num_experts=3)
    report = export_model(model, tmp_path / "net.onnx", dynamic_batch=True, opset=18, threads=1)
    agree(model, tmp_path / "net.onnx", batches=(1, 2, 5))
    assert report["computes"] == "all experts, of which the chosen ones are kept"
    assert report["gmacs"] > gmacs(model)
    assert report["input"]["shape"] == ["N", 3, SIDE, SIDE] and report["opset"] == 18
    assert session_of(tmp_path / "net.onnx").get_inputs()[0].shape == ["batch", 3, SIDE, SIDE]


class Small(nn.Module):
    """A network whose layers read one another's attributes."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x.to(self.stem.weight.dtype)).relu()
        return self.head(self.body(x).relu().mean((2, 3)) / self.body.out_channels**0.5)


@pytest.mark.parametrize(
    ("router", "opset", "dynamic"),
    [
        ("layer", None, True), pytest.param("layer", 18, True, marks=pytest.mark.slow), ("layer", "newest", True),
        ("image", None, True),
        ("layer", "newest", False),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_converted_network_in_every_form(tmp_path, router, opset, dynamic):
    torch.manual_seed(0)
    images = random_images((3, SIDE, SIDE))
    model = to_moe(Small().eval(), router=router, example=images)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                layer.bank.add_(0.1 * torch.randn_like(layer.bank))
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.momentum = 1.0
        model.train()(images)
    model.eval()
    batches = (1, 2, 5) if dynamic else (1,)
    if opset is None:
        path = tmp_path / "net.pt2"
        export_model(model, path, format="torch-export", dynamic_batch=dynamic, images=images[:4], threads=1)
        net = torch.export.load(path).module()
        for batch in batches:
            for x in images[: 20 - 20 % batch].split(batch):
                logits, taken = net(x)
                torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
                assert torch.equal(taken, pathway(model, x))
    else:
        number = onnx.defs.onnx_opset_version() if opset == "newest" else opset
        path = tmp_path / "net.onnx"
        report = export_model(model, path, dynamic_batch=dynamic, opset=number, images=images[:4], threads=1)
        assert report["opset"] == number
        agree(model, path, batches=batches)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_tokens_routed_one_by_one_have_all_experts_computed(tmp_path, dynamic, warmed):
    model = warmed("deit-tiny", route_per="token")
    path, images = tmp_path / "net.pt2", random_images((3, SIDE, SIDE))[:20]
    report = export_model(model, path, format="torch-export", dynamic_batch=dynamic, images=images, threads=1)
    assert report["computes"] == "all experts, of which the chosen ones are kept"
    assert report["input"]["shape"][0] == ("N" if dynamic else 1) and len(report["outputs"]["pathway"]) == 3
    net = torch.export.load(path).module()
    expected = pathway(model, images)
    assert len(expected.flatten(1).unique(dim=0)) > 1
    for batch in (1, 2, 5) if dynamic else (1,):
        logits, taken = (torch.cat(each) for each in zip(*(net(x) for x in images.split(batch)), strict=True))
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
        assert torch.equal(taken, expected)


@pytest.mark.slow
def test_pt2_files_run_in_a_process_without_this_library(tmp_path, warmed):
    model = warmed(router="image")
    paths = {1: tmp_path / "one.pt2", 5: tmp_path / "any.pt2"}
    for batch, path in paths.items():
        export_model(model, path, format="torch-export", dynamic_batch=batch > 1, threads=1)
        assert str(ROOT).encode() not in path.read_bytes()  # traces name files of this machine
    images = random_images((3, SIDE, SIDE))[:20]
    np.save(tmp_path / "images.npy", images.numpy())
    script = """
import sys
sys.modules["advmoe"] = None
import json, numpy as np, torch
images = torch.from_numpy(np.load("images.npy"))
for name, batch in (("one", 1), ("any", 5)):
    extra = {"advmoe.json": ""}
    net = torch.export.load(f"{name}.pt2", extra_files=extra).module()
    assert json.loads(extra["advmoe.json"])["input"]["shape"] == [1 if batch == 1 else "N", 3, 16, 16]
    logits, pathways = zip(*(net(x) for x in images.split(batch)))
    np.savez(f"{name}.npz", logits=torch.cat(logits).detach().numpy(), pathways=torch.cat(pathways).numpy())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("one", "any"):
        with torch.no_grad(), np.load(tmp_path / f"{name}.npz") as outputs:
            np.testing.assert_allclose(outputs["logits"], model(images).numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(outputs["pathways"], pathway(model, images).numpy())
            assert len(np.unique(outputs["pathways"], axis=0)) > 1


def test_the_model_is_left_as_it_was(tmp_path, warmed):
    model = warmed().train()
    model.backbone.stem[1].eval()
    model.classes_frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    export_model(
        model, tmp_path / "net.pt2", format="torch-export", images=random_images((3, SIDE, SIDE), 4), threads=1
    )
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_logits_that_differ_leave_no_file_and_the_last_one_alone(tmp_path, monkeypatch, capsys, wrong, warmed):
    opened = exporting.opened

    def spoiled(path, form):
        run = opened(path, form)
        return lambda x: (run(x)[0] + wrong * (x.mean() > 0.5), *run(x)[1:])

    save_model(warmed(), tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"the last one")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(exporting, "opened", spoiled)
    assert cli.main(["export", str(tmp_path), "--format", "torch-export", "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("advmoe: error: logits must be PyTorch's to ") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "model.pt2").read_bytes() == b"the last one"


def test_images_of_one_pathway_do_not_hide_a_constant_choice(tmp_path, warmed):
    model = warmed()
    images = random_images((3, SIDE, SIDE), 1)
    report = export_model(model, tmp_path / "net.pt2", format="torch-export", images=images, threads=1)
    assert report["check"]["pathways"] == 1 and report["check"]["on"] == "images given"
    assert report["check"]["also"]["pathways"] > 1 and report["check"]["also"]["on"] == "random images"


def test_data_that_cannot_be_read_are_replaced_and_that_is_said(tmp_path, capsys, warmed):
    save_model(warmed(in_channels=1, num_classes=10), tmp_path)
    Config.from_dict({"data": {"name": "folder", "root": "nowhere"}}).dump(tmp_path / "config.yaml")
    assert (
        cli.main(["export", str(tmp_path), "--format", "torch-export", "--num-examples", "20", "--threads", "1"]) == 0
    )
    assert "check     20 random images, not the run's (data.root must" in capsys.readouterr().out


def test_other_mistakes(tmp_path, capsys, warmed):
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "a run directory must hold model.json" in capsys.readouterr().err
    model = warmed()
    with pytest.raises(ValueError, match=r"images must be float32 \(N, C, H, W\) with N >= 1, got torch.uint8"):
        export_model(model, tmp_path / "a.onnx", images=torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images must be given for a model without an input size, got a Sequential"):
        export_model(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="model must be on the CPU, got meta"):
        export_model(model.to("meta"), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_package_offers_both():
    assert advmoe.export_model is export_model and callable(advmoe.export_run)

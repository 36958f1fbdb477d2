"""The model of a run: drawn from its seed, taken over from another run, or the user's own network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from advmoe.config import Config
from advmoe.data import Dataset, ImageSet
from advmoe.models import Classifier, save_model
from advmoe.moe import route
from advmoe.training.model import build_model
from advmoe.training.run import train

pytestmark = pytest.mark.usefixtures("shallow_backbones")

PART = ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
DATASET = Dataset("digits", PART, PART, PART, ("odd", "even"), (0.5,), (0.25,), False, cut="central-crop")
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))

def net():
    return Net()

def three():
    return Net(3)

def single():
    from advmoe.moe import MoEConv2d

    made = Net()
    made.conv = MoEConv2d(1, 4, 3, bank_rows=4, num_experts=1, layer=0)
    return made

class Pair(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class Fewer(Net):
    def forward(self, x):
        return super().forward(x[1:] if self.training else x)

class Fails(Net):
    def forward(self, x):
        assert not self.training, "never"
        return super().forward(x)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    return tmp_path


def settings(training: dict[str, object] | None = None, **model: object) -> Config:
    described = model if "source" in model else {"width": 4, **model}
    return Config.from_dict({"model": described, "data": {"name": "digits"}, "training": training or {}})


def saved(model: Classifier, config: Config, folder: Path) -> str:
    """A run directory of `model`."""
    folder.mkdir()
    save_model(model, folder)
    config.dump(folder / "config.yaml")
    return str(folder)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_weights_follow_from_the_run_s_seed_alone() -> None:
    drawn = torch.get_rng_state()
    model = build_model(settings(), DATASET)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.rand(3)
    assert_same(build_model(settings(), DATASET), model)
    other = build_model(settings({"seed": 1}), DATASET).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in model.state_dict().items())


def test_a_model_knows_its_images_and_classes() -> None:
    spec = build_model(settings(), DATASET).spec
    assert (spec["num_classes"], spec["in_channels"], spec["input_size"]) == (2, 1, 8)
    assert (spec["mean"], spec["std"]) == ([0.5], [0.25])
    assert (spec["classes"], spec["cut"]) == (["odd", "even"], "central-crop")


def test_weights_are_taken_over_from_the_run_to_start_from(tmp_path: Path) -> None:
    first = build_model(settings({"method": "standard"}), DATASET)
    run = saved(first, settings({"method": "standard"}), tmp_path / "start")
    further = settings({"method": "at-routers", "init_from": run, "seed": 3})
    assert_same(build_model(further, DATASET), first)
    # A run that is resumed has all weights in its checkpoint, and no need of the other.
    (tmp_path / "start" / "model.safetensors").unlink()
    assert_same(build_model(further, DATASET, resumed=True), build_model(settings({"seed": 3}), DATASET))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        build_model(further, DATASET)


@pytest.mark.parametrize("kind", ["s-dense", "sparse"])
def test_a_mixture_starts_as_the_plain_network_of_a_pathway_s_cost(tmp_path: Path, kind: str) -> None:
    plain = {"method": "sparse" if kind == "sparse" else "at"}
    start = build_model(settings(plain, kind=kind), DATASET).eval()
    run = saved(start, settings(plain, kind=kind), tmp_path / "start")
    model = build_model(settings({"method": "at", "init_from": run, "seed": 3}), DATASET).eval()
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model(x), start(x), atol=1e-5)
    drawn = build_model(settings({"method": "at", "seed": 3}), DATASET)
    assert model.spec == drawn.spec and model.spec["kind"] == "moe"


def test_a_mixture_starts_from_a_dense_network_s_largest_channels(tmp_path: Path) -> None:
    dense = build_model(settings({"method": "at"}, kind="dense"), DATASET).eval()
    run = saved(dense, settings({"method": "at"}, kind="dense"), tmp_path / "start")
    model = build_model(settings({"method": "at", "init_from": run, "seed": 3}), DATASET).eval()
    # What a sparse model scores highest of the same weights before anything is trained.
    sparse = build_model(settings({"method": "sparse", "init_from": run}, kind="sparse"), DATASET).eval()
    x = torch.rand(4, 1, 8, 8)
    for expert in (0, 1):
        with torch.no_grad(), route(forced=torch.full((4, 16), expert)):
            assert torch.allclose(model(x), sparse(x), atol=1e-5)
    width = settings({"method": "at", "init_from": run}, width=8)
    with pytest.raises(
        ValueError, match=r"training.init_from must hold a model of the shape in model.*a dense resnet18"
    ):
        build_model(width, DATASET)


def test_a_transformer_is_not_slimmed(tmp_path: Path) -> None:
    tiny = {"name": "deit-tiny", "width": 8}
    dense = build_model(settings({"method": "at"}, kind="dense", **tiny), DATASET)
    run = saved(dense, settings({"method": "at"}, kind="dense", **tiny), tmp_path / "start")
    with pytest.raises(ValueError, match="must be of a dense CNN for experts to have a part of, got a dense deit-tiny"):
        build_model(settings({"method": "at", "init_from": run}, **tiny), DATASET)


@pytest.mark.parametrize(("model", "shape"), [({"width": 8}, "a moe resnet18"), ({"num_experts": 3}, "a moe resnet18")])
def test_a_start_of_another_shape_is_named(tmp_path: Path, model: dict[str, object], shape: str) -> None:
    config = settings({"method": "standard"}, **model)
    run = saved(build_model(config, DATASET), config, tmp_path / "start")
    with pytest.raises(ValueError) as error:
        build_model(settings({"method": "at-routers", "init_from": run}), DATASET)
    rule = "training.init_from must hold a model of the shape in model.*"
    assert str(error.value) == f"{rule}, got {run!r}, {shape} of other shape"


def test_a_network_of_the_user_s_own_is_taken_as_it_is_or_converted(place: Path) -> None:
    plain = build_model(settings({"method": "at"}, source="own.py:net"), DATASET)
    assert not plain.routed and plain.spec["source"] == "own.py:net" and plain.spec["classes"] == ["odd", "even"]
    x = torch.rand(4, 1, 8, 8)
    converted = build_model(settings(source="own.py:net", to_moe=True), DATASET)
    assert converted.routed and converted.spec["layers"] == ["conv"]
    # Of the same seed, and no other than before until it is trained.
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_a_trained_plain_network_is_converted_with_its_weights(place: Path) -> None:
    config = settings({"method": "standard"}, source="own.py:net")
    plain = build_model(config, DATASET)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    run = saved(plain, config, place / "start")
    upcycled = build_model(settings({"init_from": run}, source="own.py:net", to_moe=True), DATASET)
    assert torch.equal(upcycled.backbone.conv.bank, plain.backbone.conv.weight.repeat(2, 1, 1, 1))
    assert torch.equal(upcycled.backbone.fc.weight, plain.backbone.fc.weight)


@pytest.mark.parametrize(
    ("factory", "training", "message"),
    [
        ("three", {"method": "at"}, "model.source must make logits of the data's 2 classes, got 3"),
        ("net", {}, "model.source must be converted (--to-moe), or have MoE layers of its own, when training.method is "
         "advmoe, got 'own.py:net' without"),
        ("net", {"method": "at", "balance": 1, "margin": 1}, "model.source must be converted (--to-moe), or have MoE "
         "layers of its own, when training.balance is > 0 and training.margin is > 0, got 'own.py:net' without"),
        ("single", {"method": "at", "runner_up": 0.5}, "model.source must be of two experts or more in each MoE layer"),
        ("Pair", {"method": "at"}, "must make logits (N, K) in train mode too, got tuple"),
        ("Fewer", {"method": "at"}, "must make logits (N, K) in train mode too, got (2, 2)"),
        ("Fails", {"method": "at"}, "must make logits (N, K) in train mode too, got AssertionError: never"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)  # fmt: skip
def test_networks_that_cannot_be_trained_are_named(
    place: Path, factory: str, training: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        build_model(settings(training, source=f"own.py:{factory}"), DATASET)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_images_of_another_shape_are_named_with_the_source(place: Path) -> None:
    coloured = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2)
    data = replace(DATASET, train=coloured, val=coloured, test=coloured)
    with pytest.raises(ValueError, match=r"^model\.source own\.py:net: module must take images \(3, 3, 8, 8\) without"):
        build_model(settings({"method": "at"}, source="own.py:net"), data)


def test_init_from_another_shape_names_the_field(tmp_path: Path) -> None:
    start = build_model(settings({"method": "standard"}), DATASET)
    run = saved(start, settings({"method": "standard"}), tmp_path / "start")
    config = settings({"method": "at-routers", "init_from": run}, width=8)
    with pytest.raises(ValueError, match=r"training\.init_from must hold a model of the shape in model\.\*"):
        train(config, run_dir=tmp_path / "run", accelerator="cpu", threads=1)
    assert not (tmp_path / "run").exists()

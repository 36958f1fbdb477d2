"""One AdvMoE iteration, dissection, IoU and multiply-accumulates beside a second writing of them, in float64."""

import ast
from pathlib import Path

import pytest
import reimplemented
import torch
from lightning_fabric import Fabric
from reimplemented import Network, level

from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.evaluation.cost import gmacs
from advmoe.evaluation.dissection import Dissection
from advmoe.evaluation.overlap import iou, units_of
from advmoe.models import create_model
from advmoe.moe import MoELayer, routers_of
from advmoe.training.trainer import Trainer, build_model

SETTINGS = {"beta": 6.0, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
EPS, STEP_SIZE, STEPS = 0.1, 0.06, 2


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses stay in float64, which they compute in fp32 whatever the network's precision."""
    lowered = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else lowered(x))


def make_trainer(router: str) -> Trainer:
    config = Config.from_dict({
        "model": {"width": 4, "router": router, "experts_init": "independent"},
        "data": {"name": "digits", "image_size": 8, "train_examples": 80, "augment": False},
        "threat": {"eps": EPS},
        "training": {
            **SETTINGS, "method": "advmoe", "alternation": "both", "batch_size": 20, "attack_steps": STEPS,
            "step_size": STEP_SIZE,
        },
    })  # fmt: skip
    dataset = load_dataset("digits", image_size=8, train_examples=80)
    fabric = Fabric(accelerator="cpu", devices=1)
    trainer = Trainer(config, build_model(config, dataset), dataset, fabric)
    trainer.model.double()
    return trainer


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("router", ["layer", "embedding", "image"])
def test_iterations_of_both_levels_agree(router: str) -> None:
    """Two iterations, so that momentum and the moved statistics count too; the levels' batches differ."""
    trainer = make_trainer(router)
    second = Network(trainer.model.state_dict(), experts=2)
    begun = {name: value.clone() for name, value in second.state.items()}
    velocity: dict[str, torch.Tensor] = {}
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    images, labels = torch.rand(80, 1, 8, 8, generator=ours, dtype=torch.float64), torch.arange(80) % 10
    theirs.set_state(ours.get_state())
    assert [each.part for each in trainer.levels] == ["routers", "experts"]
    for batch in range(4):
        part = trainer.levels[batch % 2]
        x, y = images[20 * batch : 20 * batch + 20], labels[20 * batch : 20 * batch + 20]
        terms = trainer.step(part, x.contiguous(memory_format=torch.channels_last), y, ours)
        noise = torch.randn(x.shape, generator=theirs, dtype=torch.float64)
        found = level(
            second, part.part, velocity, x, y, noise, eps=EPS, steps=STEPS, step_size=STEP_SIZE, **SETTINGS
        )  # fmt: skip
        assert [value.item() for value in terms.values()] == pytest.approx(found, abs=1e-10)
        for name, value in trainer.model.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, second.state[name].detach(), rtol=0, atol=1e-10, msg=name)
    # Were every image on one expert, or nothing learnt, the agreement would say little.
    assert all(len(torch.stack(pathway, 1).unique(dim=0)) > 1 for pathway in second.pathways[-2:])
    names = [*second.learnt("routers"), *second.learnt("experts")]
    assert len(names) == sum(1 for _ in trainer.model.parameters())
    assert all(not torch.equal(begun[name], second.state[name]) for name in names)


def test_the_second_writing_is_short_and_its_own() -> None:
    source = Path(reimplemented.__file__).read_text()
    assert len(source.splitlines()) <= 150
    imports = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Import | ast.ImportFrom)]
    assert {(each.module if isinstance(each, ast.ImportFrom) else each.names[0].name) for each in imports} == {
        "torch", "torch.nn",
    }  # fmt: skip


def test_the_four_categories_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(0, 3, (60, 4), generator=generator)
    attacked = torch.where(torch.rand(60, 4, generator=generator) < 0.15, (clean + 1) % 3, clean)
    right, still = (torch.rand(60, generator=generator) < share for share in (0.8, 0.6))
    expected = []
    for image in range(60):
        routed = all(int(a) == int(b) for a, b in zip(clean[image], attacked[image], strict=True))
        predicted = bool(right[image]) and bool(still[image])
        expected.append({(True, True): 1, (False, True): 2, (True, False): 3, (False, False): 4}[routed, predicted])
    assert {*expected} == {1, 2, 3, 4}
    dissection = Dissection(clean, attacked, right, still, 3)
    assert dissection.categories.tolist() == expected
    shares = dissection.shares()
    assert shares is not None
    assert list(shares.values()) == pytest.approx([expected.count(category) / 60 for category in (1, 2, 3, 4)])


@pytest.mark.parametrize(("experts", "scale"), [(2, 0.5), (4, 0.5)])
def test_the_iou_is_that_of_the_sets_of_channels(experts: int, scale: float) -> None:
    """Windows of channels that lie apart (2 halves) and that overlap (4 halves), beside masks of half the channels."""
    settings = {"width": 4, "scale": scale, "num_experts": experts, "experts_init": "independent"}
    model = create_model("resnet18", kind="moe", num_classes=10, input_size=8, in_channels=3, **settings)
    widths = [4] * 4 + [8] * 4 + [16] * 4 + [32] * 4
    generator = torch.Generator().manual_seed(3)
    pathways = torch.randint(0, experts, (9, 16), generator=generator)
    masks = [torch.randperm(width, generator=generator)[: width // 2].tolist() for width in widths]
    mask_units = [
        torch.isin(torch.arange(width), torch.tensor(rows))[None] for width, rows in zip(widths, masks, strict=True)
    ]
    expected = []
    for pathway in pathways.tolist():
        ours = {
            (layer, (choice * width // experts + row) % width)
            for layer, (choice, width) in enumerate(zip(pathway, widths, strict=True))
            for row in range(int(scale * width))
        }
        theirs = {(layer, row) for layer, rows in enumerate(masks) for row in rows}
        expected.append(len(ours & theirs) / len(ours | theirs))
    found = iou(pathways, torch.zeros_like(pathways), units_of(model), mask_units)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 1


def multiplications(width: int, size: int, router: str | None, classes: int = 10, experts: int = 2) -> int:
    """Multiply-accumulates of one image in a ResNet-18 whose layers have `width`, 2, 4 and 8 times `width` channels;
    with routers of half-sized experts, whose own widths follow the Dense network's, twice as wide.
    """
    total, c_in, layers = size**2 * width * 3 * 9, width, 0
    for stage in range(4):
        c_out = width * 2**stage
        for block in range(2):
            size = size // 2 if stage and not block else size
            for channels in (c_in, c_out):
                total += size**2 * c_out * channels * 9
                layers += 1
                if router == "layer":
                    hidden = max(8, min(64, channels // 4))
                    total += channels * hidden + hidden * experts
            if c_in != c_out:
                total += size**2 * c_out * c_in
            c_in = c_out
    return total + c_in * classes + _ahead(2 * width, router, layers, experts)


def _ahead(width: int, router: str | None, layers: int, experts: int, size: int = 8) -> int:
    """Of a router that sees the image of 8x8 pixels."""
    if router not in ("embedding", "image"):
        return 0
    base = max(8, width // 4)
    shapes = [(3, base, size), (base, 2 * base, size // 2), (2 * base, 4 * base, size // 4)]
    if router == "image":
        shapes.append((4 * base, 4 * base, size // 8))
    heads = experts * (layers if router == "embedding" else 1)
    return sum(side**2 * c_in * c_out * 9 for c_in, c_out, side in shapes) + 4 * base * heads


@pytest.mark.parametrize("router", ["layer", "embedding", "image"])
def test_multiply_accumulates_by_the_layers_shapes(router: str) -> None:
    settings = {"width": 8, "num_classes": 10, "input_size": 8, "in_channels": 3, "scale": 0.5}
    moe = create_model("resnet18", kind="moe", router=router, num_experts=2, **settings)
    assert sum(isinstance(each, MoELayer) for each in moe.modules()) == 16
    assert len([*routers_of(moe)]) == (16 if router == "layer" else 1)
    assert round(1e9 * gmacs(moe)) == multiplications(4, 8, router)
    plain = {kind: create_model("resnet18", kind=kind, **settings) for kind in ("dense", "s-dense")}
    assert round(1e9 * gmacs(plain["dense"])) == multiplications(8, 8, None)
    assert round(1e9 * gmacs(plain["s-dense"])) == multiplications(4, 8, None)

"""DeiT-Tiny as Dense, S-Dense and MoE-ViT: shapes and costs by number, what a pathway is, and how it is trained."""

import copy
import json

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import nn
from torch.nn import functional as F

from advmoe.config import Config, ModelConfig
from advmoe.data.types import Dataset, ImageSet
from advmoe.evaluation.checks import check, require_passed
from advmoe.evaluation.cost import gmacs, parameters
from advmoe.evaluation.runs import dissect_run, evaluate_run
from advmoe.evaluation.scoring import measuring
from advmoe.models import create_model, load_model, save_model, split_parameters
from advmoe.models.layers import LayerFactory
from advmoe.models.vit import Block, num_heads, patch_size
from advmoe.moe import MoEMLP, pathway, route, routers_of
from advmoe.tables import METHODS
from advmoe.training.run import train
from advmoe.training.trainer import Trainer, build_model

ROUTINGS = [{"router": "layer"}, {"router": "embedding"}, {"router": "image"}, {"route_per": "token"}]
DEPTH = 12


def small(**kwargs):
    return create_model("deit-tiny", **{"num_classes": 5, "width": 16, "input_size": 16, **kwargs})


@pytest.fixture(scope="session")
def make_vit(make_images):
    """Makes small routed ViTs (eval mode) that send `make_images()` several ways; with weights of twice their size, so
    that images, pathways and experts differ visibly.
    """
    models = {}

    def warm(seed, **kwargs):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = small(**kwargs)
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "router" not in name:
                    parameter.mul_(2)
            for each in range(8):
                model(make_images(16, seed=100 + each))
        return model.eval()

    def make(**kwargs):
        key = repr(sorted(kwargs.items()))
        if key not in models:
            candidates = (warm(seed, **kwargs) for seed in range(20))
            models[key] = next(m for m in candidates if len(pathway(m, make_images()).unique(dim=0)) > 1)
        return copy.deepcopy(models[key])

    return make


# Shapes and costs


@pytest.mark.parametrize(
    ("size", "patch"), [(224, 16), (384, 16), (128, 16), (96, 12), (64, 8), (32, 4), (28, 2), (16, 2), (8, 1), (15, 1)]
)
def test_the_patch_follows_the_images(size, patch):
    assert patch_size(size) == patch


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (64, 1), (16, 1), (100, 1), (160, 2)])
def test_heads(width, heads):
    assert num_heads(width) == heads


def backbone_macs(hidden, *, size=224, patch=16, d=192, classes=1000):
    patches = (size // patch) ** 2
    t = patches + 1
    attention = t * d * 3 * d + 2 * t * t * d + t * d * d  # projections, two products of all pairs, output
    return patches * 3 * patch**2 * d + DEPTH * (attention + 2 * t * d * hidden) + d * classes


def router_macs(d=192, experts=2):
    return DEPTH * (d * (hidden := max(8, min(64, d // 4))) + hidden * experts)


def embedding_macs(side, d=192, experts=2):
    b = d // 4
    convolutions = 3 * b * side**2 + 2 * b * b * (side // 2) ** 2 + 8 * b * b * (side // 4) ** 2
    return 9 * convolutions + 4 * b * experts * DEPTH


def test_deit_tiny_at_224_costs_what_is_published():
    dense = create_model("deit-tiny", kind="dense", num_classes=1000, input_size=224)
    assert gmacs(dense) == pytest.approx(backbone_macs(768) / 1e9, rel=1e-9)
    assert 1.25 < gmacs(dense) < 1.26  # published, rounded, as 1.3
    assert parameters(dense) == (5_717_416, 5_717_416)  # published as 5.7 M


def test_one_pathway_costs_s_dense_and_its_routers():
    narrow = create_model("deit-tiny", kind="s-dense", num_classes=1000, input_size=224)
    assert gmacs(narrow) == pytest.approx(backbone_macs(384) / 1e9, rel=1e-9)
    assert round(gmacs(narrow), 3) == 0.905
    # 384 hidden units fewer in 12 MLPs, each with 192 weights in, a bias and 192 weights out.
    assert parameters(narrow) == (5_717_416 - 12 * 384 * 385,) * 2
    routed = create_model("deit-tiny", num_classes=1000, input_size=224)
    assert gmacs(routed) == pytest.approx((backbone_macs(384) + router_macs()) / 1e9, rel=1e-9)
    assert gmacs(routed) / gmacs(narrow) < 1.001
    # A router: norm (2 x 192), 192 -> 48 -> 2 with biases.
    routers = 12 * (2 * 192 + 193 * 48 + 49 * 2)
    assert parameters(routed) == (5_717_416 + routers, 5_717_416 - 12 * 384 * 385 + routers)


@pytest.mark.parametrize(("size", "seen"), [(32, 32), (64, 32), (224, 56)])
def test_a_router_that_sees_the_image_costs_no_more_at_large_ones(size, seen):
    routed = create_model("deit-tiny", num_classes=10, input_size=size, router="embedding")
    plain = backbone_macs(384, size=size, patch=patch_size(size), classes=10)
    assert gmacs(routed) == pytest.approx((plain + embedding_macs(seen)) / 1e9, rel=1e-9)
    assert embedding_macs(seen) / plain < 0.1


def test_routing_tokens_costs_a_router_per_token():
    one, each = (small(route_per=per, width=64, input_size=32) for per in ("image", "token"))
    assert gmacs(each) - gmacs(one) == pytest.approx(64 * router_macs(64) / 1e9, rel=1e-6)  # 65 tokens instead of 1


# What is computed


@pytest.mark.parametrize("width", [16, 128], ids=["1 head", "2 heads"])
def test_a_plain_block_is_pytorch_s_own(width):
    torch.manual_seed(0)
    block = Block(LayerFactory(ModelConfig(kind="dense")), width, num_heads(width)).eval()
    theirs = nn.TransformerEncoderLayer(
        width, num_heads(width), 4 * width, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True
    ).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {"in_proj": "attention.qkv", "out_proj": "attention.out", "linear1": "mlp.0", "linear2": "mlp.2"}
    state = block.state_dict()
    for name in theirs.state_dict():
        stem, kind = name.replace("self_attn.", "").replace("in_proj_", "in_proj.").rsplit(".", 1)
        theirs.state_dict()[name].copy_(state[f"{names.get(stem, stem)}.{kind}"])
    x = torch.randn(3, 7, width)
    with torch.no_grad():
        torch.testing.assert_close(block(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_patches_positions_and_class_token():
    # The same patches in another order are another image, unless positions are all the same.
    torch.manual_seed(0)
    model = small(kind="dense").double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.double)
    moved = x.roll(2, 3)  # by one patch of 2
    with torch.no_grad():
        assert (model(x) - model(moved)).abs().max() > 1e-3
        model.backbone.positions[:, 1:] = 0
        torch.testing.assert_close(model(x), model(moved))
        logits = model(x)
        model.backbone.class_token[..., 0] += 1
        assert (model(x) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("kwargs", ROUTINGS, ids=str)
def test_a_pathway_is_as_wide_as_s_dense(kwargs):
    # Forced through one expert, the routed model with S-Dense's hidden units in that expert's rows is S-Dense.
    torch.manual_seed(0)
    routed, narrow = small(**kwargs).eval(), small(kind="s-dense").eval()
    state = narrow.backbone.state_dict()
    with torch.no_grad():
        for name, module in routed.backbone.named_modules():
            if isinstance(module, MoEMLP):
                module.fc1_weight[module.rows[1]] = state.pop(f"{name}.0.weight")
                module.fc1_bias[module.rows[1]] = state.pop(f"{name}.0.bias")
                module.fc2_weight[module.rows[1]] = state.pop(f"{name}.2.weight").T
                module.fc2_bias.copy_(state.pop(f"{name}.2.bias"))
    missing, unexpected = routed.backbone.load_state_dict(state, strict=False)
    assert not unexpected and all("router" in name or "mlp.fc" in name for name in missing)
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad(), route(forced=torch.ones(3, DEPTH, dtype=torch.long)):
        torch.testing.assert_close(routed(x), narrow(x))


@pytest.mark.parametrize("kwargs", [*ROUTINGS, {"num_experts": 3}], ids=str)
def test_hard_and_masked_agree_in_outputs_and_gradients(make_vit, make_images, kwargs):
    model, x = make_vit(**kwargs).double(), make_images().double().requires_grad_()
    results = {}
    for mode in ("hard", "masked"):
        model.zero_grad()
        x.grad = None
        with route(mode) as routing:
            logits = model(x)
        F.cross_entropy(logits, torch.arange(12) % 5).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results[mode] = (logits.detach(), x.grad, gradients, routing.pathway())
    torch.testing.assert_close(results["hard"], results["masked"])
    assert any("router" in name and g.abs().sum() > 0 for name, g in results["hard"][2].items())


@pytest.mark.parametrize("kwargs", ROUTINGS, ids=str)
def test_routing_depends_on_the_image_alone(make_vit, make_images, kwargs):
    model, x = make_vit(**kwargs), make_images()
    paths = pathway(model, x)
    assert paths.shape == ((12, DEPTH, 65) if "route_per" in kwargs else (12, DEPTH))
    alone = torch.cat([pathway(model, each[None]) for each in x])
    assert torch.equal(alone, paths) and torch.equal(pathway(model, x.flip(0)).flip(0), paths)
    with torch.no_grad():
        logits = model(x)
        with route(forced=paths):
            torch.testing.assert_close(model(x), logits)
        with route(forced=1 - paths) as routing:
            assert (model(x) - logits).abs().amax(1).min() > 1e-5
    assert torch.equal(routing.pathway(), 1 - paths)
    with measuring(model, torch.device("cpu")):
        require_passed(check(model, x, torch.arange(12) % 5))


@pytest.mark.parametrize("kwargs", [{"router": "image", "num_experts": 3}, {"route_per": "token"}, {"kind": "s-dense"}])
def test_model_files_are_exact(tmp_path, kwargs):
    torch.manual_seed(0)
    model = small(**kwargs).to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 16, 16)
    model(x)  # statistics of its own
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).to(memory_format=torch.channels_last)  # in another format CPUs may round otherwise
    assert loaded.spec == model.spec
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


def test_a_description_without_route_per_is_one_per_image(tmp_path):
    save_model(small(), tmp_path)
    spec = json.loads((tmp_path / "model.json").read_text())
    assert spec.pop("route_per") == "image"
    (tmp_path / "model.json").write_text(json.dumps(spec))
    assert load_model(tmp_path).spec["route_per"] == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 200}, "model.width must be divisible by its 3 attention heads (one per 64), got 200"),
        ({"input_size": 227}, "input_size must be < 16 or divisible into 8 or more patches of 2 to 16, got 227"),
        (
            {"route_per": "token", "router": "image"},
            "model.router must be layer when model.route_per is token, got",
        ),
        (
            {"route_per": "token", "name": "resnet18"},
            "model.route_per must be image for backbones without tokens",
        ),
        ({"route_per": "patch"}, "model.route_per must be one of image, token, got 'patch'"),
    ],
    ids=str,
)
def test_errors_name_argument_rule_and_value(change, message):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "deit-tiny", "num_classes": 10, **change})
    assert str(error.value).startswith(message)


def test_images_of_another_side_are_named():
    with pytest.raises(ValueError, match=r"images must be 16 pixels on a side, .* got \(3, 16, 24\)"):
        small()(torch.rand(2, 3, 16, 24))


# How it is trained


def settings(**groups):
    base = {
        "model": {"name": "deit-tiny", "width": 8},
        "data": {"name": "digits", "image_size": 8, "val_fraction": 0.1},
        "threat": {"eps": "0.1"},
        "training": {"epochs": 1, "batch_size": 640, "step_size": 0.06, "lr": 0.05, "val_attack_steps": 1},
    }
    return Config.from_dict({name: {**base.get(name, {}), **groups.get(name, {})} for name in {*base, *groups}})


def trainer_of(config):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=generator)
    part = ImageSet(images, torch.arange(24) % 4)
    dataset = Dataset("noise", part, part, part, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3, False)
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.training.precision)
    return Trainer(config, build_model(config, dataset), dataset, fabric)


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(
    ("model", "precision"), [*((model, "32-true") for model in ROUTINGS), (ROUTINGS[0], "bf16-mixed")], ids=str
)
def test_each_level_of_advmoe_moves_its_half_and_not_one_bit_of_the_other(model, precision):
    trainer = trainer_of(settings(model=model, training={"precision": precision}))
    x, y = trainer.dataset.train.pixels(slice(None)), trainer.dataset.train.labels
    phi = {id(p) for p in split_parameters(trainer.model)[1]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in phi}
    routers = [name for name, m in trainer.model.named_modules() if m in list(routers_of(trainer.model))]
    for level in METHODS["advmoe"].levels:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        terms = trainer.step(level, x, y, torch.Generator().manual_seed(1))
        assert all(term.isfinite() for term in terms.values())
        after = trainer.model.state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        theirs = {name for name in after if any(name.startswith(f"{router}.") for router in routers)}
        assert names <= theirs
        if level.part == "routers":
            assert moved and moved <= theirs and any("running_mean" in name for name in moved)
        else:
            assert moved and not moved & theirs
            assert any("fc1_weight" in name for name in moved) and any("positions" in name for name in moved)
    assert len(trainer.use.loads()) == 2  # blocks


@pytest.fixture
def token_run(tmp_path, shallow_backbones):
    """A run of a transformer of two blocks on pictures of noise."""
    pixels = torch.randint(0, 256, (96, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(pixels.numpy()):
        folder = tmp_path / "images" / ("train" if i % 4 else "test") / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    config = settings(
        model={"route_per": "token"},
        data={"name": "folder", "root": str(tmp_path / "images"), "image_size": None},
        training={"router_objective": "codes", "codes": "random", "batch_size": 32},
    )
    return train(config, run_dir=tmp_path / "run", accelerator="cpu", threads=1)


def test_a_run_that_routes_tokens_is_logged_and_evaluated(token_run):
    line = json.loads((token_run / "metrics.jsonl").read_text())
    assert len(line["layers"]) == 2 and {"ce", "kl", "codes"} == set(line["train"]["routers"]) - {"accuracy"}
    for layer in line["layers"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-5) and 0 < layer["entropy"] <= 0.6932
    overrides = {"attack": {"steps": 2, "pathways": 2, "queries": 0}}
    evaluation = evaluate_run(
        token_run, overrides=overrides, attacks=["pgd", "pgd-soft", "routed"], num_examples=8, accelerator="cpu",
        threads=1, workers=1,
    )  # fmt: skip
    assert evaluation["worst_case"] <= evaluation["clean_accuracy"]
    assert all(each["passed"] for each in evaluation["checks"])
    _, dissected = dissect_run(token_run, overrides=overrides, num_examples=8, accelerator="cpu", threads=1)
    record = dissected["pgd-2"].to_dict()
    assert record["num_layers"] == 2 and len(record["flip_rate"]) == 2

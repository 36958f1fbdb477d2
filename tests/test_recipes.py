"""The recipes: each is a valid configuration, says what it is, and trains."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric

from advmoe.config import Config, merged
from advmoe.data import Dataset, ImageSet
from advmoe.models import find_backbone
from advmoe.models.sparse import scores_of
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting, recipe, recipe_names
from advmoe.training.phases import enter, leave, phases
from advmoe.training.trainer import Trainer, build_model

RESULTS = Path(__file__).parents[2] / "shared" / "paper" / "reported-results.json"


def test_every_recipe_is_valid() -> None:
    # All pairs but one: a transformer has no channels to prune.
    assert len(recipe_names()) == len(set(recipe_names())) == len(SETTINGS) * len(METHODS) - 1 == 119
    assert "imagenet-deit-tiny-at-sparse" not in recipe_names()
    for name in recipe_names():
        config = Config.from_dict(recipe(name))
        setting, method = next((s, m) for s in SETTINGS for m in METHODS if f"{s}-{m}" == name)
        assert config.data.name == SETTINGS[setting][0]
        kinds = {"at-dense": "dense", "at-s-dense": "s-dense", "at-sparse": "sparse"}
        assert config.model.kind == kinds.get(method, "moe")
        if setting not in ("digits", "folder"):
            assert setting == f"{config.data.name}-{config.model.name}"
            # The paper's, whatever the data; the backbone's own width.
            assert (config.model.width, config.model.scale, config.model.num_experts) == (None, 0.5, 2)
            assert config.training.alternation == "both"
            assert (config.training.attack_steps, config.training.beta, config.attack.steps) == (2, 6, 50)
        find_backbone(config.model.name)


def test_every_part_says_what_it_is() -> None:
    lines = [*map(describe_setting, SETTINGS), *map(describe_method, METHODS)]
    assert len(set(lines)) == len(lines) and all(len(line) > 20 and "\n" not in line for line in lines)
    assert describe_setting("cifar100-vgg16").startswith("VGG-16 on CIFAR-100, eps 8/255")


@pytest.mark.parametrize(
    ("data", "eps", "step", "measured"),
    [
        ("cifar10", "8/255", "5/255", "2/255"),
        ("cifar100", "8/255", "5/255", "2/255"),
        ("tiny-imagenet", "2/255", "1.25/255", "0.5/255"),
        ("imagenet", "2/255", "1.25/255", "0.5/255"),
    ],
)
def test_the_strength_of_the_attacks(data: str, eps: str, step: str, measured: str) -> None:
    config = Config.from_dict(recipe(f"{data}-wrn-28-10-at-dense"))
    strengths = (config.threat.eps, config.training.step_size, config.attack.step_size)
    assert tuple(map(str, strengths)) == (eps, step, measured)
    # Steps keep their share of the radius.
    assert [float(s) / float(config.threat.eps) for s in strengths] == pytest.approx([1, 5 / 8, 1 / 4])


@pytest.mark.skipif(not RESULTS.is_file(), reason="the paper's reported results are not beside the repository")
def test_every_row_of_the_paper_has_a_recipe() -> None:
    backbones = {"ResNet-18": "resnet18", "VGG-16": "vgg16", "DenseNet": "densenet40"}
    methods = {
        "AT (Dense)": "at-dense", "AT (S-Dense)": "at-s-dense", "AT (Sparse)": "at-sparse", "AT (MoE)": "at-moe",
        "AT (MoE), ref. [30]": "at-moe", "AdvMoE": "advmoe",
    }  # fmt: skip
    rows = json.loads(RESULTS.read_text())["rows"]
    assert len(rows) >= 50
    for row in rows:
        backbone = backbones.get(row["backbone"], row["backbone"].lower())
        name = f"{row['dataset'].lower().replace('cifar-', 'cifar')}-{backbone}-{methods[row['method']]}"
        config = Config.from_dict(recipe(name))
        assert config.model.kind == "dense" or config.model.scale == row.get("model_scale", 0.5)


def test_the_paper_s_setting() -> None:
    config = Config.from_dict(recipe("cifar10-resnet18-advmoe"))
    training = config.training
    assert (config.threat.norm, str(config.threat.eps)) == ("linf", "8/255")
    assert (training.attack_steps, str(training.step_size)) == (2, "5/255")
    assert (training.lr, training.momentum, training.weight_decay) == (0.1, 0.9, 5e-4)
    assert (training.batch_size, training.epochs, training.beta) == (128, 100, 6)
    assert (config.model.width, config.model.scale, config.model.num_experts) == (None, 0.5, 2)
    assert (config.attack.steps, config.model.router, training.router_objective) == (50, "layer", "trades")


def test_the_methods_of_the_recipes() -> None:
    kinds = {m: Config.from_dict(recipe(f"digits-{m}")) for m in METHODS}
    assert {m: (c.model.kind, c.training.method) for m, c in kinds.items()} == {
        "advmoe": ("moe", "advmoe"),
        "at-moe": ("moe", "at"),
        "at-sparse": ("sparse", "sparse"),
        "at-s-dense": ("s-dense", "at"),
        "at-dense": ("dense", "at"),
        "standard": ("moe", "standard"),
        "advmoe-image-mod": ("moe", "advmoe"),
        "advmoe-embedding-random": ("moe", "advmoe"),
    }
    mod, random = kinds["advmoe-image-mod"], kinds["advmoe-embedding-random"]
    assert (mod.model.router, mod.training.router_objective, mod.training.codes) == ("image", "codes", "mod")
    assert (random.model.router, random.training.codes) == ("embedding", "random")
    assert random.training.attack_routing == "soft"
    with pytest.raises(ValueError, match=r"^a recipe must be a setting and a method .*, got 'digits'$"):
        recipe("digits")


def noise(name: str, size: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=generator)
    part = ImageSet(images, torch.arange(8) % 4)
    return Dataset(name, part, part, part, ("a", "b", "c", "d"), (0.5,) * 3, (0.25,) * 3, True)


# They have every backbone and every method.
USUAL = [
    name for name in recipe_names() if name.startswith(("cifar10-", "digits", "imagenet-resnet18-", "imagenet-deit"))
]
OTHERS = [name for name in recipe_names() if name not in USUAL]


@pytest.mark.parametrize("name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_two_steps(name: str, request: pytest.FixtureRequest) -> None:
    if name in USUAL:  # the slow ones are as deep as they are
        request.getfixturevalue("shallow_backbones")
    width = 20 if "wrn" in name else 4  # the stem of WRN-28-10 has a tenth of it
    small = {"model": {"width": width}, "training": {"epochs": 1, "batch_size": 4}}
    config = Config.from_dict(merged(recipe(name), small))
    # Small images, but one model with the stem of large ones.
    size = 128 if name == "imagenet-resnet18-advmoe" else 16
    dataset = noise(config.data.name, size)
    run = Trainer(config, build_model(config, dataset), dataset, Fabric(accelerator="cpu", devices=1))
    for phase in phases(config):
        trainer = enter(phase, run)
        learn = scores_of(trainer.model) or list(trainer.model.parameters())
        before = [p.detach().clone() for p in learn]
        iterations: list[None] = []
        trainer.train_epoch(0, SimpleNamespace(update=lambda done=iterations: done.append(None)))
        assert len(iterations) == 2 * phase.config.training.epochs
        # What a batch's images did not choose stays; with two steps all of the rest has moved.
        moved = [not torch.equal(p, old) for p, old in zip(learn, before, strict=True)]
        assert sum(moved) > 0.8 * len(moved)
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        leave(phase, trainer, run, trainer.as_saved().state_dict())


def test_a_recipe_in_python() -> None:
    import advmoe

    plain = advmoe.recipe("digits-advmoe")
    assert plain == Config.from_dict(recipe("digits-advmoe"))
    mine = advmoe.recipe("cifar10-resnet18-advmoe", threat={"eps": "4/255"}, **{"training.epochs": 3})
    assert (mine.training.epochs, str(mine.threat.eps), str(mine.training.step_size)) == (3, "4/255", "2.5/255")
    with pytest.raises(ValueError, match="did you mean"):
        advmoe.recipe("digits-advmoe", training={"epoch": 3})
    with pytest.raises(ValueError, match=r"^epochs is no known field: did you mean training\.epochs\?$"):
        advmoe.recipe("digits-advmoe", epochs=3)
    with pytest.raises(ValueError, match=r"^training must be a group of fields, got 3$"):
        advmoe.recipe("digits-advmoe", training=3)
    assert advmoe.recipe("digits-advmoe", training=None) == plain

"""The pieces of a loop of one's own (`advmoe.training`), and that the tutorial's loop is `Trainer`'s to the bit."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from lightning_fabric import Fabric

import advmoe.training
from advmoe.config import Config
from advmoe.data import Dataset, ImageSet
from advmoe.errors import InputError
from advmoe.tables import Level
from advmoe.training import build_model, learning, levels, split_parameters
from advmoe.training.trainer import Trainer

DOCS = Path(__file__).parents[2] / "docs"
TUTORIAL = DOCS / "tutorials" / "own-loop.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
(LOOP,) = [block for block in BLOCKS if "def fit(" in block]


def images(number, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (number, channels, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(number) % 4)


def tiny(channels=1, **training):
    """A configuration and four classes of noise."""
    groups = {
        "model": {"name": "wrn-10-1", "width": 4, "experts_init": "shared"},
        "data": {"augment": False},
        "threat": {"eps": "0.1"},
        "training": {"alternation": "both", "epochs": 2, "batch_size": 30, "attack_steps": 1, "lr": 0.1, **training},
    }
    train, test = images(70, channels, 0), images(4, channels, 1)
    classes, mean = ("a", "b", "c", "d"), (0.5,) * channels
    data = Dataset("noise", train, test.subset(torch.arange(0)), test, classes, mean, mean, flip=False)
    return Config.from_dict(groups), data


def by_trainer(config, data):
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.launch()
    trainer = Trainer(config, build_model(config, data), data, fabric)

    class Bar:
        def update(self):
            pass

    for epoch in range(config.training.epochs):
        trainer.train_epoch(epoch, Bar())
    return trainer.model.state_dict()


def by_tutorial(config, data, loop=LOOP):
    names = {}
    exec(compile(loop, str(TUTORIAL), "exec"), names)
    model = build_model(config, data).to(memory_format=torch.channels_last)
    names["fit"](model, data, config)
    return model.state_dict()


def differing(state, other):
    assert state.keys() == other.keys()
    return {name for name in state if not torch.equal(state[name], other[name])}


@pytest.fixture(scope="module")
def arrived():
    """Where `Trainer` arrives by Algorithm 1."""
    return by_trainer(*tiny())


def test_the_tutorial_s_loop_is_the_trainer_s_to_the_bit(arrived):
    config, data = tiny()
    assert not differing(by_tutorial(config, data), arrived)
    # Both levels have learnt: all parameters have moved.
    start = build_model(config, data)
    assert {name for name, _ in start.named_parameters()} <= differing(start.state_dict(), arrived)


def test_so_it_is_in_colour_with_another_seed_and_with_levels_that_share_an_attack():
    config, data = tiny(channels=3, alternation="shared-every-2", seed=3)
    assert not differing(by_tutorial(config, data), by_trainer(config, data))


@pytest.mark.parametrize(
    ("part", "other"), [("model, level.part", "model, 'all'"), ("training.cosine(step,", "training.cosine(step + 1,")]
)
def test_a_loop_that_departs_from_it_arrives_elsewhere(arrived, part, other):
    assert LOOP.count(part) == 1
    assert differing(by_tutorial(*tiny(), LOOP.replace(part, other)), arrived)


def test_it_is_25_lines():
    assert len(LOOP.splitlines()) <= 25


def test_the_names_are_public_and_each_has_its_place_in_the_reference():
    public = [getattr(advmoe.training, name) for name in advmoe.training.__all__]
    assert (
        {"Level", "learning", "levels", "split_parameters", "trades", "trades_attack"}
        <= set(advmoe.training.__all__)
        <= set(dir(advmoe.training))
    )
    described = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "training.md").read_text(), re.MULTILINE)
    assert sorted(map(repr, map(resolve_name, described))) == sorted(map(repr, public))
    assert all(each.__doc__ for each in public)
    with pytest.raises(AttributeError, match=r"^module 'advmoe.training' has no attribute 'leanring'$"):
        advmoe.training.leanring  # noqa: B018


def test_levels_by_name():
    assert levels() == (Level("routers"), Level("experts", batch=1))
    assert levels("advmoe", "every-4") == (Level("routers", every=4), Level("experts", batch=1))
    assert levels("standard") == (Level("all", adversarial=False),)
    for words, message in (
        (("advmo",), r"^training.method must be one of standard, at, .*, got 'advmo'"),
        (("advmoe", "bothh"), r"^training.alternation must be one of both, .*, got 'bothh'"),
    ):
        with pytest.raises(InputError, match=message):
            levels(*words)


def test_a_part_that_the_model_lacks_is_named():
    plain = torch.nn.Linear(2, 2)
    assert split_parameters(plain) == (list(plain.parameters()), [])
    for part in ("routers", "expert"):
        rule = rf"^part must be one of all, experts of this model, got '{part}'$"
        with pytest.raises(InputError, match=rule), learning(plain, part):
            pass

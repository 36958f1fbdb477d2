"""Work counted by hand: passes of a training run, of an evaluation, and of a study's tasks."""

import pytest

from advmoe.config import Config
from advmoe.studies.estimate_work import KNOWN, Network, Shape, attacking, shape_of, training, works
from advmoe.studies.rows import Measure, Row

SHAPE = Shape(train=1000, test=200, channels=3, size=32, classes=10)


def config(kind="dense", **training_fields):
    usual = {"method": "at", "epochs": 3, "batch_size": 90, "attack_steps": 2, "val_attack_steps": 5}
    return Config.from_dict({
        "model": {"kind": kind, "width": 8}, "data": {"name": "cifar10", "val_fraction": 0.1},
        "training": {**usual, **training_fields}, "attack": {"steps": 10, "pathways": 2, "queries": 100},
    })  # fmt: skip


def by_kind(passes):
    kinds = {}
    for (_, kind), number in passes.items():
        if number:
            kinds[kind] = kinds.get(kind, 0) + number
    return kinds


def test_a_plain_run_attacks_each_image_and_trains_on_it_once_an_epoch():
    # 900 images in 10 batches of 90; 100 held out, attacked by 5 steps after each of 3 epochs.
    assert by_kind(training(config(), SHAPE)) == {
        "train": 2700, "forward": 2700 + 2 * 300, "gradient": 2 * 2700 + 5 * 300,
    }  # fmt: skip
    clean = by_kind(training(config(method="standard"), SHAPE))
    assert clean == {"train": 1350, "forward": 600, "gradient": 1500}


@pytest.mark.parametrize(("alternation", "train", "attacked"), [("both", 2, 2), ("shared-attack", 2, 1)])
def test_levels_on_one_batch_share_its_attack(alternation, train, attacked):
    made = by_kind(training(config("moe", method="advmoe", alternation=alternation), SHAPE))
    assert made["train"] == 2700 * train
    assert made["gradient"] == 2700 * 2 * attacked + 1500 and made["soft"] == 1500


def test_soft_inner_attacks_are_soft_passes():
    assert by_kind(training(config("moe", attack_routing="soft"), SHAPE))["soft"] == 2 * 2700 + 1500


def test_a_sparse_run_has_three_networks():
    made = training(config("sparse", method="sparse", prune_epochs=1, finetune_epochs=2), SHAPE)
    trained = {network.model.split('"kind": "')[1].split('"')[0]: n for (network, k), n in made.items() if k == "train"}
    assert trained == {"dense": 2700, "sparse": 900, "s-dense": 1800}


def test_an_evaluation_makes_the_steps_of_its_attacks():
    assert by_kind(attacking(config(), SHAPE, ["pgd"], 50)) == {"forward": 100, "gradient": 500}
    assert by_kind(attacking(config("moe"), SHAPE, None, 50)) == {"forward": 150, "gradient": 500, "soft": 500}
    # routed: 10 ascents of 10 steps and 2 + 16 pathways of 10, of which half; nothing for a plain model
    routed = by_kind(attacking(config("moe"), SHAPE, ["routed"], 50))
    assert routed == {"gradient": 50 * (100 + 180) / 2, "forward": 50 + 50 * 100 / 2}
    assert by_kind(attacking(config(), SHAPE, ["routed"], 50)) == {"forward": 50}
    standard = by_kind(attacking(config(), SHAPE, ["autoattack"], 50))
    assert standard == {"gradient": 50 * 2800 / 2, "forward": 50 + 50 * 5900 / 2}


def test_images_of_known_sets_need_not_be_there():
    assert shape_of(config()) == KNOWN["cifar10"]
    assert shape_of(Config.from_dict({"data": {"name": "digits", "image_size": 8}})).classes == 10


def test_a_study_s_tasks_are_counted_but_those_that_are_finished(planner, tiny_run, record):
    run = tiny_run("one")
    measures = {
        "evaluate": Measure("evaluate", {"attacks": ["pgd-4"], "num_examples": 30}),
        "sweep": Measure("sweep", {"attacks": ["pgd-4"], "num_examples": 30, "epsilons": [0, 0.1, 0.2]}),
        "cost": Measure("cost", {"batches": [2], "seconds": 0.5}),
    }
    tasks = planner.tasks(planner.rows([Row(run, measures)]))
    train, evaluate, sweep, cost = works(tasks)
    assert [work.kind for work in (train, evaluate, sweep, cost)] == ["train", "evaluate", "sweep", "cost"]
    assert evaluate.needs == (train.id,) and cost.alone and cost.seconds == 5 + 2 * 2 * 0.5
    assert by_kind(evaluate.passes) == {"forward": 60, "gradient": 120}
    assert by_kind(sweep.passes) == {"forward": 120, "gradient": 240}
    (network,) = train.weights
    assert network == Network.of(Config.from_dict(tasks[train.id].config), Shape(0, 0, 1, 8, 10))
    record(tasks[train.id], [])
    assert [work.kind for work in works(tasks)] == ["evaluate", "sweep", "cost"]

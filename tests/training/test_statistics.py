"""Statistics of what stays fixed: estimated anew, kept or followed; values by hand, and whole runs."""

import shutil

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn

from advmoe.config import Config
from advmoe.data import ImageSet, load_dataset
from advmoe.models import create_model
from advmoe.models.runs import load_run
from advmoe.moe import routers_of
from advmoe.training.model import build_model
from advmoe.training.phases import enter, phases
from advmoe.training.run import load_data, resume, train
from advmoe.training.statistics import fixed_norms, refresh, sampled
from advmoe.training.trainer import Trainer

TINY = {
    "model": {"name": "wrn-10-1", "width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.2, "train_examples": 80},
    "threat": {"eps": "0.1"},
    "training": {"epochs": 2, "batch_size": 20, "step_size": 0.06, "val_attack_steps": 1, "attack_steps": 1},
}
THREADS = {"accelerator": "cpu", "threads": 1}
SPARSE = {"model": {"kind": "sparse"}, "training": {"prune_epochs": 1, "finetune_epochs": 1}}


def tiny(method, training=(), **groups):
    groups = {**groups, "training": {"method": method, **dict(training)}}
    return Config.from_dict({name: {**fields, **groups.get(name, {})} for name, fields in TINY.items()})


def trainer_of(method, **training):
    """A trainer whose model starts from weights of its own; of `sparse` that of its second phase."""
    more = SPARSE if method == "sparse" else {"training": {}}
    own = more["training"] if method == "sparse" else {"init_from": "of no matter"}
    model = {**TINY["model"], "experts_init": "independent", **more.get("model", {})}
    config = tiny(method, {"lr": 0.5, **own, **training}, model=model)  # so that another routing gives other statistics
    dataset = load_dataset("digits", image_size=8, val_fraction=0.2, train_examples=80)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    trainer = Trainer(config, build_model(config, dataset, resumed=True), dataset, fabric)
    return enter(phases(config)[1], trainer) if method == "sparse" else trainer


class Bar:
    def update(self):
        pass


class TwoWays(nn.Module):
    """Doubles pixels above a threshold, which is its choice, and normalises."""

    def __init__(self):
        super().__init__()
        self.norm, self.after, self.threshold = nn.BatchNorm2d(1), nn.BatchNorm2d(1), 0.3

    def forward(self, x):
        return self.after(self.norm(torch.where(x > self.threshold, 2 * x, x)))


def one_pixel(*values):
    images = torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return ImageSet(images, torch.zeros(len(values), dtype=torch.int64))


def test_a_mean_and_a_variance_by_hand():
    model, images = TwoWays(), one_pixel(0, 51, 102, 255)  # 0, 0.2, 0.4, 1
    refresh(model, [model.norm], images, batch_size=4, seed=0)
    assert model.norm.running_mean.item() == pytest.approx((0 + 0.2 + 0.8 + 2) / 4)
    assert model.norm.running_var.item() == pytest.approx((0.75**2 + 0.55**2 + 0.05**2 + 1.25**2) / 3)
    model.threshold = 0.9  # another choice: 0, 0.2, 0.4, 2
    refresh(model, [model.norm], images, batch_size=4, seed=0)
    assert model.norm.running_mean.item() == pytest.approx(0.65)
    # What it sees is normalised by the batch; what follows, which is not named, goes by the statistics that it has.
    assert (model.after.running_mean.item(), model.after.running_var.item()) == (0, 1)


def test_an_estimate_is_the_mean_over_batches_and_leaves_all_else():
    model, images = TwoWays(), one_pixel(*range(0, 250, 50))
    model.norm.momentum, model.norm.running_mean[0] = None, torch.nan  # which no average forgets
    modes = [module.training for module in model.modules()]
    refresh(model, [model.norm], images, batch_size=2, seed=3)
    batches = [images.pixels(index).flatten() for index in sampled(images, 2, 3)]
    assert [len(batch) for batch in batches] == [2, 2]  # what is left over makes no batch
    seen = [torch.where(batch > 0.3, 2 * batch, batch) for batch in batches]
    torch.testing.assert_close(model.norm.running_mean, sum(batch.mean() for batch in seen)[None] / 2)
    torch.testing.assert_close(model.norm.running_var, sum(batch.var() for batch in seen)[None] / 2)
    assert model.norm.momentum is None and model.norm.num_batches_tracked == 0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.norm.weight, torch.ones(1))


def test_the_mean_that_is_a_learnt_router_s_threshold_is_estimated_too():
    model = create_model("resnet18", num_classes=2, width=4, in_channels=1, input_size=8, router="linear").eval()
    images = ImageSet(torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.zeros(60, dtype=torch.int64))
    (batch,) = sampled(images, 60, 0)
    expected = model.router.projections(images.pixels(batch)).mean(0)
    refresh(model, [model.router.centre], images, batch_size=60, seed=0)
    torch.testing.assert_close(model.router.thresholds, expected.detach())
    assert not any(module.training for module in model.modules())


def test_batches_are_of_the_same_images_each_time_and_of_at_most_so_many():
    images = one_pixel(*[0] * 3000)
    batches = sampled(images, 1000, 0)
    assert [len(batch) for batch in batches] == [1000, 1000] and len(torch.cat(batches).unique()) == 2000
    assert all(torch.equal(a, b) for a, b in zip(batches, sampled(images, 1000, 0), strict=True))
    assert not torch.equal(batches[0], sampled(images, 1000, 1)[0])
    assert [len(batch) for batch in sampled(images, 2500, 0)] == [2500]
    assert [len(batch) for batch in sampled(one_pixel(0, 0, 0), 8, 0)] == [3]


def test_norms_without_statistics_and_of_what_learns_are_none():
    trainer = trainer_of("at-routers")
    routers = {id(module) for router in routers_of(trainer.model) for module in router.modules()}
    for part, among in (("routers", False), ("experts", True)):
        norms = fixed_norms(trainer.model, part)
        assert norms and {id(norm) in routers for norm in norms} == {among}
    assert fixed_norms(trainer.model, "all") == []
    assert fixed_norms(nn.BatchNorm2d(3, track_running_stats=False), "routers") == []
    refresh(trainer.model, [], None, 2, 0)  # which reads no image


def statistics(norms):
    return [value.clone() for norm in norms for value in (norm.running_mean, norm.running_var)]


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("method", ["at-routers", "at-experts", "sparse"])
def test_what_each_choice_leaves_of_the_fixed_part(method):
    for choice in ("keep", "running", "refresh"):
        trainer = trainer_of(method, frozen_norms=choice)
        part = trainer.levels[0].part
        norms = fixed_norms(trainer.model, part)
        learnt = {id(p) for group in trainer.optimizers[part].param_groups for p in group["params"]}
        still = {name: p.clone() for name, p in trainer.model.named_parameters() if id(p) not in learnt}
        before = statistics(norms)
        trainer.train_epoch(0, Bar())
        trained = statistics(norms)
        trainer.validate()
        after = statistics(norms)
        parameters = dict(trainer.model.named_parameters())
        assert still and all(torch.equal(p, parameters[name]) for name, p in still.items())
        if choice == "keep":
            assert all(same(before, trained)) and all(same(before, after))
        elif choice == "running":
            assert not any(same(before, trained)) and all(same(trained, after))
        else:  # before the first epoch, and before the validation
            assert not any(same(before, trained)) and not all(same(trained, after))
            refresh(trainer.model, norms, trainer.train_set, 20, trainer.config.training.seed)
            assert all(same(after, statistics(norms)))


def test_the_default_refreshes_and_leaves_other_methods_as_they_were():
    chosen = {method: tiny(method, {"init_from": "x"}).training.fixed_norms for method in ("at-routers", "at-experts")}
    assert chosen == dict.fromkeys(chosen, "refresh")
    for method in ("standard", "at", "advmoe"):
        config = tiny(method, {"frozen_norms": "running"})
        assert config.training.fixed_norms is None and "training.frozen_norms" in config.idle()
    trainer = trainer_of("sparse")
    assert (trainer.config.training.fixed_norms, trainer.follow) == ("running", True)


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    return train(tiny("standard", {"epochs": 1}), run_dir=tmp_path_factory.mktemp("runs") / "standard", **THREADS)


def assert_fits(run):
    """The statistics in a run are those of the weights beside them."""
    model, config = load_run(run), Config.load(run / "config.yaml")
    norms = fixed_norms(model, "routers" if config.training.method == "at-routers" else "experts")
    kept = statistics(norms)
    refresh(model, norms, load_data(config).train, config.training.batch_size, config.training.seed)
    torch.testing.assert_close(kept, statistics(norms), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_ends_bit_identical_and_fits(standard, tmp_path):
    more = {"init_from": str(standard), "ema": 0.9}
    whole = train(tiny("at-routers", more), run_dir=tmp_path / "whole", **THREADS)
    shutil.copytree(whole, run := tmp_path / "run")
    shutil.rmtree(run / "last")  # as if stopped after the best of the epochs
    resume(run)
    for name in ("last/model.safetensors", "model.safetensors"):
        there, expected = load_file(run / name), load_file(whole / name)
        assert all(torch.equal(there[key], expected[key]) for key in expected)
    assert_fits(whole)


@pytest.mark.slow
def test_processes_agree_on_what_fits(standard, tmp_path):
    config = tiny("at-experts", {"init_from": str(standard), "epochs": 1})
    assert_fits(train(config, run_dir=tmp_path / "run", devices=2, **THREADS))

"""What every training method and alternation promises: a new entry of the tables is tested by being there."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.moe import routers_of
from advmoe.tables import ALTERNATIONS, METHODS, Alternation, Level, Method
from advmoe.training.methods import parts_of
from advmoe.training.trainer import Trainer, build_model

pytestmark = pytest.mark.usefixtures("shallow_backbones")

GROUPS = {
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.2, "train_examples": 80},
    "threat": {"eps": "0.1"},
}
TRAINING = {"epochs": 2, "batch_size": 20, "attack_steps": 1, "step_size": 0.06, "val_attack_steps": 1}


@dataclass(frozen=True)
class Case:
    """A method on one kind of network and, where it alternates, an alternation."""

    method: str
    kind: str = "moe"
    alternation: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method, self.kind, self.alternation)))

    def trainer(self, seed: int = 0) -> "Watched":
        """A trainer of a small network that has not been trained."""
        training = {**TRAINING, "method": self.method, "seed": seed}
        if self.alternation is not None:
            training["alternation"] = self.alternation
        if METHODS[self.method].start:
            training["init_from"] = "a run"  # of which nothing is read below
        model = {"width": 4, "kind": self.kind}
        config = Config.from_dict({"model": model, "training": training, **GROUPS})
        dataset = load_dataset("digits", image_size=8, val_fraction=0.2, train_examples=80, seed=seed)
        fabric = Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        return Watched(config, build_model(config, dataset, resumed=True), dataset, fabric)


def cases() -> list[Case]:
    """Every method on the kinds that it trains, and AdvMoE's with every alternation."""
    found = []
    for name, method in METHODS.items():
        if method.kind is not None:
            found.append(Case(name, method.kind))
        elif name == "advmoe":
            found += [Case(name, alternation=each) for each in ALTERNATIONS.examples()]
        else:
            found += [Case(name), *([] if method.apart else [Case(name, "dense")])]
    return found


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Watched(Trainer):
    """A trainer that looks at what each update changes, and at the loss that it follows."""

    def step(self, level, x, y, generator, x_adv=None):
        before, parts = state(self.model), parts_of(self.model)
        terms = super().step(level, x, y, generator, x_adv)
        after = state(self.model)
        assert terms and all(term.isfinite() for term in terms.values())
        assert all(tensor.isfinite().all() for tensor in after.values())
        changed = {name for name in before if not before[name].equal(after[name])}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        allowed = {names[id(p)] for part, those in parts.items() if level.part in ("all", part) for p in those}
        moved = changed & set(names.values())
        assert moved and moved <= allowed, (level.part, moved - allowed)
        # Running statistics: of routers they move with routers alone, all others with anything else.
        inside = {id(buffer) for router in routers_of(self.model) for buffer in router.buffers()}
        still = {"experts": True, "routers": False}
        for name, buffer in self.model.named_buffers():
            if level.part in still and (id(buffer) in inside) == still[level.part]:
                assert name not in changed, (level.part, name)
        self.updated = {*getattr(self, "updated", ()), level.part}
        return terms


class Bar:
    """A progress bar that shows nothing."""

    def update(self) -> None:
        pass


# The checks: each takes a case, and raises AssertionError where it breaks the promise.


def updates_change_what_they_say(case: Case) -> None:
    """Each update has a finite loss and changes its part alone, bit for bit; every part that is named has its turn."""
    trainer = case.trainer()
    trainer.train_epoch(0, Bar())
    assert trainer.updated == {level.part for level in trainer.levels}


def the_seed_decides_everything(case: Case) -> None:
    """Two trainings of one seed end in the same weights to the bit, and one of another seed does not."""
    ends = []
    for seed in (0, 0, 1):
        trainer = case.trainer(seed)
        torch.manual_seed(len(ends))  # nothing is drawn from PyTorch's own generator
        trainer.train_epoch(0, Bar())
        ends.append(state(trainer.model))
    first, again, other = ends
    assert all(first[name].equal(again[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


CHECKS = [updates_change_what_they_say, the_seed_decides_everything]


@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_every_entry(check, case):
    check(case)


def test_every_family_has_an_example():
    assert all(family.example for family in ALTERNATIONS.families)


# Faults, which are caught

NEVER = (Level("experts"), Level("routers", every=10_000, turn=9_999))
"""A fault: the routers' level has no iteration in a run of this size."""


def test_a_method_one_of_whose_levels_never_runs_is_caught(monkeypatch):
    monkeypatch.setitem(METHODS, "planted", Method(NEVER, "Planted", "never"))
    with pytest.raises(AssertionError):
        updates_change_what_they_say(Case("planted"))


def test_an_alternation_one_of_whose_levels_never_runs_is_caught(monkeypatch):
    monkeypatch.setitem(ALTERNATIONS, "planted", Alternation(NEVER))
    with pytest.raises(AssertionError):
        updates_change_what_they_say(Case("advmoe", alternation="planted"))


def test_statistics_that_move_with_the_other_part_are_caught(monkeypatch):
    monkeypatch.setattr("advmoe.training.trainer.learning", lambda model, part, **how: nullcontext(model.train()))
    with pytest.raises(AssertionError):
        updates_change_what_they_say(Case("at-experts"))


def test_an_attack_that_draws_from_no_seed_is_caught(monkeypatch):
    attack, own = Trainer.attack, torch.Generator()
    monkeypatch.setattr(
        Trainer, "attack", lambda self, x, *rest: attack(self, x, *rest) * torch.rand((), generator=own)
    )
    with pytest.raises(AssertionError):
        the_seed_decides_everything(Case("at"))

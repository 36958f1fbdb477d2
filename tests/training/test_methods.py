"""Who learns when: the table of methods, their schedules, and that what does not learn is fixed bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from advmoe.config import TrainingConfig
from advmoe.models import create_model, split_parameters
from advmoe.models.convert import to_moe
from advmoe.moe import routers_of
from advmoe.tables import METHODS, Level
from advmoe.training.methods import epoch_plan, learning, parts_of
from advmoe.training.objectives import trades
from advmoe.training.schedule import batches

ROUTERS = ["layer", "embedding", "image"]


def test_the_table_of_methods():
    levels = {name: [(level.part, level.adversarial) for level in method.levels] for name, method in METHODS.items()}
    assert levels == {
        "standard": [("all", False)],
        "at": [("all", True)],
        "at-routers": [("routers", True)],
        "at-experts": [("experts", True)],
        "sparse": [("scores", True)],
        "advmoe": [("routers", True), ("experts", True)],  # the lower level comes first
    }
    assert METHODS["at"].levels == (Level("all"),)


def plan_of(alternation, epoch=0, num_images=70, batch_size=10):
    """Per iteration, each batch as (its images, the parts that learn from it)."""
    levels = TrainingConfig(alternation=alternation).levels()
    plan = epoch_plan(levels, num_images, batch_size, seed=0, epoch=epoch)
    return [[(index.tolist(), tuple(level.part for level in on)) for index, on in run] for run in plan]


def seen(plan, part):
    """The images that `part` learns from, in order."""
    return [image for run in plan for index, parts in run if part in parts for image in index]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_levels_and_both_is_the_paper_s(method):
    config = TrainingConfig(method=method, alternation="both", init_from="somewhere")
    levels = METHODS[method].levels
    assert config.levels() == levels
    plan = epoch_plan(levels, 70, 10, seed=0, epoch=3)
    expected = batches(70, 10, seed=0, epoch=3, levels=len(levels))
    assert [[index.tolist() for index, _ in run] for run in plan] == [[b.tolist() for b in each] for each in expected]
    assert all([on for _, on in run] == [(level,) for level in levels] for run in plan)


@pytest.mark.parametrize("alternation", ["both", "warm-start"])
def test_both_levels_on_batches_of_their_own(alternation):
    plan = plan_of(alternation)
    assert [[parts for _, parts in run] for run in plan] == [[("routers",), ("experts",)]] * 7
    assert sorted(seen(plan, "routers")) == sorted(seen(plan, "experts")) == list(range(70))
    assert all(not set(routers) & set(experts) for (routers, _), (experts, _) in plan)
    assert all(
        level.warm == (alternation == "warm-start") for level in TrainingConfig(alternation=alternation).levels()
    )


def test_a_shared_attack_has_both_levels_on_one_batch():
    plan = plan_of("shared-attack")
    assert [[parts for _, parts in run] for run in plan] == [[("routers", "experts")]] * 7
    assert sorted(seen(plan, "routers")) == list(range(70))


def test_iterations_take_turns_over_the_whole_run():
    # Seven iterations an epoch: the second epoch begins with the level that the first did not end with.
    plans = [plan_of("by-iteration", epoch) for epoch in (0, 1)]
    parts = [part for plan in plans for run in plan for _, (part,) in run]
    assert parts == ["routers", "experts"] * 7
    for plan in plans:
        assert sorted(seen(plan, "routers") + seen(plan, "experts")) == list(range(70))


def test_routers_every_fourth_iteration_on_a_batch_of_their_own():
    plans = [plan_of("every-4", epoch) for epoch in range(4)]
    turns = [[parts for _, parts in run] for plan in plans for run in plan]
    assert turns == ([[("routers",), ("experts",)]] + [[("experts",)]] * 3) * 7
    for plan in plans:
        assert sorted(seen(plan, "experts")) == list(range(70))
        assert len(set(seen(plan, "routers"))) in (10, 20)
        assert all(not set(run[0][0]) & set(run[1][0]) for run in plan if len(run) == 2)
    assert len({tuple(seen(plan, "routers")) for plan in plans}) == 4


def test_routers_every_third_iteration_on_the_experts_batch():
    plans = [plan_of("shared-every-3", epoch) for epoch in range(3)]
    turns = [[parts for _, parts in run] for plan in plans for run in plan]
    assert turns == ([[("routers", "experts")]] + [[("experts",)]] * 2) * 7
    assert all(sorted(seen(plan, "experts")) == list(range(70)) for plan in plans)


def halves(model):
    """State (parameters and buffers) of the experts' and of the routers' half, by name."""
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("normalize")}
    phi = {name for name in state if "router" in name}
    assert phi and phi < set(state)
    assert sum(p.numel() for r in routers_of(model) for p in r.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if name in phi
    )
    return {"experts": {n: state[n] for n in state if n not in phi}, "routers": {n: state[n] for n in phi}}


def train_once(model, part, make_images):
    psi, phi = split_parameters(model)
    optimizers = {"experts": torch.optim.SGD(psi, lr=0.1), "routers": torch.optim.SGD(phi, lr=0.1)}
    with learning(model, part):
        terms, *_ = trades(model, make_images(16), make_images(16, seed=2), torch.arange(16) % 5, beta=6.0)
        sum(terms.values()).backward()
    for name, optimizer in optimizers.items():
        if part in (name, "all"):
            optimizer.step()
    # Nothing of the fixed half may have as much as a gradient.
    for name, parameters in (("experts", psi), ("routers", phi)):
        assert all((p.grad is not None) == (part in (name, "all")) for p in parameters)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("part", ["routers", "experts", "all"])
def test_one_part_moves_and_the_rest_does_not(make_routed, make_images, part, router):
    model = make_routed(router=router)
    before = halves(model)
    train_once(model, part, make_images)
    after = halves(model)
    for half in ("experts", "routers"):
        moved = {name for name, value in after[half].items() if not torch.equal(value, before[half][name])}
        if part not in (half, "all"):
            assert not moved
            continue
        assert moved == set(after[half]), set(after[half]) - moved
        assert any("running_mean" in name for name in moved) and any("weight" in name for name in moved)


@pytest.mark.parametrize("part", ["routers", "experts", "all"])
def test_nothing_is_recorded_where_that_is_not_wanted(make_routed, make_images, part):
    model = make_routed()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), learning(model, part):
        recorded = model(make_images())
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.load_state_dict(before, strict=False)
    with torch.no_grad(), learning(model, part, record=False):
        assert torch.equal(model(make_images()), recorded)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("part", ["routers", "experts", "all"])
def test_flags_come_back(make_routed, part):
    model = make_routed()
    model.train().backbone.stem.eval()
    frozen = model.backbone.classifier.bias.requires_grad_(False)
    norm = model.backbone.blocks[0].norm1
    norm.track_running_stats = False

    def flags():
        modules = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
        return modules, [p.requires_grad for p in model.parameters()]

    before = flags()
    with pytest.raises(RuntimeError, match="planned"), learning(model, part):
        psi, phi = split_parameters(model)
        assert all(m.training for m in model.modules())
        assert {p.requires_grad for p in psi if p is not frozen} == {part != "routers"}
        assert not frozen.requires_grad  # by the user, whatever the part
        assert {p.requires_grad for p in phi} == {part != "experts"}
        raise RuntimeError("planned")
    assert flags() == before


@pytest.mark.parametrize("part", ["routers", "experts"])
def test_fixed_norms_normalise_by_the_batch(make_routed, make_images, part):
    model, x = make_routed(), make_images()
    with torch.no_grad(), learning(model, part):
        within = model(x)
    with torch.no_grad():
        assert torch.equal(model.train()(x), within)
        assert not torch.allclose(model.eval()(x), within, atol=1e-3)


def test_a_plain_model_learns_whole():
    model = create_model("resnet18", kind="dense", num_classes=3, width=4).eval()
    with learning(model, "all"):
        model(torch.rand(4, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.training and model.backbone.blocks[0].norm1.num_batches_tracked == 1


def test_scores_learn_under_weights_that_are_fixed_and_statistics_that_are_not(make_images):
    torch.manual_seed(0)
    model = create_model("resnet18", kind="sparse", num_classes=5, width=4, input_size=16).train()
    parts = parts_of(model)
    assert parts["routers"] == [] and parts["scores"] == list(model.backbone.scores)
    assert len(parts["experts"]) + len(parts["scores"]) == len(list(model.parameters()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = {part: torch.optim.SGD(p, lr=0.1, weight_decay=0.1) for part, p in parts.items() if p}
    with learning(model, "scores"):
        terms, *_ = trades(model, make_images(16), make_images(16, seed=2), torch.arange(16) % 5, beta=6.0)
        sum(terms.values()).backward()
    assert all(p.grad is None for p in parts["experts"])
    optimizers["scores"].step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert moved == statistics | {name for name in before if ".scores." in name}


def test_norms_of_other_kinds_that_are_fixed_keep_their_buffers(make_images):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True), spectral_norm(nn.Conv2d(8, 8, 3))]
    model = to_moe(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    own = {name for name, _ in model.named_buffers() if "running_" in name or "_u" in name}
    assert any("backbone.1." in name for name in own) and any("backbone.2." in name for name in own)

    def moved(part, *, record=True):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with learning(model, part, record=record):
            model(make_images(16))
        return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}

    assert moved("routers") and all(".router." in name for name in moved("routers"))
    assert any("backbone.1." in name for name in moved("experts"))
    assert moved("all", record=False) == set()


def test_an_epoch_that_cannot_be_is_refused():
    for changed, message in (
        ({"batch_size": -3}, "batch_size must be a whole number >= 1, got -3"),
        ({"num_images": 0}, "num_images must be a whole number >= 1, got 0"),
        ({"epoch": -1}, "epoch must be a whole number >= 0, got -1"),
        ({"levels": ()}, "levels must be one at least, got none"),
    ):
        given = {
            "levels": METHODS["advmoe"].levels,
            "num_images": 20,
            "batch_size": 4,
            "seed": 0,
            "epoch": 0,
            **changed,
        }
        with pytest.raises(ValueError, match=f"^{message}"):
            epoch_plan(**given)

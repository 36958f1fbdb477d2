"""Training's options: which attacks and updates they make, what they leave fixed, and that runs with them resume."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from advmoe.attacks import trades_attack
from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.models import split_parameters
from advmoe.models.compiled import compiled
from advmoe.models.modes import frozen
from advmoe.moe import routers_of
from advmoe.tables import METHODS, Level
from advmoe.training import trainer as trainers
from advmoe.training.methods import learning
from advmoe.training.midway import Midway
from advmoe.training.objectives import trades
from advmoe.training.run import resume, train
from advmoe.training.trainer import Trainer, build_model

pytestmark = pytest.mark.usefixtures("shallow_backbones")

SMALL = {
    "model": {"width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.2, "train_examples": 80},
    "threat": {"eps": "0.1"},
    "training": {"epochs": 3, "batch_size": 20, "step_size": 0.06, "val_attack_steps": 2},
}
THREADS = {"accelerator": "cpu", "threads": 1}
ROUTERS, EXPERTS = METHODS["advmoe"].levels
ALTERNATIONS = ["both", "shared-attack", "by-iteration", "every-2", "shared-every-2", "warm-start"]


def named(level):
    return level.part if level.adversarial else "standard"


class Bar:
    """Counts iterations."""

    done = 0

    def update(self):
        self.done += 1


def small(training=(), **groups):
    groups = {**groups, "training": dict(training)}
    return Config.from_dict({name: {**SMALL.get(name, {}), **groups.get(name, {})} for name in {*SMALL, *groups}})


def make(training=(), **groups):
    """A trainer and a batch of its images."""
    config = small(training, **groups)
    data = config.data
    dataset = load_dataset("digits", image_size=data.image_size, val_fraction=0.2, train_examples=data.train_examples)
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.training.precision)
    fabric.launch()
    trainer = Trainer(config, build_model(config, dataset), dataset, fabric)
    x = dataset.train.pixels(slice(0, 24)).contiguous(memory_format=torch.channels_last)
    return trainer, x, dataset.train.labels[:24]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_sums_of_an_epoch_are_shared_out_among_another_number_of_processes():
    half, x, y = make()
    half.step(ROUTERS, x, y, seeded())
    one = Midway.now(half, 1, seeded())
    # As of two processes, of which the other had three times the images, with losses four times as large.
    more = {name: each * (12 if "sum" in name else 3) for name, each in one.of_all.items()}
    of_two = Midway(1, {name: torch.cat([each, more[name]]) for name, each in one.of_all.items()})
    on, _, _ = make()
    of_two.restore(on, seeded())
    assert on.means.counts == {"routers": 4 * half.means.counts["routers"]}
    before, after = (each.means.report(each.fabric)["routers"] for each in (half, on))
    assert after == pytest.approx({name: value * 13 / 4 for name, value in before.items()})
    assert torch.equal(on.use.counts, 4 * half.use.counts)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def phi(names):
    return {name for name in names if ".router." in name}


@pytest.fixture
def watched(monkeypatch):
    """Every attack, as its images, start and result; and every update, as its part and adversarial images."""
    attacks, updates = [], []
    attack, step = Trainer.attack, Trainer.step

    def attacking(self, x, generator, earlier=None, y=None):
        x_adv = attack(self, x, generator, earlier, y)
        attacks.append((x, earlier, x_adv))
        return x_adv

    def stepping(self, level, x, y, generator, x_adv=None):
        updates.append((level.part, x, x_adv))
        return step(self, level, x, y, generator, x_adv)

    monkeypatch.setattr(Trainer, "attack", attacking)
    monkeypatch.setattr(Trainer, "step", stepping)
    return attacks, updates


@pytest.mark.parametrize(
    ("alternation", "parts", "attacked"),
    [
        ("both", "rerere", 6), ("shared-attack", "rerere", 3), ("by-iteration", "rer", 3), ("every-2", "reere", 5),
        ("shared-every-2", "reere", 3), ("warm-start", "rerere", 6),
    ],
)  # fmt: skip
def test_updates_and_attacks_of_an_epoch(watched, alternation, parts, attacked):
    trainer, *_ = make({"alternation": alternation})
    attacks, updates = watched
    trainer.train_epoch(0, bar := Bar())  # 64 images: three batches of 20
    assert "".join(part[0] for part, *_ in updates) == parts
    assert len(attacks) == attacked and bar.done == 3
    # Each update is against the attack on its own batch, the last one made; a shared one is the same tensor.
    attacked_images = {id(x_adv): x for x, _, x_adv in attacks}
    assert all(attacked_images[id(x_adv)] is x for _, x, x_adv in updates)
    assert len({id(x_adv) for *_, x_adv in updates}) == attacked
    seen = {part: sum(len(x) for each, x, _ in updates if each == part) for part in ("routers", "experts")}
    assert trainer.means.counts == seen


@pytest.mark.parametrize("augment", [False, True])
def test_a_warm_attack_is_one_step_from_the_last(watched, augment, monkeypatch):
    trainer, *_ = make({"alternation": "warm-start"}, data={"augment": augment})
    attacks, _ = watched
    steps, real = [], trainers.trades_attack
    monkeypatch.setattr(trainers, "trades_attack", lambda *a, **kw: steps.append(kw["steps"]) or real(*a, **kw))
    for epoch in range(2):
        trainer.train_epoch(epoch, Bar())
    assert steps == [1] * 12
    assert not attacks[0][1].any() and all(earlier.any() for _, earlier, _ in attacks[6:])
    if augment:
        return
    last = {}
    for x, earlier, x_adv in attacks:
        for image, start, result in zip(x, earlier, x_adv, strict=True):
            key = image.numpy().tobytes()
            assert torch.equal(start, last.get(key, torch.zeros_like(start)))
            # A step of 0.06 twice in the same direction, say, is more than one attack could do.
            last[key] = (result - image).half().float()
    assert max(delta.abs().max() for delta in last.values()) == pytest.approx(0.1, rel=1e-3)


def test_mixed_routing_attacks_each_image_one_way_or_the_other(monkeypatch):
    trainer, x, _ = make({"attack_routing": "mixed"})
    calls = []

    def marked(predict, part, *, held=None, **settings):
        calls.append((predict is trainer.model, part, held))
        return part + (1 if predict is trainer.model else 2)

    monkeypatch.setattr(trainers, "trades_attack", marked)
    ways = torch.cat([(trainer.attack(x, seeded(seed)) - x)[:, 0, 0, 0].round() for seed in range(20)])
    # Both ways, evenly: 480 fair draws, five standard deviations of slack.
    assert set(ways.tolist()) == {1, 2} and abs((ways == 1).sum() - 240) < 55
    assert [hard for hard, *_ in calls[:2]] == [True, False] and len(calls[0][1]) + len(calls[1][1]) == len(x)
    torch.testing.assert_close(trainer.attack(x, seeded(3)), trainer.attack(x, seeded(3)), rtol=0, atol=0)
    # One image goes one way, the other part being empty, and an earlier perturbation goes with its image.
    assert trainer.attack(x[:1], seeded()).shape == x[:1].shape
    calls.clear()
    trainer.attack(x, seeded(), earlier=x)
    assert all(torch.equal(part, held) for _, part, held in calls)


def test_mixed_attacks_are_those_of_the_two_ways():
    trainer, x, _ = make({"attack_routing": "mixed"})
    trainer.model.eval()
    mixed = trainer.attack(x, seeded())
    softly = torch.rand(len(x), generator=seeded()) < 0.5
    for way, chosen in (("straight-through", ~softly), ("soft", softly)):
        # The noise is drawn part by part, so that the part is repeated with the generator where it was.
        generator = seeded()
        torch.rand(len(x), generator=generator)
        if way == "soft":
            torch.randn(x[~softly].shape, generator=generator)
        trainer.config.training.attack_routing = way
        assert torch.equal(trainer.attack(x[chosen], generator), mixed[chosen])


@pytest.mark.parametrize("level", [ROUTERS, EXPERTS, Level("all"), Level("all", adversarial=False)], ids=named)
def test_router_terms_are_part_of_every_step_that_trains_routers(level):
    settings = {"balance": 0.01} if not level.adversarial else {"balance": 0.01, "margin": 0.1}
    trainer, x, y = make(settings)
    terms = trainer.step(level, x, y, seeded())
    expected = {"ce", *(["kl"] if level.adversarial else []), *([] if level.part == "experts" else settings)}
    assert set(terms) == expected
    if "balance" in terms:
        assert 0.01 <= terms["balance"] <= 0.02  # between an even share and one of two experts with all
    if "margin" in terms:
        assert 0 < terms["margin"] <= 0.1


def test_a_strong_balance_spreads_the_images():
    trainer, x, y = make({"balance": 20.0})
    for router in routers_of(trainer.model):
        torch.nn.init.constant_(router.scores.bias[0].data, 2.0)  # all images to one expert
    terms = [trainer.step(ROUTERS, x, y, seeded())["balance"].item() / 20 for _ in range(20)]
    # From its least, 1 for even shares, to 2 for one expert with all.
    assert terms[0] > 1.3 and terms[-1] - 1 < (terms[0] - 1) / 2


@pytest.mark.parametrize("level", [ROUTERS, EXPERTS, Level("all")], ids=named)
def test_awp_takes_the_gradient_at_worse_weights_and_moves_one_part(level):
    trainer, x, y = make({"awp": 0.01})
    x_adv, beta = trainer.attack(x, seeded()), trainer.config.training.beta
    before, model = state(trainer.model), copy.deepcopy(trainer.model)
    trainer.step(level, x, y, seeded(), x_adv)

    # The same written out on a copy: ascend, take the gradient there, step from where the weights were.
    psi, routers = split_parameters(model)
    mine = {"experts": psi, "routers": routers, "all": [*psi, *routers]}[level.part]
    moved = [p for p in mine if p.dim() > 1]
    weights = [p.detach().clone() for p in moved]
    with learning(model, level.part):
        sum(trades(model, x, x_adv, y, beta)[0].values()).backward()
    model.load_state_dict({**before, **dict(model.named_parameters())})  # the ascent records no statistics
    with torch.no_grad():
        for p in moved:
            p.add_(0.01 * p.norm() / p.grad.norm() * p.grad)
    model.zero_grad()
    with learning(model, level.part):
        sum(trades(model, x, x_adv, y, beta)[0].values()).backward()
    with torch.no_grad():
        for p, as_it_was in zip(moved, weights, strict=True):
            p.copy_(as_it_was)
    torch.optim.SGD(mine, lr=0.1, momentum=0.9, weight_decay=5e-4).step()
    after = model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], msg=name, rtol=1e-4, atol=1e-6)
    names = changed(trainer.model, before)
    assert names and (
        level.part == "all" or names == ({*phi(names)} if level.part == "routers" else names - phi(names))
    )
    plain, *_ = make()
    plain.step(level, x, y, seeded(), x_adv)
    assert changed(trainer.model, plain.model.state_dict())


def test_the_average_is_what_is_validated_and_the_weights_train_on(monkeypatch):
    trainer, *_ = make({"ema": 0.9})
    plain, *_ = make()
    start, name = state(trainer.model), "backbone.classifier.weight"
    weights, real = [], trainer.average.update
    monkeypatch.setattr(trainer.average, "update", lambda m, n: weights.append(state(m)[name]) or real(m, n))
    for each in (trainer, plain):
        each.train_epoch(0, Bar())
    expected = start[name]
    for number, weight in enumerate(weights):
        decay = (1 + number) / (10 + number)
        expected = decay * expected + (1 - decay) * weight
    assert len(weights) == 3
    torch.testing.assert_close(trainer.average.state[name], expected)
    measured, real_outcomes = [], trainers.outcomes

    def outcomes(model, *args, **kwargs):
        measured.append(state(model)[name])
        return real_outcomes(model, *args, **kwargs)

    monkeypatch.setattr(trainers, "outcomes", outcomes)
    trainer.validate()
    assert torch.equal(measured[0], trainer.average.state[name])
    # Training goes the same way as without an average.
    assert not changed(trainer.model, plain.model.state_dict())


@pytest.mark.parametrize("level", [ROUTERS, EXPERTS, Level("all")], ids=named)
def test_pgd_at_is_cross_entropy_on_what_its_attack_makes(level):
    settings = {"momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.2}
    trainer, x, y = make({"objective": "pgd-at", **settings})
    model = copy.deepcopy(trainer.model)
    with frozen(model):
        x_adv = trades_attack(
            model, x, threat=trainer.threat, steps=2, step_size=0.06, generator=seeded(), labels=y, uniform=True
        )
    assert torch.equal(trainer.attack(x, seeded(), y=y), x_adv)
    with pytest.raises(ValueError, match=r"^y must be given for an attack that ascends the cross-entropy, got None$"):
        trainer.attack(x, seeded())
    before = state(trainer.model)
    terms = trainer.step(level, x, y, seeded())
    with learning(model, level.part):
        loss = F.cross_entropy(model(x_adv), y, label_smoothing=0.2)
        loss.backward()
    assert list(terms) == ["ce"] and terms["ce"].item() == loss.item()
    psi, phi_ = split_parameters(model)
    mine = {"routers": phi_, "experts": psi, "all": psi + phi_}[level.part]
    torch.optim.SGD(mine, lr=0.1).step()
    after = model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], msg=name, rtol=1e-5, atol=1e-7)
    assert changed(trainer.model, before)


def test_smoothed_labels_change_one_term_and_clipping_the_length_of_an_update():
    settings = {"momentum": 0.0, "weight_decay": 0.0}
    plain, x, y = make(settings)
    x_adv, before = plain.attack(x, seeded()), state(plain.model)
    terms = plain.step(EXPERTS, x, y, seeded(), x_adv)
    moved = {name: tensor - before[name] for name, tensor in plain.model.named_parameters()}
    length = torch.stack([each.detach().norm() for each in moved.values()]).norm() / 0.1  # lr
    clipped, *_ = make({**settings, "clip": float(length) / 4})
    assert clipped.step(EXPERTS, x, y, seeded(), x_adv) == terms
    for name, tensor in clipped.model.named_parameters():
        torch.testing.assert_close(tensor - before[name], moved[name] / 4, rtol=1e-3, atol=1e-6)
    smooth, *_ = make({**settings, "label_smoothing": 0.3})
    smoothed = smooth.step(EXPERTS, x, y, seeded(), x_adv)
    assert smoothed["kl"] == terms["kl"] and smoothed["ce"] != terms["ce"]


def test_first_epochs_have_their_own_attack_and_size(watched, monkeypatch):
    settings = {"method": "at", "first_attack_steps": "1", "first_image_sizes": "8,12"}
    trainer, *_ = make(settings, data={"image_size": 16, "augment": True})
    made, real = [], trainers.trades_attack
    monkeypatch.setattr(
        trainers, "trades_attack", lambda *a, **kw: made.append((kw["steps"], kw["step_size"])) or real(*a, **kw)
    )
    sides = []
    for epoch in range(3):
        watched[0].clear()
        trainer.train_epoch(epoch, Bar())
        sides.append({tuple(x.shape[2:]) for x, *_ in watched[0]})
    assert sides == [{(8, 8)}, {(12, 12)}, {(16, 16)}]
    assert made == [(1, 0.12)] * 3 + [(2, 0.06)] * 6


def test_each_part_goes_at_its_own_rate():
    trainer, *_ = make({"alternation": "both", "router_lr": 0.01, "schedule": "step", "warmup_epochs": 1})
    for epoch, factor in ((0, 1.0), (1, 1.0), (2, 0.01)):  # of the last of three iterations
        trainer.train_epoch(epoch, Bar())
        rates = {part: optimizer.param_groups[0]["lr"] for part, optimizer in trainer.optimizers.items()}
        assert rates == {"experts": pytest.approx(0.1 * factor), "routers": pytest.approx(0.01 * factor)}


LONG_RUNS = [
    {"training": {
        "objective": "pgd-at", "optimizer": "adamw", "lr": 1e-3, "decay": "weights", "clip": 1.0, "warmup_epochs": 1,
        "router_lr": 1e-2, "first_attack_steps": "1:3",
    }, "model": {"router_norm": "layer"}},
    {"training": {
        "schedule": "one-cycle", "label_smoothing": 0.1, "attack_start": "uniform", "attack_loss": "ce",
        "router_momentum": 0.5, "router_weight_decay": 0.0, "first_image_sizes": "8,12:2",
    }, "model": {"router_norm": "none"}, "data": {"image_size": 16}},
    {"training": {
        "method": "sparse", "schedule": "step", "warmup_epochs": 1, "prune_epochs": 2, "finetune_epochs": 2,
        "finetune_lr": 0.01, "optimizer": "adamw", "lr": 1e-2, "decay": "weights",
    }, "model": {"kind": "sparse"}},
]  # fmt: skip


@pytest.mark.parametrize("groups", LONG_RUNS, ids=["adamw", "one-cycle", "sparse"])
def test_long_runs_resume_bit_identical(tmp_path, groups):
    whole = train(small(**groups), run_dir=tmp_path / "whole", **THREADS)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "last")  # as if stopped within the last of the epochs
    resume(run)
    for name in ("last/model.safetensors", "best/model.safetensors", "model.safetensors"):
        assert_same(load_file(run / name), load_file(whole / name))
    states = [torch.load(each / "last/state.pt", weights_only=True)["optimizers"] for each in (run, whole)]
    moments = {key for optimizer in states[1] for each in optimizer["state"].values() for key in each}
    adamw = groups["training"].get("optimizer") == "adamw"
    assert moments == ({"step", "exp_avg", "exp_avg_sq"} if adamw else {"momentum_buffer"})
    for mine, other in zip(*states, strict=True):
        assert mine["param_groups"] == other["param_groups"]
        assert all(torch.equal(t, other["state"][i][n]) for i, each in mine["state"].items() for n, t in each.items())
    first, *_ = (json.loads(line)["lr"] for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert first < groups["training"].get("lr", 0.1)  # it rises first


def test_long_runs_in_bf16():
    settings = {**LONG_RUNS[0]["training"], **EVERYTHING, "precision": "bf16-mixed"}
    del settings["first_attack_steps"]  # of which attacks that go on from the last have none
    del settings["runner_up"]  # which is TRADES'
    trainer, *_ = make(settings, model={"router_norm": "layer"})
    before = state(trainer.model)
    trainer.train_epoch(0, Bar())
    assert all(tensor.isfinite().all() and tensor.dtype != torch.bfloat16 for tensor in state(trainer.model).values())
    assert {name for name, _ in trainer.model.named_parameters()} <= changed(trainer.model, before)


EVERYTHING = {
    "alternation": "warm-start", "attack_routing": "mixed", "balance": 0.01, "margin": 0.1, "ema": 0.9, "awp": 0.005,
    "runner_up": 0.25,
}  # fmt: skip


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("training", [EVERYTHING, {"alternation": "by-iteration"}, {"alternation": "every-2"}])
def test_resumed_runs_end_bit_identical(tmp_path, training):
    whole = train(small(training), run_dir=tmp_path / "whole", **THREADS)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "last")  # as if stopped within the last of the epochs
    resume(run)
    files = {"last/model.safetensors", "best/model.safetensors", "model.safetensors"}
    more = "last/more.safetensors"
    assert (whole / more).exists() == (training is EVERYTHING) and not (whole / "best/more.safetensors").exists()
    for name in {*files, more} if training is EVERYTHING else files:
        assert_same(load_file(run / name), load_file(whole / name))
    last, model = load_file(whole / "last/model.safetensors"), load_file(whole / "model.safetensors")
    assert_same(model, load_file(whole / "best/model.safetensors"))
    if training is EVERYTHING:
        remembered = load_file(whole / more)
        assert remembered["perturbations"].shape == (64, 1, 8, 8) and remembered["perturbations"].any()
        epoch = torch.load(whole / "best/state.pt", weights_only=True)["progress"]["epoch"]
        averaged = {name.removeprefix("average."): t for name, t in remembered.items() if name != "perturbations"}
        assert averaged.keys() == {name for name, tensor in last.items() if tensor.is_floating_point()}
        same = [torch.equal(model[name], averaged[name]) for name in averaged]
        assert all(same) == (epoch == 3)
        assert not all(torch.equal(model[name], last[name]) for name in averaged)
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert all({"ce", "kl", "balance", "margin"} <= set(line["train"]["routers"]) for line in lines)


@pytest.mark.parametrize("alternation", ALTERNATIONS)
@pytest.mark.parametrize("router", ["layer", "embedding"])
def test_options_train_together_in_bf16(alternation, router):
    settings = {**EVERYTHING, "alternation": alternation, "precision": "bf16-mixed"}
    trainer, *_ = make(settings, model={"router": router})
    before = state(trainer.model)
    trainer.train_epoch(0, Bar())
    assert all(tensor.isfinite().all() and tensor.dtype != torch.bfloat16 for tensor in state(trainer.model).values())
    assert {name for name, _ in trainer.model.named_parameters()} <= changed(trainer.model, before)


@pytest.mark.slow
def test_options_train_compiled():
    trainer, *_ = make({**EVERYTHING, "compile": True})
    before = state(trainer.model)
    trainer.train_epoch(0, Bar())
    assert all(tensor.isfinite().all() for tensor in state(trainer.model).values())
    assert {name for name, _ in trainer.model.named_parameters()} <= changed(trainer.model, before)


@pytest.mark.slow
def test_a_compiled_epoch_makes_its_graphs_in_the_first_iteration(monkeypatch):
    settings = {"compute": "masked", "lr": 0.01}
    model = {"name": "vgg16"}
    data = {"image_size": 16}
    plain, *_ = make(settings, model=model, data=data)
    plain.train_epoch(0, Bar())
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(trainers, "compiled", partial(compiled, backend=counter))
    trainer, *_ = make({**settings, "compile": True}, model=model, data=data)
    graphs = []
    trainer.after_iteration = lambda *_: graphs.append(counter.frame_count)
    trainer.train_epoch(0, Bar())
    # An attack's clean pass and its steps, the routers' passes and the experts'.
    assert graphs == [4] * len(graphs) and len(graphs) > 1 and counter.frame_count == 4
    expected = state(plain.model)
    for name, tensor in state(trainer.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(trainer.use.counts, plain.use.counts)

"""Every section's fields: their ranges, what they demand of one another, and what follows from them."""

from pathlib import Path
from typing import Any

import pytest

from advmoe.config import AttackConfig, Config, DataConfig, ModelConfig, Pixels, ThreatConfig, TrainingConfig
from advmoe.tables import DATASETS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(lr="x"), "training.lr must be a number, got 'x'"),
        (lambda: TrainingConfig(lr=True), "training.lr must be a number, got True"),
        (lambda: TrainingConfig(lr=0), "training.lr must be > 0, got 0.0"),
        (lambda: TrainingConfig(lr=float("nan")), "training.lr must be > 0 and <= 1e+30, got nan"),
        (lambda: TrainingConfig(lr=10**400), "training.lr must be > 0 and <= 1e+30, got inf"),
        (lambda: TrainingConfig(lr=None), "training.lr must be a number, got None"),
        (lambda: TrainingConfig(epochs=2.0), "training.epochs must be a whole number, got 2.0"),
        (lambda: TrainingConfig(epochs=True), "training.epochs must be a whole number, got True"),
        (lambda: TrainingConfig(epochs=0), "training.epochs must be >= 1, got 0"),
        (lambda: TrainingConfig(seed=2**32), "training.seed must be >= 0 and <= 4294967295, got 4294967296"),
        (lambda: TrainingConfig(momentum=1.5), "training.momentum must be >= 0 and <= 0.9999, got 1.5"),
        (lambda: TrainingConfig(compile=1), "training.compile must be true or false, got 1"),
        (lambda: TrainingConfig(step_size="a/b"), "training.step_size must be a number or a fraction such as 8/255"),
        (lambda: TrainingConfig(precision="fp16"), "training.precision must be one of 32-true, bf16-mixed, got 'fp16'"),
        (lambda: TrainingConfig(method="at-routers"), "training.init_from must be a run directory to start from"),
        (lambda: TrainingConfig(alternation="every-1"), "(K a whole number >= 2 and <= 10000), got 'every-1'"),
        (
            lambda: TrainingConfig(alternation="every-K"),
            "one of both, shared-attack, by-iteration, warm-start, every-K, shared-every-K",
        ),
        (lambda: TrainingConfig(alternation="every-2.5"), "training.alternation must be one of both, shared-attack,"),
        (
            lambda: TrainingConfig(alternation="every-2", method="at"),
            "training.method must be advmoe when training.alternation is every-2, got 'at'",
        ),
        (lambda: TrainingConfig(ema=1), "training.ema must be >= 0 and <= 0.999999, got 1.0"),
        (lambda: TrainingConfig(ema=-0.1), "training.ema must be >= 0 and <= 0.999999, got -0.1"),
        (lambda: TrainingConfig(awp=float("nan")), "training.awp must be >= 0 and <= 1, got nan"),
        (
            lambda: TrainingConfig(awp=0.1, method="standard"),
            "training.method must be one that trains against attacks when training.awp is > 0, got 'standard'",
        ),
        (
            lambda: TrainingConfig(margin=1, method="standard"),
            "training.method must be one that trains routers against attacks when training.margin is > 0, got",
        ),
        (
            lambda: TrainingConfig(balance=1, method="at-experts", init_from="x"),
            "training.method must be one that trains routers when training.balance is > 0, got 'at-experts'",
        ),
        (lambda: DataConfig(train_examples=1), "data.train_examples must be >= 2, got 1"),
        (lambda: DataConfig(train_examples=2.5), "data.train_examples must be a whole number, got 2.5"),
        (lambda: ModelConfig(scale=0), "model.scale must be > 0 and <= 1, got 0.0"),
        (lambda: ModelConfig(kind=["moe"]), "model.kind must be one of moe, dense, s-dense, sparse, got ['moe']"),
        (lambda: ModelConfig(name=3), "model.name must be text, got 3"),
        (lambda: DataConfig(name="mnist"), f"data.name must be one of {', '.join(DATASETS)}, got 'mnist'"),
        (lambda: DataConfig(image_size="32"), "data.image_size must be a whole number, got '32'"),
        (lambda: ThreatConfig(eps="300/255"), "threat.eps must be >= 0 and <= 1, got 300/255"),
        (lambda: ThreatConfig(eps=None), "threat.eps must be a number or a fraction such as 8/255, got None"),
        (lambda: AttackConfig(steps=0), "attack.steps must be >= 1, got 0"),
        (lambda: TrainingConfig(momentum=1), "training.momentum must be >= 0 and <= 0.9999, got 1.0"),
        (lambda: TrainingConfig(ema=1 - 1e-9), "training.ema must be >= 0 and <= 0.999999, got 0.999999999"),
        (lambda: TrainingConfig(lr=1e308), "training.lr must be > 0 and <= 1e+30, got 1e+308"),
        (lambda: TrainingConfig(awp=2), "training.awp must be >= 0 and <= 1, got 2.0"),
        (lambda: TrainingConfig(attack_steps=10**21), "training.attack_steps must be >= 1 and <= 10000, got 10000000"),
        (lambda: TrainingConfig(epochs=10**5000), "training.epochs must be >= 1 and <= 100000, got an integer of 166"),
        (lambda: TrainingConfig(alternation="every-999999999"), "(K a whole number >= 2 and <= 10000), got 'every-99"),
        (lambda: TrainingConfig(alternation="every-010"), "(K a whole number >= 2 and <= 10000), got 'every-010'"),
        (lambda: ModelConfig(width=10**9), "model.width must be >= 1 and <= 16384, got 1000000000"),
        (lambda: ModelConfig(num_experts=10**6), "model.num_experts must be >= 1 and <= 1024, got 1000000"),
        (lambda: DataConfig(image_size=0), "data.image_size must be >= 8, got 0"),
        (lambda: DataConfig(workers=100_000), "data.workers must be >= 0 and <= 256, got 100000"),
        (lambda: DataConfig(root="a\nb"), "data.root must be 1 to 4096 characters of UTF-8 without control characters"),
        (lambda: DataConfig(root="\udcff"), "data.root must be 1 to 4096 characters of UTF-8 without control"),
        (
            lambda: DataConfig(root=""),
            "data.root must be 1 to 4096 characters of UTF-8 without control characters, got",
        ),
        (lambda: ThreatConfig(norm="l2", eps=1e5), "threat.eps must be >= 0 and <= 10000, got 100000.0"),
        (lambda: AttackConfig(queries=10**12), "attack.queries must be >= 0 and <= 10000000, got 1000000000000"),
        (lambda: TrainingConfig(lr="x" * 10_000), "training.lr must be a number, got 'xxx"),
        (lambda: TrainingConfig(lr=[[[0] * 1000] * 1000] * 1000), "training.lr must be a number, got [[[0, 0, 0"),
        (lambda: TrainingConfig(step_size="1" * 1000), "training.step_size must be > 0 and <= 100000, got 111111"),
        (lambda: TrainingConfig(prune_epochs=-1), "training.prune_epochs must be >= 0, got -1"),
        (lambda: TrainingConfig(finetune_epochs=1.5), "training.finetune_epochs must be a whole number, got 1.5"),
        (
            lambda: TrainingConfig(schedule="linear"),
            "training.schedule must be one of cosine, one-cycle, step, got 'lin",
        ),
        (
            lambda: TrainingConfig(warmup_epochs=100),
            "training.warmup_epochs must be < the 100 epochs of the run, got 100",
        ),
        (
            lambda: TrainingConfig(warmup_epochs=5, method="sparse", epochs=20),
            "training.warmup_epochs must be < the 4 epochs of the shortest phase, got 5",
        ),
        (
            lambda: TrainingConfig(warmup_epochs=1, schedule="one-cycle"),
            "training.warmup_epochs must be 0 when training.schedule is one-cycle, which rises by itself, got 1",
        ),
        (lambda: TrainingConfig(optimizer="adam"), "training.optimizer must be one of sgd, adamw, got 'adam'"),
        (lambda: TrainingConfig(decay="bias"), "training.decay must be one of all, weights, got 'bias'"),
        (lambda: TrainingConfig(router_lr=0), "training.router_lr must be > 0, got 0.0"),
        (
            lambda: TrainingConfig(router_lr=1, method="at-experts", init_from="x"),
            "training.method must be one that trains routers when training.router_lr is 1.0, got 'at-experts'",
        ),
        (lambda: TrainingConfig(clip=-1), "training.clip must be >= 0, got -1.0"),
        (lambda: TrainingConfig(label_smoothing=1), "training.label_smoothing must be >= 0 and <= 0.999, got 1.0"),
        (
            lambda: TrainingConfig(objective="pgd-at", method="standard"),
            "training.method must be one that trains against attacks when training.objective is pgd-at, got 'standard'",
        ),
        (
            lambda: TrainingConfig(attack_start="uniform", method="standard"),
            "training.method must be one that trains against attacks when training.attack_start is uniform, got",
        ),
        (
            lambda: TrainingConfig(first_attack_steps="2;3"),
            "training.first_attack_steps must be numbers, or numbers and epochs such as 1:5, separated by commas, got",
        ),
        (lambda: TrainingConfig(first_attack_steps="0"), "training.first_attack_steps must be >= 1, got 0"),
        (
            lambda: TrainingConfig(first_attack_steps="1:0"),
            "training.first_attack_steps must be numbers, or numbers and",
        ),
        (
            lambda: TrainingConfig(first_attack_steps="1:2,2", epochs=2),
            "training.first_attack_steps must be of at most the 2 epochs that there are, got '1:2,2'",
        ),
        (
            lambda: TrainingConfig(first_attack_steps="1", alternation="warm-start"),
            "training.first_attack_steps must be left out when training.alternation is warm-start, got '1'",
        ),
        (lambda: TrainingConfig(first_image_sizes="4:2"), "training.first_image_sizes must be >= 8, got 4"),
        (
            lambda: TrainingConfig(first_image_sizes="8", teacher="zoo:x"),
            "training.first_image_sizes must be left out when training.teacher is given, got '8'",
        ),
        (
            lambda: TrainingConfig(finetune_lr=0.01),
            "training.method must be sparse when training.finetune_lr is 0.01, got 'advmoe'",
        ),
        (
            lambda: TrainingConfig(prune_epochs=0, finetune_epochs=0),
            "training.finetune_epochs must be left out or >= 1 when training.prune_epochs is 0, got 0",
        ),
    ],
)
def test_errors_name_field_rule_and_value(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_values_are_converted_to_the_field_s_type(tmp_path: Path) -> None:
    training = TrainingConfig(lr=1, step_size=0.5)
    assert type(training.lr) is float
    assert type(training.step_size) is Pixels
    assert DataConfig(root=tmp_path).root == str(tmp_path)  # type: ignore[arg-type]
    assert ThreatConfig(norm="l2", eps=Pixels(2)).eps == 2  # an l2 ball may be wider than the pixel range


YOUNGER = {
    "objective": "trades", "schedule": "cosine", "warmup_epochs": 0, "optimizer": "sgd", "decay": "all",
    "router_lr": None, "router_momentum": None, "router_weight_decay": None, "clip": 0, "label_smoothing": 0,
    "attack_start": None, "attack_loss": None, "first_attack_steps": None, "first_image_sizes": None,
    "finetune_lr": None,
}  # fmt: skip


def test_options_leave_the_paper_s_setting_alone_unless_asked_for() -> None:
    options = ("alternation", "attack_routing", "balance", "margin", "ema", "awp", *YOUNGER)
    training = Config().to_dict()["training"]
    assert [training[name] for name in options] == ["every-4", "straight-through", 0, 0, 0, 0, *YOUNGER.values()]
    assert Config().to_dict()["data"]["train_examples"] is None
    # Runs of before these fields existed are read as what they were.
    older = {group: {n: v for n, v in fields.items() if n not in (*options, "train_examples")}
             for group, fields in Config().to_dict().items()}  # fmt: skip
    assert Config.from_dict(older) == Config()
    for alternation, every in (
        ("every-2", 2),
        ("every-10", 10),
        ("shared-every-3", 3),
        ("both", 1),
        ("shared-attack", 1),
    ):
        assert max(level.every for level in TrainingConfig(alternation=alternation).levels()) == every
    # It says nothing about other methods: they take the default, and what older runs of theirs name.
    assert TrainingConfig(method="at", alternation="both").alternation == "both"
    assert TrainingConfig(method="at").alternation == TrainingConfig().alternation


def test_first_epochs_by_hand() -> None:
    training = TrainingConfig(attack_steps=3, step_size=0.02, first_attack_steps="1:2, 2", first_image_sizes="8:1,12")
    assert [training.attack_at(epoch) for epoch in range(4)] == [(1, 0.06), (1, 0.06), (2, 0.03), (3, 0.02)]
    assert [training.image_size_at(epoch) for epoch in range(3)] == [8, 12, None]
    assert TrainingConfig().attack_at(0) == (2, float(TrainingConfig().step_size))
    assert TrainingConfig().image_size_at(0) is None


@pytest.mark.parametrize(
    ("fields", "inner"),
    [
        ({}, ("noise", "kl")),
        ({"objective": "pgd-at"}, ("uniform", "ce")),
        ({"attack_start": "uniform"}, ("uniform", "kl")),
        ({"objective": "pgd-at", "attack_loss": "kl"}, ("uniform", "kl")),
        ({"objective": "pgd-at", "attack_start": "noise"}, ("noise", "ce")),
    ],
)
def test_an_objective_has_an_attack_of_its_own(fields: dict[str, Any], inner: tuple[str, str]) -> None:
    assert TrainingConfig(**fields).inner == inner


def test_a_source_decides_what_describes_a_backbone():
    config = ModelConfig(source="a/b.py:net", to_moe=True, width=8, scale=0.5, kind="s-dense", num_experts=3)
    assert (config.kind, config.scale, config.width, config.num_experts) == ("moe", 1.0, None, 3)
    assert config == ModelConfig(**vars(config))  # as config.yaml holds it
    assert ModelConfig(source="b.py:net").kind == "dense"
    assert not {"source", "to_moe", "skip", "linear"} & set(ModelConfig().backbone())


def test_a_token_can_be_routed_by_its_layer_alone() -> None:
    assert ModelConfig(route_per="token").router == "layer"
    with pytest.raises(ValueError, match=r"^model\.router must be layer when model\.route_per is token, got 'image'$"):
        ModelConfig(route_per="token", router="image")


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, (100, 20, 100)),
        ({"epochs": 7}, (7, 2, 7)),  # a fifth, rounded up
        ({"epochs": 7, "init_from": "run"}, (0, 2, 7)),
        ({"epochs": 7, "prune_epochs": 0, "finetune_epochs": 3}, (7, 0, 3)),
    ],
    ids=str,
)
def test_epochs_of_the_phases_by_hand(training: dict[str, object], expected: tuple[int, int, int]) -> None:
    epochs = TrainingConfig(method="sparse", **training).phase_epochs()  # type: ignore[arg-type]
    assert epochs == dict(zip(("pretrain", "prune", "finetune"), expected, strict=True))


def test_only_one_alternation_goes_on_from_the_last_perturbation() -> None:
    assert TrainingConfig(alternation="warm-start").warm
    assert not any(TrainingConfig(alternation=name).warm for name in ("both", "every-4", "shared-attack"))
    assert not TrainingConfig(method="at").warm

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.config import (
    AttackConfig,
    Config,
    DataConfig,
    ModelConfig,
    Pixels,
    ThreatConfig,
    TrainingConfig,
    merged,
    overlaid,
)
from advmoe.documents import parse_yaml
from advmoe.recipes import METHODS, recipe
from advmoe.tables import DATASETS


def test_a_strength_keeps_its_spelling() -> None:
    eps = Pixels("8/255")
    assert eps == 8 / 255
    assert str(eps) == "8/255"
    assert pickle.loads(pickle.dumps(eps)).text == "8/255"
    assert Pixels(0.1) == 0.1


@pytest.mark.parametrize("value", ["x", "1/0", "1/2/3", "/", "", None, True, [1], "1_0/255", "nan", "inf", "\u0663"])
def test_what_is_no_strength(value: object) -> None:
    with pytest.raises(ValueError, match="number or a fraction such as 8/255, got"):
        Pixels(value)  # type: ignore[arg-type]


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
        (
            lambda: Config(model=ModelConfig(kind="s-dense"), training=TrainingConfig(balance=1, method="at")),
            "model.kind must be moe when training.balance is > 0, got 's-dense'",
        ),
        (
            lambda: Config(model=ModelConfig(num_experts=1), training=TrainingConfig(margin=1)),
            "model.num_experts must be >= 2 when training.margin is > 0, got 1",
        ),
        (
            lambda: Config(data=DataConfig(name="imagenet"), training=TrainingConfig(alternation="warm-start")),
            "data.name must be of images held in memory (not imagenet) when training.alternation is warm-start",
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
        (lambda: Config(model={"kind": "moe"}), "model must be a ModelConfig, got {'kind': 'moe'}"),
        (lambda: Config(model=ModelConfig(kind="dense")), "model.kind must be moe when training.method is advmoe"),
        (lambda: TrainingConfig(prune_epochs=-1), "training.prune_epochs must be >= 0, got -1"),
        (lambda: TrainingConfig(finetune_epochs=1.5), "training.finetune_epochs must be a whole number, got 1.5"),
        (
            lambda: TrainingConfig(prune_epochs=0, finetune_epochs=0),
            "training.finetune_epochs must be left out or >= 1 when training.prune_epochs is 0, got 0",
        ),
        (
            lambda: Config(training=TrainingConfig(method="sparse")),
            "model.kind must be sparse when training.method is sparse, got 'moe'",
        ),
        (
            lambda: Config(model=ModelConfig(kind="sparse"), training=TrainingConfig(method="at")),
            "training.method must be sparse when model.kind is sparse, got 'at'",
        ),
        (
            lambda: Config(model=ModelConfig(source="a.py:f"), training=TrainingConfig(method="sparse")),
            "model.source must be left out when training.method is sparse, got 'a.py:f'",
        ),
    ],
)
def test_errors_name_field_rule_and_value(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_can_be_measured_but_not_trained() -> None:
    Config(training=TrainingConfig(method="standard"), threat=ThreatConfig(eps=0)).require_trainable()
    for eps in (0, 1e-7):
        with pytest.raises(ValueError, match=r"^threat\.eps must be >= 1e-06 when training\.method is advmoe .* got"):
            Config(threat=ThreatConfig(eps=eps)).require_trainable()


def test_notes_tell_what_fields_do_not_do() -> None:
    def notes(names: str, **groups: dict[str, object]) -> list[str]:
        return Config.from_dict(groups).notes(names.split())

    plain = {"model": {"kind": "dense"}, "training": {"method": "at"}}
    assert notes("model.num_experts training.lr model.kind", **plain) == [
        "model.num_experts changes nothing: model.kind is dense"
    ]
    assert notes("training.beta", training={"method": "standard"}) == [
        "training.beta changes nothing: training.method is standard"
    ]
    assert notes("model.scale", model={"scale": 1}) == ["model.scale 1 makes the 2 experts of every layer the same"]
    assert notes("model.scale", model={"scale": 1, "experts": "independent"}) == []
    # By default two steps of 5/255 (and 50 of 2/255) within 8/255: they can cross it, and none leaves it.
    assert notes("training.step_size") == []
    assert notes("", training={"step_size": "9/255"}) == [
        "training.step_size 9/255 is longer than the radius threat.eps 8/255"
    ]
    assert notes("", training={"step_size": "4/255"}) == []  # as long as the radius together
    assert notes("", training={"step_size": "3/255"}) == [
        "2 steps of training.step_size 3/255 are shorter than the radius threat.eps 8/255"
    ]
    assert notes("", attack={"steps": 3}) == [
        "3 steps of attack.step_size 2/255 are shorter than the radius threat.eps 8/255"
    ]


def test_values_are_converted_to_the_field_s_type(tmp_path: Path) -> None:
    training = TrainingConfig(lr=1, step_size=0.5)
    assert type(training.lr) is float
    assert type(training.step_size) is Pixels
    assert DataConfig(root=tmp_path).root == str(tmp_path)  # type: ignore[arg-type]
    assert ThreatConfig(norm="l2", eps=Pixels(2)).eps == 2  # an l2 ball may be wider than the pixel range


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"epoch": 3}}, "training.epoch is no known field: did you mean training.epochs?"),
        ({"trainin": {"epochs": 3}}, "trainin is no known field: did you mean training?"),
        ({"lr": 1}, "lr is no known field: did you mean training.lr?"),
        ({"training": {"eps": 1}}, "training.eps is no known field: did you mean threat.eps?"),
        ({"attack": {1: 1}}, "attack.1 is no known field: attack has steps, step_size, restarts, pathways, queries"),
        ({"zzz": {}}, "zzz is no known field: the groups of fields are model, data, threat, training, attack"),
        ({"training": 3}, "training must be a group of fields, got 3"),
        ([], "a configuration must be groups of fields (model, data, threat, training, attack), got []"),
    ],
)
def test_unknown_fields_name_their_near_matches(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Config.from_dict(values)  # type: ignore[arg-type]
    assert str(caught.value) == message


@settings(max_examples=50, deadline=None)
@given(
    eps=st.one_of(st.floats(0, 1), st.integers(0, 255).map(lambda n: f"{n}/255")),
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**32 - 1),
    root=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    image_size=st.none() | st.integers(8, 1024),
)
def test_yaml_keeps_every_value(eps: float | str, lr: float, seed: int, root: str, image_size: int | None) -> None:
    config = Config(
        data=DataConfig(root=root, image_size=image_size),
        threat=ThreatConfig(eps=Pixels(eps)),
        training=TrainingConfig(lr=lr, seed=seed),
    )
    for read in (yaml.safe_load, lambda text: parse_yaml(text, "config.yaml")):  # by YAML 1.1 and 1.2
        again = Config.from_dict(read(config.to_yaml()))
        assert again == config
        assert again.to_yaml() == config.to_yaml()
        assert again.threat.eps.text == config.threat.eps.text


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = Config.from_dict({"threat": {"eps": "8/255"}, "training": {"lr": 0.25}})
    config.dump(path)
    assert "eps: 8/255\n" in path.read_text()
    assert Config.load(path) == config

    # YAML 1.1 reads 5e-4 as text; here it is a number, and an empty group changes nothing.
    path.write_text("training:\n  weight_decay: 5e-4\n  epochs: 3\nmodel:\n")
    assert Config.load(path).training.weight_decay == 0.0005

    for text, message in [
        ("training: [1", "config.yaml must be valid YAML, got: "),
        ("training: {lr: 1, lr: 2}", "config.yaml must be valid YAML, got: lr is given twice at line 1"),
        ("training: !!python/object:os.system {}", "config.yaml must be valid YAML, got: a tag ("),
        ("", "config.yaml must be groups of fields (model, data, threat, training, attack), got None"),
        ("training:\n  lr: '1'\n", "config.yaml: training.lr must be a number, got '1'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            Config.load(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="bytes that are not UTF-8"):
        Config.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        Config.load(tmp_path / "absent.yaml")


def test_options_leave_the_paper_s_setting_alone_unless_asked_for() -> None:
    options = ("alternation", "attack_routing", "balance", "margin", "ema", "awp")
    training = Config().to_dict()["training"]
    assert [training[name] for name in options] == ["every-4", "straight-through", 0, 0, 0, 0]
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


def test_merged_lays_groups_over_one_another() -> None:
    base = {"model": {"kind": "moe", "width": 16}, "data": {"name": "digits"}}
    over = {"model": {"width": 8}, "data": None, "attack": {"steps": 5}}
    assert merged(base, over) == {
        "model": {"kind": "moe", "width": 8},
        "data": {"name": "digits"},
        "attack": {"steps": 5},
    }
    assert base["model"] == {"kind": "moe", "width": 16}


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


@pytest.mark.parametrize(
    ("eps", "steps", "training", "attack"),
    [
        ("8/255", 2, "5/255", "2/255"),
        ("2/255", 2, "1.25/255", "0.5/255"),
        ("4/255", 10, "0.5/255", "1/255"),
        (0.5, 2, "0.3125", "0.125"),
    ],
)
def test_steps_that_nobody_set_follow_the_radius(eps: Any, steps: int, training: str, attack: str) -> None:
    config = Config.from_dict({"threat": {"eps": eps}, "training": {"attack_steps": steps}})
    assert (str(config.training.step_size), str(config.attack.step_size)) == (training, attack)
    assert config == Config(threat=ThreatConfig(eps=eps), training=TrainingConfig(attack_steps=steps))
    assert Config.from_dict(config.to_dict()) == config
    # They go on to follow, in Python as in a file whose steps were written down by a run.
    other = dataclasses.replace(config, threat=ThreatConfig(eps="1/255"))
    assert other.attack.step_size == Config.from_dict({"threat": {"eps": "1/255"}}).attack.step_size
    assert Config.from_dict(overlaid(config.to_dict(), {"threat": {"eps": "1/255"}})) == other


def test_steps_that_somebody_set_stay() -> None:
    mine = {"threat": {"eps": "8/255"}, "training": {"step_size": "3/255"}, "attack": {"step_size": "1/255"}}
    config = Config.from_dict(overlaid(Config.from_dict(mine).to_dict(), {"threat": {"eps": "2/255"}}))
    assert (str(config.training.step_size), str(config.attack.step_size)) == ("3/255", "1/255")
    assert any("longer than the radius" in note for note in config.notes([]))
    given = overlaid(Config().to_dict(), {"threat": {"eps": "2/255"}, "attack": {"step_size": "2/255"}})
    assert str(Config.from_dict(given).attack.step_size) == "2/255"
    assert Config(threat=ThreatConfig(eps=0)).attack.step_size > 0


@pytest.mark.parametrize(
    ("group", "name", "meant"), [("training", "epoch", "epochs"), ("threat", "epss", "eps"), (None, "dta", "data")]
)
def test_configurations_take_no_attribute_that_they_lack(group: str | None, name: str, meant: str) -> None:
    config = Config()
    with pytest.raises(AttributeError, match=f"did you mean {meant}"):
        setattr(getattr(config, group) if group else config, name, 3)
    config.training.epochs = 3
    assert config.training.epochs == 3

"""Settings as a whole: what sections demand of one another, and how they are read, written and merged."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.config import (
    Config,
    DataConfig,
    ModelConfig,
    Pixels,
    ThreatConfig,
    TrainingConfig,
    file_digest,
    merged,
    overlaid,
)
from advmoe.documents import parse_yaml


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Config(model=ModelConfig(kind="s-dense"), training=TrainingConfig(balance=1, method="at")),
            "model.kind must be moe when training.balance is > 0, got 's-dense'",
        ),
        (
            lambda: Config(model=ModelConfig(router="fixed-top")),
            "training.method must be one that trains no routers alone, such as at, when model.router is fixed-top "
            "(nothing to train there), got 'advmoe'",
        ),
        (
            lambda: Config(model=ModelConfig(router="fixed-top"), training=TrainingConfig(method="at", router_lr=1)),
            "training.router_lr must be left out when model.router is fixed-top, got 1.0",
        ),
        (
            lambda: Config(model=ModelConfig(router="fixed-mean"), training=TrainingConfig(method="at", balance=1)),
            "training.balance must be 0 when model.router is fixed-mean, got 1",
        ),
        (
            lambda: Config(training=TrainingConfig(radius=1)),
            "model.router must be linear or linear-2 when training.radius is > 0, got 'layer'",
        ),
        (
            lambda: Config(model=ModelConfig(router="linear", num_experts=3)),
            "model.num_experts must be 2 when model.router is linear, got 3",
        ),
        (
            lambda: Config(model=ModelConfig(num_experts=1), training=TrainingConfig(margin=1)),
            "model.num_experts must be >= 2 when training.margin is > 0, got 1",
        ),
        (
            lambda: Config(model=ModelConfig(kind="dense"), training=TrainingConfig(router_lr=0.1, method="at")),
            "model.kind must be moe when training.router_lr is given, got 'dense'",
        ),
        (
            lambda: Config(data=DataConfig(name="imagenet"), training=TrainingConfig(alternation="warm-start")),
            "data.name must be of images held in memory (not imagenet) when training.alternation is warm-start",
        ),
        (lambda: Config(model={"kind": "moe"}), "model must be a ModelConfig, got {'kind': 'moe'}"),
        (lambda: Config(model=ModelConfig(kind="dense")), "model.kind must be moe when training.method is advmoe"),
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


def test_fields_that_were_set_since_are_checked_and_what_follows_follows() -> None:
    config = Config()
    config.threat.eps, config.training.lr = "4/255", "0.5"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^training\.lr must be a number, got '0.5'$"):
        config.checked()
    config.training.lr = 0.5
    checked = config.checked()
    assert (str(checked.threat.eps), str(checked.training.step_size)) == ("4/255", "2.5/255")
    assert (
        checked == checked.checked()
        and Config(training=TrainingConfig(step_size=Pixels("3/255")))
        == Config(training=TrainingConfig(step_size=Pixels("3/255"))).checked()
    )


def test_one_number_says_what_text_says() -> None:
    numbers = {"epochs": 5, "first_attack_steps": 3, "first_image_sizes": 16}
    assert Config.from_dict({"training": numbers}) == Config.from_dict(
        {"training": {name: str(value) if name != "epochs" else value for name, value in numbers.items()}}
    )


def test_what_can_be_measured_but_not_trained() -> None:
    Config(training=TrainingConfig(method="standard"), threat=ThreatConfig(eps=0)).require_trainable()
    for eps in (0, 1e-7):
        with pytest.raises(ValueError, match=r"^threat\.eps must be >= 1e-06 when training\.method is advmoe .* got"):
            Config(threat=ThreatConfig(eps=eps)).require_trainable()
    hinged = TrainingConfig(method="standard", radius=1.0)
    with pytest.raises(ValueError, match=r"^threat\.eps must be > 0 when training\.radius is > 0 \(.*\), got 0"):
        Config(model=ModelConfig(router="linear"), training=hinged, threat=ThreatConfig(eps=0)).require_trainable()


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
    assert notes("training.beta", training={"objective": "pgd-at"}) == [
        "training.beta changes nothing: training.objective is pgd-at"
    ]
    assert notes("training.attack_steps", training={"alternation": "warm-start"}) == []  # its step follows from them
    assert notes("training.attack_steps", training={"alternation": "warm-start", "step_size": "8/255"}) == [
        "training.attack_steps changes nothing: training.alternation is warm-start"
    ]
    assert notes("training.val_attack_steps", data={"val_fraction": 0}) == [
        "training.val_attack_steps changes nothing: data.val_fraction is 0"
    ]
    assert notes("", training={"optimizer": "adamw", "lr": 0.01}) == []
    assert notes("", training={"optimizer": "adamw"}) == [
        "training.lr 0.1 is long for adamw, whose steps are of about that size"
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
    assert notes("", training={"step_size": "3/255", "attack_steps": 1}) == [
        "a training.step_size 3/255 is shorter than the radius threat.eps 8/255"
    ]
    assert notes("", attack={"steps": 3}) == [
        "3 steps of attack.step_size 2/255 are shorter than the radius threat.eps 8/255"
    ]


NO_FIELD = "{} is no known field: training has " + ", ".join(get_type_hints(TrainingConfig))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"epoch": 3}}, "training.epoch is no known field: did you mean training.epochs?"),
        ({"training": {"nonsense": 3}}, NO_FIELD.format("training.nonsense")),
        ({"threat": {"esp": 3}}, "threat.esp is no known field: did you mean threat.eps?"),
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


@settings(max_examples=30, deadline=None)
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
    text = config.to_yaml()
    for read in (yaml.safe_load, lambda text: parse_yaml(text, "config.yaml")):  # by YAML 1.1 and 1.2
        again = Config.from_dict(read(text))
        assert again == config
        assert again.to_yaml() == text
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


def test_merged_lays_groups_over_one_another() -> None:
    base = {"model": {"kind": "moe", "width": 16}, "data": {"name": "digits"}}
    over = {"model": {"width": 8}, "data": None, "attack": {"steps": 5}}
    assert merged(base, over) == {
        "model": {"kind": "moe", "width": 8},
        "data": {"name": "digits"},
        "attack": {"steps": 5},
    }
    assert base["model"] == {"kind": "moe", "width": 16}


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


@pytest.mark.parametrize(
    ("method", "meant"), [("at-routers", "keep"), ("at-experts", "keep"), ("sparse", "running"), ("at", None)]
)
def test_a_run_of_an_earlier_version_means_what_it_was_trained_with(tmp_path, method, meant):
    kind = "sparse" if method == "sparse" else "moe"
    config = Config.from_dict({"model": {"kind": kind}, "training": {"method": method, "init_from": "start"}})
    assert config.training.fixed_norms == ("refresh" if meant == "keep" else meant)
    config.dump(path := tmp_path / "config.yaml")
    assert Config.load(path) == config and file_digest(path) == config.digest()
    stored = yaml.safe_load(path.read_text())
    del stored["training"]["frozen_norms"]
    path.write_text(yaml.safe_dump(stored))
    assert Config.load(path).training.fixed_norms == meant
    path.write_text(yaml.safe_dump({"training": {"method": method, "init_from": "start"}, "model": {"kind": kind}}))
    assert Config.load(path) == config  # a recipe of one's own, which no run wrote
    path.write_text(yaml.safe_dump(stored))
    # Such a run's manifest holds a digest of the fields that there were.
    assert file_digest(path) not in (config.digest(), Config.load(path).digest())

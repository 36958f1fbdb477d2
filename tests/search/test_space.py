"""What a search varies: ranges and choices, and every mistake as one line that names field, rule and value."""

import pytest
from pages import DOCS, blocks

from advmoe.documents import parse_yaml
from advmoe.errors import InputError
from advmoe.search.settings import SearchSettings
from advmoe.search.space import Dimension, overrides, read_space, space


def test_ranges_and_choices_are_read_as_the_fields_types(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "training.lr: {low: 1e-3, high: 1, log: true}\n"
        "training.beta: {low: 1, high: 9, step: 2}\n"
        "training.attack_steps: {low: 1, high: 4}\n"
        "training.step_size: {low: 2/255, high: 8/255}\n"
        "model.router: {choices: [layer, image]}\n"
        "data.augment: {choices: [true, false]}\n"
    )
    lr, beta, steps, size, router, augment = read_space(file)
    assert lr == Dimension("training.lr", 0.001, 1.0, log=True)
    assert beta == Dimension("training.beta", 1.0, 9.0, step=2.0) and type(beta.low) is float
    assert steps == Dimension("training.attack_steps", 1, 4, whole=True) and type(steps.low) is int
    assert (size.low, size.high) == (2 / 255, 8 / 255)
    assert router.choices == ("layer", "image") and augment.choices == (True, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "a space must be dotted fields with low and high, or choices, each"),
        ({"training.rl": {"low": 0, "high": 1}}, "training.rl is no known field: did you mean training.lr?"),
        ({"data.name": {"choices": ["digits", "cifar10"]}}, "data.name must be left to --config"),
        ({"threat.eps": {"low": 0.1, "high": 0.2}}, "it decides what a robust accuracy means"),
        ({"training.seed": {"low": 0, "high": 9}}, "training.seed must be left to --config"),
        ({"training.lr": 0.1}, "training.lr must be low and high (and log or step), or choices, got 0.1"),
        ({"training.lr": {"low": 0.1}}, "training.lr must be low and high (and log or step), or choices"),
        ({"training.lr": {"low": 1, "high": 2, "choices": [1, 2]}}, "training.lr must be low and high"),
        ({"training.lr": {"low": 0.2, "high": 0.1}}, "training.lr: high must be > low (0.2), got 0.1"),
        ({"training.lr": {"low": -1, "high": 0.1}}, "training.lr must be > 0"),
        ({"training.momentum": {"low": 0, "high": 0.9, "log": True}}, "training.momentum: low must be > 0 with log"),
        ({"training.lr": {"low": 0.1, "high": 1, "log": 1}}, "training.lr: log must be true or false, got 1"),
        ({"training.lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "training.lr: step must be left out"),
        ({"training.beta": {"low": 1, "high": 2, "step": 3}}, "training.beta: step must be > 0 and <= 1, the range"),
        ({"training.epochs": {"low": 1.5, "high": 3}}, "training.epochs must be a whole number, got 1.5"),
        ({"model.router": {"low": 1, "high": 2}}, "model.router must be choices, as it is no number"),
        ({"model.router": {"choices": ["layer", "lair"]}}, "model.router must be one of"),
        ({"model.router": {"choices": ["layer"]}}, "model.router: choices must be a list of 2 to 100 values"),
        ({"training.beta": {"choices": [1, [2]]}}, "training.beta: choices must be plain values, got [2]"),
        ({"training.beta": {"choices": [1, 1]}}, "training.beta: choices must be values given once"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(values, message):
    with pytest.raises(InputError) as told:
        space(values)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_file_is_named(tmp_path):
    (tmp_path / "space.yaml").write_text("training.lr: {low: 3, high: 2}\n")
    with pytest.raises(InputError, match=r"space\.yaml: training\.lr: high must be > low"):
        read_space(tmp_path / "space.yaml")


def test_dotted_values_become_groups():
    assert overrides({"training.lr": 0.1, "model.width": 8, "training.beta": 2.0}) == {
        "training": {"lr": 0.1, "beta": 2.0}, "model": {"width": 8},
    }  # fmt: skip


def test_the_page_s_space_and_configuration_make_a_search():
    files = {each.title: parse_yaml(each.text, "page") for each in blocks(DOCS / "how-to" / "search.md", "yaml")}
    settings = SearchSettings(space=space(files["space.yaml"]), base=files["digits.yaml"], pruner="asha")
    assert [each.name for each in settings.space] == [
        "training.lr",
        "training.attack_steps",
        "training.beta",
        "training.momentum",
    ]
    config = settings.configured({"training.lr": 0.1, "training.attack_steps": 3})
    assert config.training.attack_steps == 3 and config.training.epochs == 3

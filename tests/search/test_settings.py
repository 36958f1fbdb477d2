"""What a search is, and that its folder keeps to it."""

import pytest
import yaml

from advmoe.errors import InputError


def test_a_trial_has_the_values_drawn_and_steps_that_follow(make_settings):
    settings = make_settings(varied={"training.attack_steps": {"low": 1, "high": 4}})
    for steps in (1, 4):  # 1.25 eps / K, eps being 0.1
        config = settings.configured({"training.attack_steps": steps})
        assert config.training.attack_steps == steps and float(config.training.step_size) == pytest.approx(
            0.125 / steps
        )
    assert settings.configured({"training.attack_steps": 2}).model.width == 4


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({}, {"objective": "worst"}, "--objective must be one of worst_case, clean_accuracy, got 'worst'"),
        ({}, {"sampler": "grid"}, "--sampler must be one of tpe, random, got 'grid'"),
        ({}, {"pruner": "asha2"}, "--pruner must be one of none, median, asha, got 'asha2'"),
        ({"data": {"val_fraction": 0.0}}, {}, "data.val_fraction must be > 0, as trials are compared on that part"),
        ({"training": {"method": "standard"}}, {}, "--objective must be clean_accuracy when training.method is stand"),
    ],
)
def test_a_mistake_is_one_line(make_settings, groups, options, message):
    with pytest.raises(InputError) as told:
        make_settings(groups, **options)
    assert message in str(told.value)


def test_a_backbone_to_choose_must_be_one(make_settings):
    assert make_settings(varied={"model.name": {"choices": ["resnet18", "wrn-10-1"]}}).space
    with pytest.raises(InputError, match=r"^model.name: choices must be one of .*, got 'resnet19'"):
        make_settings(varied={"model.name": {"choices": ["resnet18", "resnet19"]}})


def test_a_folder_holds_one_search(make_settings, tmp_path):
    make_settings().keep(tmp_path)
    kept = yaml.safe_load((tmp_path / "search.yaml").read_text())
    assert kept["space"] == {"training.lr": {"low": 0.01, "high": 0.2, "log": True}}
    assert kept["config"]["training"]["epochs"] == 2
    make_settings().keep(tmp_path)
    with pytest.raises(InputError, match="has another pruner"):
        make_settings(pruner="asha").keep(tmp_path)
    with pytest.raises(InputError, match="has another config"):
        make_settings({"training": {"epochs": 3}}).keep(tmp_path)


def test_a_pruner_watches_what_is_searched_for(make_settings):
    assert make_settings().watched == "robust_accuracy"
    assert make_settings(objective="clean_accuracy").watched == "clean_accuracy"

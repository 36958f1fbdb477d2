"""What data, backbones and sizes are called, from the settings of runs."""

import pytest

from advmoe.studies.labels import field_of, of_backbone, of_data, other_folder, same_threat, shared

FOLDER = {"data": {"name": "folder", "root": "data/cifar10"}}


def test_names_carry_the_size_that_is_set():
    assert of_backbone("resnet18", {}) == "resnet18"
    assert of_backbone("resnet18", {"model": {"width": 8}}) == "resnet18 of width 8"
    assert of_data("digits", {"data": {"image_size": None}}) == "digits"
    assert of_data("digits", {"data": {"image_size": 8}}) == "digits at 8 pixels"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"name": "folder", "root": "/elsewhere/cifar10/"}, None),  # called as usual
        ({"name": "folder", "root": "my/cats"}, "cats"),
        ({"name": "cifar10", "root": "my/cats"}, None),  # its images are known by its name
    ],
)
def test_a_folder_of_other_images_is_named(data, name):
    assert other_folder(FOLDER, {"data": data}) == name


def test_threat_models_are_compared_by_norm_and_radius():
    usual = {"threat": {"norm": "linf", "eps": "8/255"}}
    assert same_threat(usual, {"threat": {"norm": "linf", "eps": 8 / 255}})
    assert not same_threat(usual, {"threat": {"norm": "l2", "eps": "8/255"}})
    assert not same_threat(usual, {"threat": {"norm": "linf", "eps": "4/255"}})


def test_what_all_settings_share():
    several = [{"a": {"x": 1, "y": 2}, "b": {"z": 3}}, {"a": {"x": 1, "y": 5}, "c": {}}]
    assert shared(several) == {"a": {"x": 1}} and shared([]) == {}
    assert field_of(several[0], "b", "z") == 3 and field_of(several[1], "b", "z") is None

"""Images to try a model on: a run's own, or random ones that say why."""

import json

import pytest
import torch

from advmoe.data import load_dataset
from advmoe.evaluation.images import input_shape, random_images, run_images
from advmoe.models import create_model
from advmoe.models.runs import load_run

pytestmark = pytest.mark.usefixtures("shallow_backbones")


def test_random_images_are_pixels_that_differ_and_the_same_at_every_call():
    images = random_images((2, 6, 5), 30)
    assert images.shape == (30, 2, 6, 5) and images.min() >= 0 and images.max() <= 1
    assert images.mean((1, 2, 3)).std() > 0.05  # in brightness, and in more than noise
    assert torch.equal(images, random_images((2, 6, 5), 30))


def test_the_shape_is_the_model_s():
    assert input_shape(create_model("resnet18", num_classes=3, width=4, in_channels=1, input_size=8)) == (1, 8, 8)
    free = create_model("resnet18", num_classes=3, width=4, kind="dense")
    free.spec["input_size"] = None
    with pytest.raises(ValueError, match="images must be given for a model without an input size, got 'resnet18'"):
        input_shape(free)


def test_a_run_s_own_test_images(make_digits_run, tmp_path):
    run = make_digits_run(tmp_path / "run")
    images, told = run_images(run, load_run(run), 20)
    assert told == "test images of digits" and images.shape == (20, 1, 8, 8)
    test = load_dataset("digits", image_size=8).test.pixels(slice(None))
    assert all((image == test).flatten(1).all(1).any() for image in images)


@pytest.mark.parametrize(
    ("data", "why"),
    [(None, "no config.yaml"), ({"name": "digits", "image_size": 16}, "images of 8 x 8, got (16, 16)")],
    ids=["no config", "other size"],
)
def test_else_random_images_with_the_reason(make_digits_run, tmp_path, data, why):
    run = make_digits_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    if data is not None:
        (run / "config.yaml").write_text(json.dumps({"data": data}))
    images, told = run_images(run, load_run(run), 7)
    assert told.startswith("random images, not the run's (") and why in told
    assert torch.equal(images, random_images((1, 8, 8), 7))

"""Progressive resizing: what images become, and which sizes a model takes."""

import warnings

import pytest
import torch

from advmoe.models import create_model
from advmoe.training.resizing import require_sizes, shrunk


def test_a_pixel_is_the_mean_of_those_that_it_covers():
    x = torch.arange(16.0).view(1, 1, 4, 4) / 16
    assert shrunk(x, None) is x
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]]) / 16  # (0 + 1 + 4 + 5) / 4, and so on
    assert torch.equal(shrunk(x, 2), expected[None, None])
    many = torch.rand(2, 3, 12, 12)
    small = shrunk(many, 8)  # 12 / 8: squares of two pixels, that overlap
    assert small.shape == (2, 3, 8, 8) and small.is_contiguous(memory_format=torch.channels_last)
    assert small.amin() >= many.amin() and small.amax() <= many.amax()


@pytest.mark.parametrize("router", ["layer", "embedding"])
def test_a_cnn_takes_smaller_images_and_says_nothing_of_them(shallow_backbones, router):
    model = create_model("resnet18", num_classes=3, width=8, input_size=16, router=router)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_sizes(model, [8, 12, 8], 16, 3)
        model.eval()(torch.zeros(1, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "sides", "message"),
    [
        ("resnet18", [8, 16], "training.first_image_sizes must be < the 16 pixels of the images, got 16"),
        ("deit-tiny", [8], "training.first_image_sizes must be sides that the model takes, got 8: images must be 16"),
        ("vgg16", [1], "training.first_image_sizes must be sides that the model takes, got 1: "),
    ],
)
def test_other_sizes_are_one_line(name, sides, message):
    width = {"deit-tiny": 64}.get(name, 4)
    model = create_model(name, num_classes=3, width=width, input_size=16, kind="dense")
    with pytest.raises(ValueError) as caught:
        require_sizes(model, sides, 16, 3)
    assert message in str(caught.value) and "\n" not in str(caught.value)

"""Normalisation inside the model, by hand."""

import pytest
import torch

from advmoe.models.normalize import Normalize


def test_pixels_are_centred_and_scaled_by_channel():
    normalize = Normalize((0.5, 0.25), (0.5, 0.125))
    x = torch.tensor([[1.0, 0.5], [0.0, 0.25]]).view(2, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    y = normalize(x.expand(2, 2, 3, 4).contiguous(memory_format=torch.channels_last))
    assert y[:, :, 0, 0].tolist() == [[1.0, 2.0], [-1.0, 0.0]]
    assert y.shape == (2, 2, 3, 4) and y.is_contiguous(memory_format=torch.channels_last)
    assert set(normalize.state_dict()) == {"mean", "std"} and not list(normalize.parameters())


@pytest.mark.parametrize("shape", [(2, 4, 4), (5, 1, 4, 4), (5, 3, 4, 4), (1, 5, 2, 4, 4), (2,)])
def test_what_would_be_stretched_to_images_is_refused(shape):
    with pytest.raises(ValueError, match=r"^images must be \(N, 2, H, W\), got \("):
        Normalize((0.5, 0.25), (0.5, 0.125))(torch.rand(shape))

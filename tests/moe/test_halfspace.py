"""Routers by the sides of hyperplanes: the choices, their radii and thresholds by hand."""

import pytest
import torch

from advmoe import create_model, pathway
from advmoe.moe.halfspace import STEEPNESS, HalfspaceRouter, fixed_router, linear_router
from advmoe.moe.repeats import unrecorded

BRIGHT_ABOVE = torch.zeros(1, 1, 8, 8)
BRIGHT_ABOVE[:, :, :2] = 1


def test_the_top_quarter_decides():
    router = fixed_router(1, 8, 3, 2, form="top")
    scores = router(torch.cat([BRIGHT_ABOVE, 1 - BRIGHT_ABOVE]))
    assert len(scores) == 3 and scores[0] is scores[2]
    # Brightness 1 and 0 against 0.5: 0.5 of radius to either side.
    assert (scores[0][:, 1] - scores[0][:, 0]).tolist() == pytest.approx([STEEPNESS / 2, -STEEPNESS / 2])
    assert list(router.parameters()) == [] and sorted(router.state_dict()) == ["threshold", "weight"]


def test_an_image_at_the_threshold_takes_the_first_expert():
    assert fixed_router(3, 8, 1, 2, form="mean")(torch.full((1, 3, 8, 8), 0.5))[0].argmax(1).tolist() == [0]


def test_two_bits_drive_the_first_and_the_last_layers():
    router = fixed_router(1, 8, 5, 2, form="top-bottom")
    choices = [each.argmax(1).item() for each in router(BRIGHT_ABOVE)]
    assert router.layers == [0, 0, 0, 1, 1] and choices == [1, 1, 1, 0, 0]
    assert fixed_router(1, 8, 1, 2, form="top-bottom").layers == [0]


def test_late_layers_alone_may_be_routed():
    router = fixed_router(3, 8, 5, 2, form="late")
    dark, bright = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    router.fit([torch.cat([dark, bright, bright])])
    assert router.thresholds.tolist() == [1.0, 1.0]  # the first bit's is left alone: no image reaches it
    router.fit([torch.cat([dark, dark, bright])])
    assert router.thresholds.tolist() == [1.0, 0.0]
    chosen = [scores.argmax(1).tolist() for scores in router(torch.cat([dark, bright]))]
    assert chosen == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 1]]
    assert all(scores.isfinite().all() for scores in router(bright))
    only = fixed_router(3, 8, 1, 2, form="late")
    assert [scores.argmax(1).tolist() for scores in only(torch.cat([dark, bright]))] == [[0, 1]]
    assert router.radii(bright, "linf")[0, 0] > 1e6 and router.radii(bright, "linf")[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_thresholds_are_medians(channels):
    router = fixed_router(channels, 8, 2, 2, form="mean")
    grey = [torch.full((1, channels, 8, 8), value) for value in (0.1, 0.2, 0.9, 0.7)]
    router.fit([torch.cat(grey[:2]), torch.cat(grey[2:])])
    assert router.thresholds.item() == pytest.approx(0.45)  # between 0.2 and 0.7
    assert router(torch.cat(grey))[0].argmax(1).tolist() == [0, 0, 1, 1]


def test_a_learnt_threshold_is_the_mean_of_batches():
    router = linear_router(1, 8, 2, 2, bits=1).train()
    with torch.no_grad():
        router.weight.fill_(1 / 16)
    router.fit([torch.full((1, 1, 8, 8), value) for value in (0.2, 0.6)])
    assert router.thresholds.item() == pytest.approx(0.4)
    batch = torch.cat([torch.full((1, 1, 8, 8), value) for value in (0.7, 0.8, 0.9)])
    scores = router(batch)[0]  # against 0.8, and nine tenths of 0.4 with one of 0.8 are kept
    assert scores[:, 1].tolist() == pytest.approx([-STEEPNESS / 20, 0, STEEPNESS / 20], abs=1e-4)
    assert router.thresholds.item() == pytest.approx(0.44)
    assert router.eval()(batch)[0].argmax(1).tolist() == [1, 1, 1] and router.thresholds.item() == pytest.approx(0.44)
    with unrecorded(router.train()):
        router(batch)
    assert router.thresholds.item() == pytest.approx(0.44)
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_radii_by_hand():
    weight = torch.zeros(1, 1, 4, 4)
    weight[0, 0, 0, 0], weight[0, 0, 3, 3] = 3, -1
    router = HalfspaceRouter(weight, 1, 2, learnt=False)
    router.thresholds.fill_(1.2)
    x = torch.full((1, 1, 8, 8), 0.5)  # w . x = 1, 0.2 from the threshold; each cell has four pixels
    assert router.radii(x, "linf").item() == pytest.approx(0.2 / 4)
    assert router.radii(x, "l2").item() == pytest.approx(0.2 / (10 / 4) ** 0.5)


@pytest.mark.parametrize("size", [8, 10])
def test_pixel_weights_are_the_routers_own(size):
    torch.manual_seed(0)
    router, x = linear_router(3, 8, 4, 2, bits=2), torch.rand(5, 3, size, size)
    weights = router.pixel_weights(3, size, size).float()
    torch.testing.assert_close(torch.einsum("nchw,bchw->nb", x, weights), router.projections(x), atol=1e-5, rtol=1e-5)


def test_only_two_experts():
    with pytest.raises(ValueError, match=r"model\.num_experts must be 2 .*got 3"):
        fixed_router(3, 8, 2, 3, form="top")


def test_the_model_shows_it_pixels_that_are_not_normalised():
    model = create_model(
        "resnet18", num_classes=10, width=4, in_channels=1, input_size=8, router="fixed-top", mean=[0.9], std=[0.1]
    )
    assert pathway(model, BRIGHT_ABOVE).unique().tolist() == [1]
    assert pathway(model, BRIGHT_ABOVE * 0.4).unique().tolist() == [0]

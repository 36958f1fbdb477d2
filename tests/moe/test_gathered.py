"""The modes that are exported, without gradients: weights gathered for one image, and every expert for any number."""

import pytest
import torch

from advmoe.moe import route


@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer"},
        {"router": "embedding", "experts": "independent", "num_experts": 3},
        {"router": "image", "num_experts": 3, "scale": 0.5},  # windows that overlap and wrap around
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs.values())),
)
def test_gathered_and_masked_agree_with_hard(make_routed, make_images, kwargs):
    model, images = make_routed(**kwargs), make_images()
    with torch.no_grad():
        with route() as hard:
            expected = model(images)
        assert len(hard.pathway().unique(dim=0)) > 1
        with route("masked") as masked:
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(masked.pathway(), hard.pathway())
        for image, taken, logits in zip(images.split(1), hard.pathway(), expected, strict=True):
            with route("gathered") as gathered:
                torch.testing.assert_close(model(image)[0], logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(gathered.pathway()[0], taken)


def test_gathered_takes_the_forced_expert(make_routed, make_images):
    model, image = make_routed(), make_images()[:1]
    layers = len(set(model.state_dict()) & {f"{name}.bank" for name, _ in model.named_modules()})
    outputs = []
    for expert in (0, 1):
        forced = torch.full((1, layers), expert)
        with torch.no_grad(), route("gathered", forced=forced):
            outputs.append(model(image))
        with torch.no_grad(), route(forced=forced):
            torch.testing.assert_close(outputs[-1], model(image), rtol=1e-4, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_gathered_is_for_one_image(make_routed, make_images):
    model = make_routed()
    with pytest.raises(ValueError, match=r"mode gathered must be for 1 image .*, got 2 choices"), route("gathered"):
        model(make_images(2))

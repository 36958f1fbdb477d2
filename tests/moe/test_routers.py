"""Routers: what their scores are of, by hand, and that they do not depend on the batch or on low precision."""

import pytest
import torch
from torch import nn

from advmoe.models import create_model
from advmoe.moe import LayerRouter, MoELinear, route
from advmoe.moe.routers import ImageRouter, routers_of


def layer_router(**kwargs):
    torch.manual_seed(0)
    router = LayerRouter(4, 3, **kwargs)
    nn.init.uniform_(router.norm.running_var, 0.5, 2)
    return router.eval()


def image_router(**kwargs):
    torch.manual_seed(0)
    settings = {"in_channels": 3, "width": 8, "num_layers": 5, "num_experts": 2, "shared": False, **kwargs}
    return ImageRouter(**settings).eval()


def test_a_layer_s_router_is_a_norm_and_a_small_network_on_the_mean_of_pixels():
    router, x = layer_router(), torch.rand(6, 4, 5, 3)
    expected = router.scores(router.hidden(router.norm(x.mean((2, 3)))).relu())
    with torch.no_grad(), route():
        torch.testing.assert_close(router(x), expected)
        torch.testing.assert_close(router(x.flatten(2).transpose(1, 2)), expected)  # as tokens
        torch.testing.assert_close(router(x.mean((2, 3))), expected)  # as features
    assert router.hidden.out_features == 8 and LayerRouter(400, 2).hidden.out_features == 64  # a quarter, 8 to 64


def test_per_token_each_token_has_scores_of_its_own():
    router, tokens = layer_router(per_token=True), torch.rand(2, 5, 4)
    with torch.no_grad():
        scores = router(tokens)
        assert scores.shape == (2, 5, 3)
        for image in range(2):
            torch.testing.assert_close(scores[image], router(tokens[image]))


@pytest.mark.parametrize("kind", ["layer", "none"])
def test_norms_over_an_image_or_none_keep_no_statistics(kind):
    torch.manual_seed(0)
    router, x = LayerRouter(4, 3, norm=kind), torch.rand(6, 4, 5, 3)
    pooled = x.mean((2, 3))
    spread = pooled.var(1, correction=0, keepdim=True) + 1e-5
    normed = (pooled - pooled.mean(1, keepdim=True)) / spread.sqrt() if kind == "layer" else pooled
    expected = router.scores(router.hidden(normed).relu())
    for mode in (True, False):  # train, eval
        router.train(mode)
        with route():
            torch.testing.assert_close(router(x), expected)  # with gradients
            with torch.no_grad():
                torch.testing.assert_close(router(x), expected)
                torch.testing.assert_close(router(x[:1]), expected[:1])
                tokens = router(x.flatten(2).transpose(1, 2))
        torch.testing.assert_close(tokens, expected)
    assert not [*router.buffers()] and not [*image_router(norm=kind).buffers()]
    image, pixels = image_router(norm=kind).train(), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(image(pixels)[0][:1], image(pixels[:1])[0])


@pytest.mark.parametrize("shared", [False, True])
def test_a_router_of_the_image_scores_every_layer(shared):
    router, x = image_router(shared=shared), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        scores = router(x)
        alone = router(x[:1])
    assert len(scores) == 5 and all(each.shape == (4, 2) for each in scores)
    assert all(each is scores[0] for each in scores) == shared
    for each, one in zip(scores, alone, strict=True):
        torch.testing.assert_close(one, each[:1])


def test_images_are_averaged_over_squares_first():
    plain, pooled = image_router(), image_router(pool=2)
    x = torch.rand(2, 3, 16, 16)
    squares = x.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
    with torch.no_grad():
        for ours, expected in zip(pooled(x), plain(squares), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("make", [layer_router, image_router])
def test_scores_are_fp32_under_autocast(make):
    router, x = make(), torch.rand(2, *((4,) if make is layer_router else (3, 16, 16)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = router(x)
    assert all(each.dtype == torch.float32 for each in (scores if isinstance(scores, list) else [scores]))


def test_the_routers_of_a_network_are_found_wherever_they_are():
    layer = MoELinear(4, 2, bank_rows=4, num_experts=2, layer=0)
    model = create_model("resnet18", num_classes=3, width=4, router="image")
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer), model)
    assert list(routers_of(network)) == [layer.router, model.router]

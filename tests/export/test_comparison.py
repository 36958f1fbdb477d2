"""A graph beside its model: which differences are refused, which are ties, and how the two are timed."""

import pytest
import torch
from torch import nn

from advmoe.evaluation.images import random_images
from advmoe.export import ExportFailed, compared, comparison
from advmoe.export.comparison import TIE, TOLERANCE, timed
from advmoe.moe import LayerRouter, pathway, route

SIDE = 16


class Sums(nn.Module):
    """Logits (N, 2): the image's sum, and that times -1."""

    def forward(self, x):
        total = x.flatten(1).sum(1)
        return torch.stack([total, -total], 1)


def off(*by):
    """The graph of `Sums` with image i's first logit off by `by[i]`; notes how many images it gets at once."""
    sizes = []

    def run(x):
        sizes.append(len(x))
        logits = Sums()(x)
        logits[:, 0] += torch.tensor([by[int(each)] for each in x[:, 0, 0, 0]])
        return (logits,)

    return run, sizes


def numbered(values):
    """Images (N, 1, 1, 2): the number of each, and what makes its sum the value."""
    numbers = torch.arange(len(values), dtype=torch.float32)
    return torch.stack([numbers, torch.tensor(values) - numbers], 1).view(-1, 1, 1, 2)


def test_a_plain_graph_is_allowed_a_share_of_the_largest_logit():
    images = numbered([0.5, 100.0, 2.0])
    graph, sizes = off(0.9e-4, 0.9e-2, -1.9e-4)  # of 1e-4, 1e-2 and 2e-4
    told = compared(Sums(), graph, images)
    assert told["largest_difference"] == pytest.approx(0.9e-2, rel=1e-2)
    assert (told["images"], told["pathways"], told["ties"], told["allowed"]) == (3, 0, [], TOLERANCE)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize(("image", "by"), [(0, 1.2e-4), (1, -1.2e-2), (2, float("nan"))])
def test_the_image_that_differs_is_named(image, by):
    graph, _ = off(*(by if each == image else 0.0 for each in range(3)))
    with pytest.raises(ExportFailed, match=f"^logits must be PyTorch's to .* apart on image {image}$"):
        compared(Sums(), graph, numbered([0.5, 100.0, 2.0]))


def test_batches_are_tried_whole_and_begun():
    graph, sizes = off(*[0.0] * 7)
    compared(Sums(), graph, numbered([1.0] * 7), batch=4)
    assert sizes == [4, 3, 1, 3]  # all seven, and the first 1 and 3
    graph, sizes = off(*[0.0] * 7)
    compared(Sums(), graph, numbered([1.0] * 7), batch=2)
    assert sizes == [2, 2, 2, 1, 1]


@pytest.fixture
def tied(warmed):
    """A model, and an image on which layer 0's two scores are `gap` apart, the first being the higher."""
    model = warmed()
    router = model.backbone.blocks[0].conv1.router
    assert isinstance(router, LayerRouter)

    def make(gap):
        with torch.no_grad():
            router.scores.weight.zero_()
            router.scores.bias.copy_(torch.tensor([gap, 0.0]))
        return model.requires_grad_(False), random_images((3, SIDE, SIDE), 3)

    return make


def other_way(model):
    """The model, with the other expert in layer 0."""

    def run(x):
        forced = pathway(model, x)
        forced[:, 0] = 1
        with route(forced=forced):
            return model(x), forced

    return run


def test_a_tie_is_named_and_its_logits_compared_along_the_pathway_taken(tied):
    model, images = tied(0.0)
    comparison = compared(model, other_way(model), images)
    assert comparison["ties"] == [{"image": image, "layer": 0, "gap": 0.0} for image in range(3)]
    assert comparison["largest_difference"] == 0
    with route(forced=other_way(model)(images)[1]):
        apart = (model(images) - model.eval()(images)).abs().max()
    assert apart == 0  # forced both times
    assert (other_way(model)(images)[0] - model(images)).abs().max() > 1e-3  # which the pathway chosen would not show


def test_another_choice_that_is_no_tie_is_an_error(tied):
    model, images = tied(1e-3)
    with pytest.raises(ExportFailed, match=r"PyTorch's experts, got another in layer 0, where .* 0\.001 apart"):
        compared(model, other_way(model), images)


def test_scores_just_within_a_tie_are_one_and_just_beyond_are_not(tied):
    model, images = tied(0.5 * TIE)
    assert [each["gap"] for each in compared(model, other_way(model), images)["ties"]] == pytest.approx([0.5 * TIE] * 3)
    model, images = tied(2 * TIE)
    with pytest.raises(ExportFailed, match=r"another in layer 0, where the scores are 2e-05 apart$"):
        compared(model, other_way(model), images)


def test_times_are_medians_of_all_but_each_turn_s_first_pass(monkeypatch):
    clock = [0.0]

    def lasting(*milliseconds):
        """A call of five passes a turn that takes so long."""
        calls = []

        def run(x):
            assert x.shape == (1, 1, 2, 2)
            clock[0] += milliseconds[len(calls) % len(milliseconds)] / 1000
            calls.append(len(x))

        return run, calls

    monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
    model, ours = lasting(50.0, 4.0, 3.0, 5.0, 4.0)  # the first of a turn does not count: the median is 4
    graph, theirs = lasting(50.0, 2.0, 1.0, 2.0, 9.0)
    told = timed(model, graph, torch.rand(3, 1, 2, 2), rounds=3)
    assert (told["pytorch_ms"], told["exported_ms"], told["speedup"]) == (4.0, 2.0, 2.0)
    assert (told["batch"], told["passes"], told["threads"]) == (1, 12, torch.get_num_threads())
    assert len(ours) == len(theirs) == 3 * (1 + 4)

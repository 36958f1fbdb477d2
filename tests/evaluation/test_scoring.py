"""How numbers are taken: which examples, on which device, what counts as right, and what is counted."""

import pytest
import torch
from torch import nn

from advmoe.data import ImageSet
from advmoe.evaluation.scoring import Counted, OpenRouting, answering, correct, is_routed, measuring, size, stream, take
from advmoe.moe import pathway

CPU = torch.device("cpu")


def image_set(n=5):
    images = torch.arange(n * 12, dtype=torch.uint8).view(n, 3, 2, 2)
    return ImageSet(images, torch.arange(n))


def test_examples_are_taken_as_pixels_in_order():
    x, y = take(image_set(), slice(1, 3), CPU)
    assert x.shape == (2, 3, 2, 2) and x.is_contiguous(memory_format=torch.channels_last)
    assert (x * 255).round().flatten().tolist() == list(range(12, 36)) and y.tolist() == [1, 2]
    pixels = torch.rand(4, 3, 2, 2)
    x, y = take((pixels, torch.tensor([3, 2, 1, 0])), slice(2, None), CPU)
    assert torch.equal(x, pixels[2:]) and y.tolist() == [1, 0]


def test_a_stream_is_every_slice_in_turn():
    slices = [slice(0, 2), slice(2, 5)]
    streamed = list(stream(image_set(), slices, CPU))
    for (x, y), index in zip(streamed, slices, strict=True):
        expected = take(image_set(), index, CPU)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])


def test_the_number_of_examples():
    assert size(image_set(4)) == size((torch.rand(4, 1), torch.zeros(4))) == 4
    with pytest.raises(ValueError, match="a class for each, got 3 images, 2 labels"):
        size((torch.rand(3, 1), torch.zeros(2)))


def test_a_logit_that_is_no_number_makes_an_answer_wrong():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, 2.0], [1.0, 2.0], [nan, 0.0], [0.0, inf], [-inf, 0.0], [-inf, 0.0]])
    right = correct(logits, torch.tensor([1, 0, 0, 1, 1, 0])).tolist()
    assert right == [True, False, False, False, True, False]  # a class may be ruled out


def test_an_image_with_a_gradient_is_a_pass_each_way():
    counted = Counted(lambda x: x.flatten(1))
    counted(torch.rand(3, 1, 2, 2))
    counted(torch.rand(4, 1, 2, 2, requires_grad=True))
    with torch.no_grad():
        counted(torch.rand(5, 1, 2, 2, requires_grad=True))
    assert (counted.forward, counted.gradient) == (12, 4)


def test_what_a_classifier_raises_names_the_images_and_lack_of_memory_stays_itself():
    rule = r"must take images \(2, 3\) without an error, got KeyError: 'a'"
    with pytest.raises(ValueError, match=rule), answering(torch.rand(2, 3)):
        raise KeyError("a")
    with pytest.raises(MemoryError), answering(torch.rand(2, 3)):
        raise MemoryError


def test_a_module_is_measured_in_eval_mode_without_gradients_of_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with measuring(model, CPU):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_moe_layers_are_seen_as_they_run(make_routed, make_images):
    model, data = make_routed(), (make_images(3), torch.zeros(3, dtype=torch.long))
    assert is_routed(model, data, CPU) and is_routed(lambda x: model(x), data, CPU)
    assert not is_routed(nn.Flatten(), data, CPU)


def test_a_routing_laid_open(make_routed, make_images):
    model, x = make_routed(), make_images(6)
    opened = OpenRouting(model)
    with torch.no_grad():
        hard = opened(x)
        assert torch.equal(hard.pathway, pathway(model, x)) and len(hard.scores) == hard.pathway.shape[1]
        torch.testing.assert_close(hard.logits, model(x))
        forced = opened(x, forced=1 - hard.pathway)
        assert torch.equal(forced.pathway, 1 - hard.pathway)
        # At a temperature near 0 the mixture is the chosen expert.
        torch.testing.assert_close(opened(x, temperature=1e-6).logits, hard.logits, rtol=1e-3, atol=1e-4)

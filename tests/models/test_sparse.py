"""Sparse models: scores, masks, their gradient, and files."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advmoe.models import create_model, load_model, save_model
from advmoe.models.sparse import SparseBackbone, scores_of


def small(name="resnet18", **kwargs):
    torch.manual_seed(0)
    settings = {"num_classes": 3, "width": 4, "input_size": 16, "kind": "sparse", **kwargs}
    return create_model(name, **settings)


class Two(nn.Module):
    """Four channels that two layers read."""

    def __init__(self):
        super().__init__()
        self.writer = nn.Conv2d(1, 4, 1, bias=False)
        self.reader = nn.Conv2d(4, 2, 1, bias=False)
        self.logits = nn.Linear(2 + 4, 2)

    def forward(self, x):
        x = self.writer(x)
        return self.logits(torch.cat((self.reader(x), x), 1).mean((2, 3)))


def two(scale=0.5):
    network = Two()
    with torch.no_grad():
        network.reader.weight.copy_(torch.tensor([[3.0, 0, 2, 1], [0, 0, 0, 1]])[..., None, None])
        network.logits.weight.copy_(torch.tensor([[1.0, 2, 4, 0, 0, 1], [0, 0, 0, 0.5, 0, 1]]))
    return SparseBackbone(network, scale)


def test_scores_start_as_norms_of_what_is_read():
    masked = two()
    assert [tuple(score.shape) for score in masked.scores] == [(4,), (2,)] and masked.keep == (2, 1)
    # Channel by channel, the reader's two rows and the logits' two: 9 + 16, 0.25, 4, 1 + 1 + 1 + 1.
    norms = torch.tensor([5, 0.5, 2, 2])
    torch.testing.assert_close(masked.scores[0].data, math.sqrt(6 / 4) * norms / 5)
    torch.testing.assert_close(masked.scores[1].data, math.sqrt(6 / 2) * torch.tensor([0.5, 1]))
    assert [channels.tolist() for channels in masked.surviving_channels()] == [[0, 2], [1]]  # of equal scores the first


def test_weights_of_zero_make_scores_of_zero():
    masked = two()
    nn.init.zeros_(masked.dense.reader.weight)
    nn.init.zeros_(masked.dense.logits.weight)
    masked.reset_scores()
    assert all(torch.equal(score, torch.zeros_like(score)) for score in masked.scores)
    assert [channels.tolist() for channels in masked.surviving_channels()] == [[0, 1], [0]]


def test_dropped_channels_are_read_as_zero():
    masked, x = two(), torch.rand(3, 1, 2, 2)
    y = F.conv2d(x, masked.dense.writer.weight) * torch.tensor([1.0, 0, 1, 0]).view(1, 4, 1, 1)
    read = F.conv2d(y, masked.dense.reader.weight) * torch.tensor([0.0, 1]).view(1, 2, 1, 1)
    expected = F.linear(torch.cat((read, y), 1).mean((2, 3)), masked.dense.logits.weight, masked.dense.logits.bias)
    torch.testing.assert_close(masked(x), expected)


def test_a_score_s_gradient_is_that_of_reading_its_channel():
    masked, x = two(), torch.rand(3, 1, 2, 2)
    gates = torch.tensor([1.0, 0, 1, 0], requires_grad=True)
    y = F.conv2d(x, masked.dense.writer.weight) * gates.view(1, 4, 1, 1)
    read = F.conv2d(y, masked.dense.reader.weight) * torch.tensor([0.0, 1]).view(1, 2, 1, 1)
    logits = F.linear(torch.cat((read, y), 1).mean((2, 3)), masked.dense.logits.weight, masked.dense.logits.bias)
    (expected,) = torch.autograd.grad(logits.square().sum(), gates)
    masked(x).square().sum().backward()
    torch.testing.assert_close(masked.scores[0].grad, expected)
    assert (expected[[1, 3]] != 0).all()  # the dropped ones' too


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-2", "vgg16", "densenet40"])
def test_every_score_of_a_backbone_learns(name):
    model = small(name)
    F.cross_entropy(model(torch.rand(8, 3, 16, 16)), torch.arange(8) % 3).backward()
    assert scores_of(model) == list(model.backbone.scores)
    assert all(score.grad.isfinite().all() and score.grad.abs().sum() > 0 for score in scores_of(model))


def test_it_is_the_dense_model_under_masks():
    dense, whole, half = small(kind="dense"), small(scale=1.0), small()
    x = torch.rand(4, 3, 16, 16)
    for masked in (whole, half):  # the same draws
        state = masked.backbone.dense.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in dense.backbone.state_dict().items())
    torch.testing.assert_close(whole.eval()(x), dense.eval()(x))
    assert not torch.allclose(half.eval()(x), dense(x), atol=1e-3)
    assert not half.routed and scores_of(dense) == []


def test_files_keep_the_scores(tmp_path):
    model = small(scale=0.3)
    with torch.no_grad():
        for score in scores_of(model):
            score.uniform_()
    save_model(model, tmp_path)
    loaded, x = load_model(tmp_path), torch.rand(4, 3, 16, 16)
    assert loaded.spec == model.spec and loaded.spec["kind"] == "sparse"
    assert all(map(torch.equal, scores_of(loaded), scores_of(model)))
    torch.testing.assert_close(loaded(x), model.eval()(x))


def test_a_transformer_has_no_channels_to_prune():
    with pytest.raises(ValueError, match=r"^model.name must be a CNN when model.kind is sparse, got 'deit-tiny'$"):
        small("deit-tiny", width=64)

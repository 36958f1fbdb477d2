"""What masks leave of a network, as a network: the same logits for the cost of S-Dense, on every backbone."""

import pytest
import torch
from torch.nn import functional as F

import advmoe
from advmoe.evaluation.cost import cost, gmacs, parameters
from advmoe.models import create_model
from advmoe.models.sparse import scores_of
from advmoe.pruning import adopt, compact, dense_form, deployed, expand

CNNS = ["resnet18", "resnet34", "resnet50", "wrn-10-1", "wrn-10-2", "vgg16", "densenet40"]
CASES = [
    (name, *each) for name in CNNS for each in ((4, 0.5, 16), (7, 0.5, 16), (6, 0.4, 16), (10, 0.2, 16), (5, 1.0, 16))
]
CASES += [(name, 8, 0.3, 128) for name in ("resnet18", "wrn-10-2", "densenet40")]  # with the stem of large images
SMALL = {"num_classes": 3, "input_size": 16}


def pruned(name="resnet18", seed=0, **kwargs):
    """A sparse model whose masks, statistics and biases are all random."""
    torch.manual_seed(seed)
    model = create_model(name, **{**SMALL, "width": 7, "kind": "sparse", **kwargs})
    with torch.no_grad():
        for score in scores_of(model):
            score.uniform_()
        for key, value in model.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.normal_()
            elif key.endswith("running_var"):
                value.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.usefixtures("shallow_backbones")
@pytest.mark.parametrize(("name", "width", "scale", "size"), CASES)
def test_compacted_logits_shapes_and_cost(name, width, scale, size):
    model = pruned(name, width=width, scale=scale, input_size=size)
    small = compact(model)
    x = torch.rand(4, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    narrow = create_model(**{**model.spec, "kind": "s-dense"})
    assert small.spec == narrow.spec and not any(module.training for module in small.modules())
    shapes = {key: value.shape for key, value in narrow.state_dict().items()}
    assert {key: value.shape for key, value in small.state_dict().items()} == shapes
    assert gmacs(model) == gmacs(small) == gmacs(narrow) and parameters(model) == parameters(narrow)


def test_in_train_mode_too():
    model, x, y = pruned("densenet40").train(), torch.rand(8, 3, 16, 16), torch.arange(8) % 3
    small = compact(model)
    assert all(module.training for module in small.modules())
    logits, expected = small(x), model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for found in (logits, expected):
        F.cross_entropy(found, y).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    torch.testing.assert_close(
        small.backbone.classifier.bias.grad, model.backbone.dense.classifier.bias.grad, rtol=1e-5, atol=1e-5
    )
    # The statistics of what is kept moved alike.
    for key, value in compact(model).state_dict().items():
        if "running" in key:
            torch.testing.assert_close(small.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_nothing_is_shared_and_no_random_number_drawn():
    model = pruned()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    small = advmoe.compact(model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for value in small.state_dict().values():
            value.fill_(7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-2", "vgg16", "densenet40"])
def test_expanding_puts_back_what_was_taken_and_leaves_the_rest(name):
    model = pruned(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = compact(model)
    assert expand(small, model) is model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        for key, value in small.state_dict().items():
            if not key.startswith("normalize") and value.is_floating_point():
                value.add_(1)
    expand(small, model)
    again = compact(model).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in small.state_dict().items())
    moved = sum(int((value != before[key]).sum()) for key, value in model.state_dict().items())
    assert moved == sum(v.numel() for k, v in again.items() if v.is_floating_point() and not k.startswith("normalize"))


def test_the_dense_form_and_back():
    model = pruned()
    dense = dense_form(model)
    x = torch.rand(2, 3, 16, 16)
    every = create_model(**{**model.spec, "scale": 1.0}).eval()
    adopt(every, dense)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), every(x))
        dense.backbone.classifier.bias.add_(1)
        assert not torch.equal(dense.backbone.classifier.bias, model.backbone.dense.classifier.bias)
    assert dense.spec == create_model(**{**model.spec, "kind": "dense"}).spec


def test_starting_from_another_model():
    model, sparse, dense = pruned(seed=1), pruned(), create_model("resnet18", kind="dense", width=7, **SMALL)
    adopt(model, sparse)
    assert all(torch.equal(value, sparse.state_dict()[key]) for key, value in model.state_dict().items())
    adopt(model, dense)
    state = model.backbone.dense.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in dense.backbone.state_dict().items())
    learnt = [score.clone() for score in scores_of(model)]
    model.backbone.reset_scores()
    assert all(map(torch.equal, learnt, scores_of(model))) and not torch.equal(learnt[0], scores_of(sparse)[0])
    rule = "training.init_from must hold a dense or sparse model when training.method is sparse, got one of kind 'moe'"
    with pytest.raises(ValueError, match=f"^{rule}$"):
        adopt(model, create_model("resnet18", width=7, **SMALL))


def test_other_kinds_have_nothing_to_compact():
    dense = create_model("resnet18", kind="dense", width=4, **SMALL)
    assert deployed(dense) is dense and deployed(dense.backbone) is dense.backbone
    assert deployed(pruned()).spec["kind"] == "s-dense"
    for function in (compact, dense_form):
        with pytest.raises(ValueError, match=r"^model.kind must be sparse, got 'dense'$"):
            function(dense)


def test_cost_is_of_what_runs():
    model = pruned(width=16)
    figures, narrow = cost(model, batch=2), create_model("resnet18", kind="s-dense", width=16, **SMALL)
    assert figures["gmacs"] == pytest.approx(gmacs(narrow), abs=1e-6)
    assert (figures["parameters"], figures["active_parameters"]) == parameters(narrow)

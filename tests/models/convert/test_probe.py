"""What a network computes on an example, and what that says of its images."""

import pytest
import torch
from own_networks import Reads, images, make
from torch import nn

from advmoe.models.convert import SAME, to_moe
from advmoe.models.convert.probe import image_spec, logits_of, place_of, require_same, spec_of


def test_a_network_lies_where_its_first_floating_point_parameter_does():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, dtype=torch.double), nn.Linear(2, 2))
    assert place_of(net) == (torch.device("cpu"), torch.double)
    assert place_of(nn.ReLU()) == (torch.device("cpu"), torch.float32)
    net = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False), *net.parameters()])
    assert place_of(net)[1] == torch.double


def test_what_is_known_of_images_with_and_without_an_example():
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 3, 1))
    assert image_spec(net) == {"num_classes": None, "input_size": None, "in_channels": 4}
    assert image_spec(nn.Linear(2, 3)) == {"num_classes": None, "input_size": None, "in_channels": None}
    logits = torch.zeros(2, 7)
    assert spec_of(torch.zeros(2, 4, 8, 8), logits) == {"num_classes": 7, "input_size": 8, "in_channels": 4}
    assert spec_of(torch.zeros(2, 4, 8, 9), logits)["input_size"] is None


def test_logits_are_those_of_eval_mode_and_leave_everything_as_it_was():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(12, 2, dtype=torch.float))
    x, before = torch.rand(2, 3, 2, 2), {name: value.clone() for name, value in net.state_dict().items()}
    drawn = torch.get_rng_state()
    logits = logits_of(net, x)
    assert torch.equal(logits, net.eval()(x)) and not logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.train()
    logits_of(net, x)
    assert net.training and net[0].training and torch.equal(torch.get_rng_state(), drawn)
    assert logits_of(net.double(), x).dtype == torch.double  # the example takes the network's precision


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (torch.rand(3, 2, 2), "torch.float32 of shape (3, 2, 2)"),
        (torch.rand(1, 3, 2, 2), "torch.float32 of shape (1, 3, 2, 2)"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "torch.uint8 of shape (2, 3, 2, 2)"),
        (None, "a NoneType"),
    ],
    ids=["axes", "one", "bytes", "none"],
)
def test_what_is_no_example_is_named(example, got):
    with pytest.raises(ValueError) as error:
        logits_of(nn.Flatten(), example)
    assert str(error.value) == f"example must be floating-point images (N, C, H, W) with N >= 2, got {got}"


def test_logits_may_differ_by_a_share_of_the_largest():
    net, x = nn.Flatten(), torch.tensor([[4.0, 0.0], [0.0, 1.0]]).view(2, 2, 1, 1)
    bound = 4 * SAME
    require_same(net, x, x.flatten(1) + 0.9 * bound)
    with pytest.raises(ValueError, match=r"^module must compute the same when its layers are replaced .* apart$"):
        require_same(net, x, x.flatten(1) + 1.1 * bound)
    small = x / 100  # of logits below 1, as of 1
    require_same(net, small, small.flatten(1) + 0.9 * SAME)
    broken = x.clone()
    broken[0, 0] = float("nan")  # what was NaN before may be it again, and nothing else
    require_same(net, broken, broken.flatten(1))
    with pytest.raises(ValueError, match="module must compute the same"):
        require_same(net, broken, x.flatten(1))


def test_a_method_that_no_moe_layer_has_is_an_error_that_names_the_layer():
    class Doubling(nn.Conv2d):
        def doubled(self, x):
            return 2 * self(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = Doubling(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.a.doubled(x).mean((2, 3)))

    with pytest.raises(ValueError, match=r"'doubled' \(asked of MoE layer 0 \(a\)\)"):
        to_moe(make(Net).eval(), example=images(3))


def test_small_roundings_are_no_mistake_and_real_differences_are():
    net = make(Reads)
    net.scale = 0.5 * SAME
    assert to_moe(net, example=images(3)).routed
    net.scale = 2 * SAME
    with pytest.raises(ValueError, match="module must compute the same"):
        to_moe(net, example=images(3))

"""What an epoch leaves for its reader: expert loads, entropy and mean losses, worked by hand."""

import math

import pytest
import torch

from advmoe.moe import Routing
from advmoe.training.monitor import EpochMeans, LayerUse


class Alone:
    """The only process of a run."""

    world_size = 1


def routed(scores, choices):
    """The record of a pass of one layer."""
    routing = Routing()
    routing.scores, routing.choices = {0: torch.tensor(scores)}, {0: torch.tensor(choices)}
    return routing


def test_loads_and_entropy_by_hand():
    use = LayerUse()
    use.add(routed([[0.0, 0.0, -100.0], [0.0, 0.0, -100.0]], [0, 1]))
    use.add(routed([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0]], [0, 0]))
    assert use.loads() == [[0.75, 0.25, 0.0]]
    (layer,) = use.report(Alone())
    assert (layer["layer"], layer["load"], layer["dead_experts"]) == (0, [0.75, 0.25, 0.0], [2])
    assert layer["entropy"] == pytest.approx(math.log(2) / 2)  # log 2 for two samples of four, 0 for the others


def test_layers_report_the_experts_that_they_have():
    use, routing = LayerUse(), Routing()
    routing.scores = {0: torch.tensor([[0.0, 0.0, 0.0]] * 4), 1: torch.zeros(4, 1), 2: torch.tensor([[0.0, 0.0]] * 4)}
    routing.choices = {0: torch.tensor([0, 1, 1, 1]), 1: torch.zeros(4, dtype=torch.long), 2: torch.tensor([1] * 4)}
    for _ in range(2):
        use.add(routing)
    assert use.loads() == [[0.25, 0.75, 0.0], [1.0], [0.0, 1.0]]
    report = use.report(Alone())
    assert [each["load"] for each in report] == use.loads()
    assert [each["dead_experts"] for each in report] == [[2], [], [0]]
    assert [each["entropy"] for each in report] == pytest.approx([math.log(3), 0, math.log(2)])


def test_a_model_without_moe_layers_leaves_nothing():
    use = LayerUse()
    use.add(Routing())
    assert use.loads() == [] and use.report(Alone()) == []


def test_means_are_weighted_by_samples_and_kept_by_level():
    means = EpochMeans()
    means.add("routers", {"ce": torch.tensor(1.0), "kl": torch.tensor(4.0)}, 30)
    means.add("routers", {"ce": torch.tensor(3.0), "kl": torch.tensor(0.0)}, 10)
    means.add("experts", {"ce": torch.tensor(7.0, dtype=torch.bfloat16)}, 5)
    assert means.report(Alone()) == {"routers": {"ce": 1.5, "kl": 3.0}, "experts": {"ce": 7.0}}

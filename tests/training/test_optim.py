"""Optimisers: what each part decays, at which rate it goes, and how long its gradients may be."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from advmoe.config import TrainingConfig
from advmoe.models import create_model
from advmoe.models.sparse import scores_of
from advmoe.training.methods import parts_of
from advmoe.training.optim import clip, compile_step, make_optimizers, restore_states, set_rates, states_of


@pytest.fixture
def model(shallow_backbones):
    torch.manual_seed(0)
    return create_model("resnet18", num_classes=3, width=8, input_size=8)


def names_of(model, parameters):
    known = {id(each) for each in parameters}
    return {name for name, each in model.named_parameters() if id(each) in known}


def test_the_paper_s_is_sgd_on_all_of_a_part(model):
    optimizers = make_optimizers(model, TrainingConfig())
    assert list(optimizers) == ["experts", "routers"]
    for part, optimizer in optimizers.items():
        plain = torch.optim.SGD(parts_of(model)[part], lr=0.1, momentum=0.9, weight_decay=5e-4)
        assert optimizer.state_dict() == plain.state_dict() and type(optimizer) is torch.optim.SGD
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parts_of(model)[part]]


def test_routers_have_their_own_where_it_is_given(model):
    training = TrainingConfig(router_lr=0.01, router_momentum=0.5, router_weight_decay=0.0)
    optimizers = make_optimizers(model, training)
    told = {p: [o.param_groups[0][n] for n in ("lr", "momentum", "weight_decay")] for p, o in optimizers.items()}
    assert told == {"experts": [0.1, 0.9, 5e-4], "routers": [0.01, 0.5, 0.0]}
    set_rates(optimizers, training, 0.5)
    assert [o.param_groups[0]["lr"] for o in optimizers.values()] == [0.05, 0.005]
    only = make_optimizers(model, TrainingConfig(router_lr=0.01))["routers"].param_groups[0]
    assert (only["lr"], only["momentum"], only["weight_decay"]) == (0.01, 0.9, 5e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("router", ["layer", "embedding"])
def test_weights_alone_decay(shallow_backbones, optimizer, router):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=8, input_size=8, router=router)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    training = TrainingConfig(decay="weights", optimizer=optimizer, lr=0.1, weight_decay=0.5)
    for each in make_optimizers(model, training).values():
        each.step()
    shrunk = {name for name, each in model.named_parameters() if not bool((each == 1).all())}
    assert all(torch.allclose(model.get_parameter(name), torch.tensor(0.95)) for name in shrunk)  # 1 - 0.1 * 0.5
    kept = {name for name, _ in model.named_parameters()} - shrunk
    last = "scores.weight" if router == "layer" else "heads.weight"
    assert {name for name in kept if model.get_parameter(name).dim() > 1} == {
        name for name, _ in model.named_parameters() if name.endswith(last)
    }
    assert {name for name, each in model.named_parameters() if each.dim() == 1} <= kept
    assert any("bank" in name for name in shrunk) and any("hidden" in n or "embedding" in n for n in shrunk)


def test_half_spaces_and_what_is_added_to_tokens_do_not_decay(shallow_backbones):
    routed = create_model("resnet18", num_classes=3, width=8, input_size=8, router="linear")
    transformer = create_model("deit-tiny", num_classes=3, width=8, input_size=8, kind="dense")
    for model, names in (
        (routed, {"router.weight"}),
        (transformer, {n for n, _ in transformer.named_parameters() if n.endswith(("class_token", "positions"))}),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 4, 4])), {"1.weight", "1.bias"}),
    ):
        plain = {
            id(each)
            for optimizer in make_optimizers(model, TrainingConfig(decay="weights")).values()
            for group in optimizer.param_groups
            if group["weight_decay"] == 0
            for each in group["params"]
        }
        assert names and {id(model.get_parameter(name)) for name in names} <= plain
        assert any(id(each) not in plain for each in model.parameters())


def test_no_group_is_empty(shallow_backbones):
    sparse = create_model("resnet18", num_classes=3, width=8, input_size=8, kind="sparse")
    optimizers = make_optimizers(sparse, TrainingConfig(decay="weights"))
    assert list(optimizers) == ["experts", "scores"] and len(optimizers["experts"].param_groups) == 2
    (scores,) = optimizers["scores"].param_groups  # numbers a channel
    assert scores["weight_decay"] == 0 and len(scores["params"]) == len(scores_of(sparse))


def test_adamw_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    model.weight.grad = torch.full((1, 1), 3.0)
    training = TrainingConfig(optimizer="adamw", lr=0.1, momentum=0.5, weight_decay=0.25)
    optimizer = make_optimizers(model, training)["experts"]
    optimizer.step()
    # Decay: 2 * (1 - 0.1 * 0.25) = 1.95. The first step is lr in the gradient's direction, whatever its length.
    assert model.weight.item() == pytest.approx(1.85, abs=1e-6)
    state = optimizer.state[model.weight]
    assert state["exp_avg"].item() == pytest.approx(1.5) and state["exp_avg_sq"].item() == pytest.approx(0.009)
    model.weight.grad = torch.full((1, 1), -3.0)
    set_rates({"experts": optimizer}, training, 0.0)
    optimizer.step()
    assert model.weight.item() == pytest.approx(1.85, abs=1e-6)


def test_clipping_by_hand():
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])  # 5 together; c does not learn
    clip([a, b, c], 0)
    clip([a, b, c], 5.1)
    assert (a.grad.item(), b.grad.item(), c.grad) == (3, 4, None)
    clip([a, b, c], 1)
    assert (a.grad.item(), b.grad.item()) == (pytest.approx(0.6, abs=1e-5), pytest.approx(0.8, abs=1e-5))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_compiled_step_is_the_same_step_and_a_rate_makes_no_new_graph(kind):
    training = TrainingConfig(optimizer=kind, decay="weights", lr=0.01, router_lr=0.002)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = create_model("wrn-10-1", num_classes=3, width=4)
        optimizers = make_optimizers(network, training)
        steps = [compile_step(each, backend=counter) if compiled else each.step for each in optimizers.values()]
        for iteration in range(6):
            torch.manual_seed(iteration)
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_rates(optimizers, training, 1 / (iteration + 1))
            for step in steps:
                step()
            if iteration == 2:
                graphs = counter.frame_count
        assert [float(each.param_groups[0]["lr"]) for each in optimizers.values()] == pytest.approx(
            [0.01 / 6, 0.002 / 6]
        )
        ends.append((network.state_dict(), states_of(optimizers)))
    assert counter.frame_count == graphs >= 2
    (plain, states), (made, theirs) = ends
    assert all(torch.allclose(plain[name], made[name], rtol=1e-4, atol=1e-5) for name in plain)
    # A checkpoint holds numbers whichever it was, and either goes on from it.
    assert [type(group["lr"]) for state in theirs for group in state["param_groups"]] == [float] * 4
    restore_states(optimizers, states)
    assert all(isinstance(group["lr"], torch.Tensor) for each in optimizers.values() for group in each.param_groups)
    assert [group["lr"] for group in states_of(optimizers)[0]["param_groups"]] == pytest.approx([0.01 / 6] * 2)

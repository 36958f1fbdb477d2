"""Tokens routed one by one: what the record of a pass holds, and what reads it (logs, losses, checks, attacks)."""

import math

import pytest
import torch
from lightning_fabric import Fabric

from advmoe.attacks.routed import Combination, Pass, RoutedPlan, _candidates, hard_choice, router_margins
from advmoe.evaluation.checks import check
from advmoe.evaluation.dissection import Dissection
from advmoe.moe import Routing
from advmoe.moe.routing import forward_scope
from advmoe.training.monitor import LayerUse
from advmoe.training.objectives import code_loss

# Scores (N, T, E) of two images with three tokens in one layer.
SCORES = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [[0.0, 0.5], [0.0, 4.0], [1.0, 0.0]]])
CHOICES = [[0, 1, 0], [1, 1, 0]]


def test_the_record_has_an_axis_of_tokens():
    routing = Routing()
    assert routing.choose(0, SCORES).tolist() == CHOICES
    routing.choose(1, -SCORES)
    assert routing.pathway().shape == (2, 2, 3)
    assert routing.pathway()[:, 0].tolist() == CHOICES
    assert torch.equal(routing.pathway()[:, 1], 1 - routing.pathway()[:, 0])


def test_a_forced_choice_is_per_token_or_for_all_of_an_image():
    each = torch.tensor([[[1, 1, 0]], [[0, 1, 1]]])
    assert torch.equal(Routing(forced=each).choose(0, SCORES), each[:, 0])
    assert Routing(forced=torch.tensor([[1], [0]])).choose(0, SCORES).tolist() == [[1, 1, 1], [0, 0, 0]]
    for forced in (torch.zeros(3, 1), torch.zeros(2, 1, 4), torch.zeros(2), torch.zeros(2, 1, 3, 1)):
        with pytest.raises(ValueError, match=r"forced must be \(N, L\) or \(N, L, T\) with N = 2, T = 3, got shape"):
            Routing(forced=forced).choose(0, SCORES)
    with pytest.raises(ValueError, match=r"forced must be \(N, L\) with N = 2, got shape \(2, 1, 3\)"):
        Routing(forced=each).choose(0, SCORES[:, 0])


def test_loads_and_entropy_are_means_over_tokens():
    routing, use = Routing(), LayerUse()
    routing.choose(0, SCORES)
    routing.choose(1, torch.tensor([0.0, -100.0]).expand(2, 3, 2))
    use.add(routing)
    assert use.loads() == [[0.5, 0.5], [1.0, 0.0]]
    first, second = use.report(Fabric(accelerator="cpu", devices=1))
    p = SCORES.double().softmax(2)
    assert first["entropy"] == pytest.approx(-(p * p.log()).sum().item() / 6, rel=1e-5)
    assert second["dead_experts"] == [1] and second["entropy"] == pytest.approx(0, abs=1e-6)


def test_every_token_of_an_image_has_its_codeword():
    routing = Routing()
    routing.choose(0, SCORES)
    table = torch.tensor([[0], [1]])
    # -log softmax by hand: a margin m of the codeword's score costs log(1 + exp(-m)).
    margins = [2, -1, 3, 0.5, 4, -1]
    expected = 6 * sum(math.log1p(math.exp(-m)) for m in margins) / 6
    assert code_loss(routing, torch.tensor([0, 1]), table, alpha=6.0).item() == pytest.approx(expected, rel=1e-6)


def test_router_margins_are_per_token():
    scores = (SCORES, -SCORES)
    pathway = hard_choice(scores)
    assert pathway.shape == (2, 2, 3)
    expected = torch.tensor([[2.0, 1.0, 3.0], [0.5, 4.0, 1.0]])
    torch.testing.assert_close(router_margins(scores, pathway), torch.stack([expected, expected], 1))
    torch.testing.assert_close(router_margins(scores, 1 - pathway), -torch.stack([expected, expected], 1))


def test_candidates_are_pathways_of_all_tokens():
    clean = Pass(torch.zeros(2, 5), (SCORES, -SCORES), hard_choice((SCORES, -SCORES)))
    reached = clean.pathway[0].tolist()
    plan = RoutedPlan(Combination(), (), 0, 1, (tuple(reached),))
    first, *changed = _candidates(clean, RoutedPlan.from_json(plan.to_json()))
    assert first.tolist() == [reached, reached]
    assert len(changed) == 2  # one layer's choices at a time, the other expert of two
    for layer, candidate in enumerate(changed):
        assert torch.equal(candidate[:, layer], 1 - clean.pathway[:, layer])
        assert torch.equal(candidate[:, 1 - layer], clean.pathway[:, 1 - layer])


def test_a_layer_is_dissected_as_flipped_where_any_token_is():
    clean = torch.zeros(3, 2, 4, dtype=torch.long)
    adv = clean.clone()
    adv[1, 1, 2] = 1
    adv[2, :, :] = 1
    right = torch.tensor([True, True, True])
    found = Dissection(clean, adv, right, torch.tensor([True, True, False]), 2)
    assert found.flipped.tolist() == [[False, False], [False, True], [True, True]]
    assert found.categories.tolist() == [1, 2, 4]
    record = found.to_dict()
    assert record["num_layers"] == 2 and record["flip_rate"] == [1 / 3, 2 / 3]
    assert record["load"]["adversarial"] == [[8 / 12, 4 / 12], [7 / 12, 5 / 12]]
    assert record["distinct_pathways"] == {"clean": 1, "adversarial": 3}
    assert "2 MoE layers of 2 experts" in found.table()
    assert Dissection.merge([found, found]).clean_pathway.shape == (6, 2, 4)


def test_a_token_s_dependence_on_the_batch_is_found():
    # One token's expert follows the image's position in the batch; its scores lie 0.75 apart.
    weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))

    def predict(x):
        with forward_scope() as routing:
            scores = torch.zeros(len(x), 3, 2)
            scores[0, 1, 0], scores[1:, 1, 1] = 0.75, 0.75
            routing.choose(0, scores)
            return x.flatten(1) @ weights

    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    found = {each.name: each for each in check(predict, x, torch.tensor([0, 1, 2, 0]))}
    assert found["deterministic"].passed and not found["batch-independent"].passed
    detail = found["batch-independent"].detail
    assert detail.endswith("; images that take another pathway: 4 (router scores up to 0.75 apart)")

"""What an attacker sees of a routed model: choices and margins, by hand."""

import torch

from advmoe.attacks.routed import hard_choice, router_margins


def test_the_choice_is_the_first_of_the_best_scores():
    scores = (torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[5.0, 1.0, 5.0], [1.0, 4.0, 0.0]]))
    assert hard_choice(scores).tolist() == [[0, 0], [1, 1]]


def test_tokens_have_choices_and_margins_of_their_own():
    # One image of three tokens, two layers of two experts: scores (N, T, E), choices and margins (N, L, T).
    scores = (
        torch.tensor([[[3.0, 1.0], [0.0, 2.0], [1.0, 1.5]]]),
        torch.tensor([[[0.0, 4.0], [1.0, 0.0], [0.0, 0.5]]]),
    )
    chosen = hard_choice(scores)
    assert chosen.tolist() == [[[0, 1, 1], [1, 0, 1]]]
    assert router_margins(scores, chosen).tolist() == [[[2, 2, 0.5], [4, 1, 0.5]]]
    assert router_margins(scores, 1 - chosen).tolist() == [[[-2, -2, -0.5], [-4, -1, -0.5]]]


def test_router_margins_by_hand():
    scores = (torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([[5.0, 1.0], [1.0, 4.0]]))
    margins = router_margins(scores, torch.tensor([[0, 1], [1, 0]]))
    assert margins.tolist() == [[3 - 1, 1 - 5], [2 - 0, 1 - 4]]
    three = (torch.tensor([[1.0, 4.0, 6.0]]),)
    assert [router_margins(three, torch.tensor([[e]])).item() for e in range(3)] == [1 - 6, 4 - 6, 6 - 4]


def test_a_lone_expert_has_no_margin():
    beside_three = (torch.tensor([[1.0, 4.0, 6.0]]), torch.ones(1, 1))
    assert router_margins(beside_three, torch.tensor([[1, 0]])).tolist() == [[4 - 6, 0]]
    assert router_margins((torch.ones(2, 1),) * 3, torch.zeros(2, 3, dtype=torch.long)).tolist() == [[0] * 3] * 2

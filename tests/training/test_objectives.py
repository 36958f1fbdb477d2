"""Losses and codewords, worked by hand."""

import math

import pytest
import torch
from torch import nn

from advmoe.moe import Routing
from advmoe.moe.halfspace import linear_router
from advmoe.threat import ThreatModel
from advmoe.training.objectives import (
    balance_loss,
    choice_margin_loss,
    code_loss,
    codewords,
    cross_entropy,
    kl_divergence,
    radius_loss,
    trades,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def as_images(logits):
    """Images that `nn.Flatten` turns into the given logits."""
    return torch.tensor(logits).view(len(logits), 1, 1, -1).requires_grad_()


# Two samples, two classes. Clean p: (3/4, 1/4), (1/2, 1/2); adversarial q: (1/2, 1/2), (1/5, 4/5); true class 0, 1.
CLEAN, ADVERSARIAL, LABELS = [[LN3, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, LN4]], torch.tensor([0, 1])
P, Q = torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]]), torch.tensor([[1 / 2, 1 / 2], [1 / 5, 4 / 5]])
KL = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(5 / 2) + 0.5 * math.log(5 / 8)]


def test_trades_by_hand():
    terms, clean, adversarial, logits = trades(nn.Flatten(), as_images(CLEAN), as_images(ADVERSARIAL), LABELS, beta=6.0)
    assert list(terms) == ["ce", "kl"]
    assert terms["ce"].item() == pytest.approx((math.log(4 / 3) + LN2) / 2, rel=1e-6)
    assert terms["kl"].item() == pytest.approx(6 * sum(KL) / 2, rel=1e-6)
    assert logits.tolist() == torch.tensor(CLEAN).tolist()
    assert clean is not adversarial and not clean.choices


def test_trades_gradient_reaches_both_arguments():
    x, x_adv = as_images(CLEAN), as_images(ADVERSARIAL)
    terms, *_ = trades(nn.Flatten(), x, x_adv, LABELS, beta=6.0)
    terms["kl"].backward(retain_graph=True)
    # By the adversarial logits: q - p. By the clean ones: p (log(p / q) - KL). Mean over 2 samples, times 6.
    torch.testing.assert_close(x_adv.grad.view(2, 2), 6 / 2 * (Q - P))
    by_clean = 6 / 2 * P * ((P / Q).log() - torch.tensor(KL)[:, None])
    torch.testing.assert_close(x.grad.view(2, 2), by_clean)
    terms["ce"].backward()
    # CE adds p - 1[true] to the clean side alone.
    torch.testing.assert_close(x.grad.view(2, 2), by_clean + 1 / 2 * (P - torch.eye(2)))
    torch.testing.assert_close(x_adv.grad.view(2, 2), 6 / 2 * (Q - P))


def test_kl_is_finite_at_any_confidence():
    clean, adversarial = (torch.tensor([v], requires_grad=True) for v in ([200.0, -200.0], [-200.0, 200.0]))
    kl = kl_divergence(clean, adversarial)
    kl.backward()
    assert kl.item() == pytest.approx(400)
    assert clean.grad.isfinite().all() and adversarial.grad.tolist() == [[-1.0, 1.0]]
    assert kl_divergence(clean, clean).item() == 0
    assert kl_divergence(clean.bfloat16(), adversarial.bfloat16()).dtype == torch.float32


def test_cross_entropy_records_the_routing(make_routed, make_images):
    model, x, y = make_routed(), make_images(), torch.arange(12) % 5
    terms, routing, logits = cross_entropy(model, x, y)
    assert list(terms) == ["ce"] and routing.pathway().shape == (12, 16)
    expected = -logits.log_softmax(1)[torch.arange(12), y].mean()
    torch.testing.assert_close(terms["ce"], expected)


def test_trades_records_both_routings(make_routed, make_images):
    model, x, x_adv = make_routed(), make_images(), make_images(seed=8)
    _, clean, adversarial, _ = trades(model, x, x_adv, torch.zeros(12, dtype=torch.long), beta=1.0)
    for routing, images in ((clean, x), (adversarial, x_adv)):
        _, expected, _ = cross_entropy(model, images, torch.zeros(12, dtype=torch.long))
        assert torch.equal(routing.pathway(), expected.pathway())
    assert not torch.equal(clean.pathway(), adversarial.pathway())


def test_mod_codewords():
    table = codewords("mod", 5, [2, 2, 2], seed=0)
    assert table.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert torch.equal(table, codewords("mod", 5, [2, 2, 2], seed=9))


@pytest.mark.parametrize(("classes", "experts", "counts"), [(10, 2, [5, 5]), (10, 3, [4, 3, 3]), (100, 4, [25] * 4)])
def test_random_codewords_are_balanced_columns(classes, experts, counts):
    table = codewords("random", classes, [experts] * 16, seed=0)
    assert table.shape == (classes, 16)
    for column in table.T:
        assert column.bincount(minlength=experts).tolist() == counts
    assert len(table.unique(dim=1).T) > 8  # the columns differ
    assert len(table.unique(dim=0)) == classes  # and so do the classes
    assert torch.equal(table, codewords("random", classes, [experts] * 16, seed=0))
    assert not torch.equal(table, codewords("random", classes, [experts] * 16, seed=1))


def test_code_loss_by_hand():
    # Classes 2 and 0; codewords (1, 0) and (0, 1); probabilities of the wanted experts: layer 0 3/4 and 1/2, layer 1
    # 1/2 and 1/4. Mean of log(4/3), log 2, log 2, log 4 is (4 log 2 + log 4/3) / 4.
    table = torch.tensor([[0, 1], [0, 0], [1, 0]])
    scores = {0: torch.tensor([[0.0, LN3], [0.0, 0.0]]), 1: torch.tensor([[0.0, 0.0], [LN3, 0.0]])}
    loss = code_loss(Routing(scores=scores), torch.tensor([2, 0]), table, alpha=6.0)
    assert loss.item() == pytest.approx(6 * (4 * LN2 + math.log(4 / 3)) / 4, rel=1e-6)


def test_code_loss_reaches_the_routers_alone(make_routed, make_images):
    model, y = make_routed(router="embedding"), torch.arange(12) % 5
    table = codewords("random", 5, [2] * 16, seed=0)
    _, routing, _ = cross_entropy(model, make_images(), y)
    code_loss(routing, y, table, alpha=6.0).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in model.named_parameters() if "router" in name}


def routed(*layers):
    """The routing of one pass, from each layer's scores."""
    scores = {layer: torch.tensor(each, requires_grad=True) for layer, each in enumerate(layers)}
    return Routing(scores=scores, choices={layer: each.argmax(-1) for layer, each in scores.items()})


def test_balance_by_hand():
    # Layer 0: gates (3/4, 1/4), (1/2, 1/2) (a tie, which expert 0 has), (1/4, 3/4), (3/4, 1/4): f = (3/4, 1/4),
    # P = (9/16, 7/16), so 2 (27 + 7) / 64 = 17/16. Layer 1: all to expert 1 with gate 3/4, so 2 * 3/4 = 3/2.
    first = [[LN3, 0.0], [0.0, 0.0], [0.0, LN3], [LN3, 0.0]]
    skewed = routed(first, [[0.0, LN3]] * 4)
    assert balance_loss([skewed], 1.0).item() == pytest.approx((17 / 16 + 3 / 2) / 2, rel=1e-6)
    even = routed([[LN3, 0.0], [0.0, LN3]] * 2, [[LN3, 0.0], [0.0, LN3]] * 2)
    assert balance_loss([even], 0.5).item() == pytest.approx(0.5, rel=1e-6)
    assert balance_loss([skewed, even], 4.0).item() == pytest.approx(2 * (41 / 32 + 1), rel=1e-6)
    # Everything to one of three experts: three times the weight.
    assert balance_loss([routed([[50.0, 0.0, 0.0]] * 5)], 1.0).item() == pytest.approx(3, rel=1e-6)


def test_balance_moves_gates_away_from_the_busy_expert():
    skewed = routed([[0.1, 0.0]] * 3 + [[0.0, 0.1]])
    balance_loss([skewed], 1.0).backward()
    gradient = skewed.scores[0].grad
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1] < 0).all()  # descent lowers expert 0's scores


def test_choice_margin_by_hand():
    # Leads 2, 1/4 and 0, and in the second layer 1/2, 1 and 3: hinges 0, 3/4, 1, 1/2, 0, 0.
    routing = routed([[2.0, 0.0], [0.0, 0.25], [1.0, 1.0]], [[0.5, 0.0], [1.0, 0.0], [0.0, 3.0]])
    assert choice_margin_loss(routing, 2.0).item() == pytest.approx(2 * (0.75 + 1 + 0.5) / 6, rel=1e-6)
    choice_margin_loss(routing, 1.0).backward()
    clear, unclear = routing.scores[0].grad[0], routing.scores[0].grad[1]
    assert clear.tolist() == [0, 0] and unclear.tolist() == pytest.approx([1 / 6, -1 / 6])
    # Of three experts only the runner-up counts.
    assert choice_margin_loss(routed([[0.0, 0.5, 0.75]]), 1.0).item() == pytest.approx(0.75)


def test_layers_of_different_numbers_of_experts():
    # All to one of three, of two and of one: 3, 2 and 1 times the weight. Leads 1/4, 1/2, and none to lose.
    assert balance_loss([routed([[50.0, 0.0, 0.0]], [[50.0, 0.0]], [[7.0]])], 1.0).item() == pytest.approx(2)
    mixed = routed([[0.0, 0.5, 0.75]], [[0.5, 0.0]], [[7.0]])
    assert choice_margin_loss(mixed, 1.0).item() == pytest.approx((0.75 + 0.5) / 3)
    choice_margin_loss(mixed, 3.0).backward()
    assert [scores.grad.tolist() for scores in mixed.scores.values()] == [[[0, 1, -1]], [[-1, 1]], [[0]]]
    assert choice_margin_loss(routed([[7.0]]), 1.0).item() == 0
    assert codewords("mod", 4, [3, 1, 2], seed=0).tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 0], [0, 0, 1]]
    columns = codewords("random", 12, [3, 1, 2], seed=0).T
    assert [column.bincount().tolist() for column in columns] == [[4, 4, 4], [12], [6, 6]]


def test_radius_by_hand():
    # Means 0.5, 0.55, 0.6 and 0.8 against 0.5: radii 0, 0.05, 0.1 and 0.3, of hinges 1, 1/2, 0 and 0 at eps 0.1.
    router = linear_router(1, 8, 1, 2, bits=1).eval()
    with torch.no_grad():
        router.weight.fill_(1 / 16)
        router.thresholds.fill_(0.5)
    x = torch.tensor([0.5, 0.55, 0.6, 0.8]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert radius_loss(router, x, ThreatModel("linf", 0.1), 2.0).item() == pytest.approx(2 * 1.5 / 4, rel=1e-5)
    # In train mode against their own mean, 0.6125: radii 0.1125, 0.0625, 0.0125 and 0.1875.
    assert radius_loss(router.train(), x, ThreatModel("linf", 0.1), 2.0).item() == pytest.approx(2 * 1.25 / 4, rel=1e-5)
    assert router.thresholds.item() == 0.5  # the passes of training record, this term does not


def test_tokens_are_samples_of_the_router_terms():
    flat = [[LN3, 0.0], [0.0, 0.0], [0.0, LN3], [LN3, 0.0], [0.0, 2.0], [0.25, 0.0]]
    tokens = torch.tensor(flat).view(2, 3, 2).tolist()
    for loss in (lambda r: balance_loss([r], 1.0), lambda r: choice_margin_loss(r, 1.0)):
        assert loss(routed(tokens)).item() == loss(routed(flat)).item() > 0

"""Dissections of planted pathways, worked by hand, and of a small routed model."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advmoe.evaluation.dissection import CATEGORIES, Dissection, dissect
from advmoe.models import create_model
from advmoe.moe.routing import active_routing, pathway

#          clean path, adversarial path, right clean, right adversarial, class, category
PLANTED = [
    ([0, 0, 1], [0, 0, 1], True, True, 0, 1),
    ([0, 1, 1], [0, 1, 1], True, False, 0, 3),
    ([0, 0, 1], [1, 0, 1], True, True, 1, 2),
    ([0, 0, 1], [1, 1, 1], True, False, 1, 4),
    ([0, 1, 1], [0, 1, 1], False, False, 1, 3),  # wrong before the attack
    ([0, 0, 0], [0, 0, 1], False, True, 1, 4),  # wrong before: the attack's right answer does not count
    ([1, 0, 1], [1, 0, 1], True, True, 0, 1),
    ([1, 0, 1], [1, 0, 1], False, True, 0, 3),
]


def planted(rows=slice(None), labels=True):
    clean, adv, right, adv_right, classes, _ = zip(*PLANTED[rows], strict=True)
    classes = torch.tensor(classes) if labels else None
    return Dissection(*map(torch.tensor, (clean, adv, right, adv_right)), 2, classes)


def named(*shares):
    return dict(zip(CATEGORIES, map(pytest.approx, shares), strict=True))


def test_planted_categories():
    assert planted().categories.tolist() == [row[-1] for row in PLANTED]


def test_planted_numbers():
    assert planted().to_dict() == {
        "num_examples": 8,
        "num_clean_correct": 5,
        "num_layers": 3,
        "num_experts": 2,
        "clean_accuracy": 5 / 8,
        "robust_accuracy": 3 / 8,
        "router_robustness": 5 / 8,
        "categories": named(2 / 8, 1 / 8, 3 / 8, 2 / 8),
        "categories_of_clean_correct": named(2 / 5, 1 / 5, 1 / 5, 1 / 5),
        "flip_rate": [2 / 8, 1 / 8, 1 / 8],
        "flipped_layers": [5 / 8, 2 / 8, 1 / 8, 0],
        "load": {
            "clean": [[6 / 8, 2 / 8], [6 / 8, 2 / 8], [1 / 8, 7 / 8]],
            "adversarial": [[4 / 8, 4 / 8], [5 / 8, 3 / 8], [0, 1]],
        },
        "distinct_pathways": {"clean": 4, "adversarial": 4},
        "per_class": [
            {"class": 0, "num_examples": 4, "categories": named(2 / 4, 0, 2 / 4, 0)},
            {"class": 1, "num_examples": 4, "categories": named(0, 1 / 4, 1 / 4, 2 / 4)},
        ],
    }
    assert json.loads(json.dumps(planted().to_dict())) == planted().to_dict()


def test_the_table_says_the_same():
    lines = [line.split() for line in planted().table().splitlines()]
    for line in (
        "8 images, 5 of them right clean; 3 MoE layers of 2 experts",
        "1 both survive             25.0 %          40.0 %",
        "1 + 2 model robust         37.5 %          60.0 %",
        "1 + 3 routers robust       62.5 %          60.0 %",
        "    0    25.0 %   75.0  25.0      50.0  50.0",
        "distinct pathways         clean 4, adversarial 4",
    ):
        assert line.split() in lines


def test_batches_merge():
    parts = [planted(slice(0, 3)), planted(slice(3, 4)), planted(slice(4, 8))]
    assert Dissection.merge(parts).to_dict() == planted().to_dict()
    with pytest.raises(ValueError, match="same layers, experts and labels, got 2 kinds"):
        Dissection.merge([planted(), planted(labels=False)])
    with pytest.raises(ValueError, match="got 0 kinds"):
        Dissection.merge([])


def test_nothing_right_clean():
    dissection = Dissection(*[torch.zeros(2, 1).long()] * 2, *[torch.zeros(2).bool()] * 2, 2)
    assert dissection.to_dict()["categories_of_clean_correct"] is None
    assert dissection.to_dict()["per_class"] == []
    assert ["4", "both", "fail", "0.0", "%", "-"] in [line.split() for line in dissection.table().splitlines()]


@st.composite
def dissections(draw):
    n, layers, experts = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    paths = (torch.randint(0, experts, (n, layers), generator=generator) for _ in range(2))
    right = (torch.rand(n, generator=generator) < 0.6 for _ in range(2))
    return Dissection(*paths, *right, experts, torch.randint(0, 3, (n,), generator=generator))


@settings(deadline=None, max_examples=60)
@given(dissections())
def test_the_shares_add_up(dissection):
    values = dissection.to_dict()
    for shares in (values["categories"], *(each["categories"] for each in values["per_class"])):
        assert sum(shares.values()) == pytest.approx(1)
    one, two, three, _ = values["categories"].values()
    survived = dissection.clean_correct & dissection.adv_correct
    assert one + two == pytest.approx(values["robust_accuracy"]) == pytest.approx(survived.double().mean().item())
    assert one + three == pytest.approx(values["router_robustness"]) == pytest.approx(values["flipped_layers"][0])
    assert sum(i * share for i, share in enumerate(values["flipped_layers"])) == pytest.approx(sum(values["flip_rate"]))
    assert sum(each["num_examples"] for each in values["per_class"]) == values["num_examples"]
    for load in values["load"].values():
        assert [sum(layer) for layer in load] == [pytest.approx(1)] * values["num_layers"]
    right = values["categories_of_clean_correct"]
    if right is not None:
        survivors = values["num_clean_correct"] * (right["both_survive"] + right["only_routing_fails"])
        assert survivors == pytest.approx(values["num_examples"] * values["robust_accuracy"])


@pytest.mark.parametrize("router", ["layer", "embedding"])
def test_a_routed_model(make_routed, make_images, router):
    model = make_routed(router=router)
    x, x_adv = make_images(10, seed=5), make_images(10, seed=6)
    with torch.no_grad():
        y, adversarial = model(x).argmax(1), model(x_adv).argmax(1)
    y[0] = (y[0] + 1) % 5
    dissection = dissect(model, x, x_adv, y, batch_size=4)
    assert dissection.num_experts == 2
    assert torch.equal(dissection.clean_pathway, pathway(model, x))
    assert torch.equal(dissection.adv_pathway, pathway(model, x_adv))
    assert dissection.clean_correct.tolist() == [False] + [True] * 9
    assert torch.equal(dissection.adv_correct, adversarial == y)
    assert torch.equal(dissection.labels, y)
    assert dissection.to_dict() == dissect(model, x, x_adv, y).to_dict()


def test_no_attack_breaks_nothing_and_the_model_is_left_as_it_was(make_routed, make_images):
    model, x = make_routed(), make_images(6)
    with torch.no_grad():
        y = model(x).argmax(1)
    model.train().backbone.stem.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert dissect(model, x, x, y).categories.tolist() == [1] * 6
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_answer_of_nan_is_wrong():
    class Nan(nn.Module):
        def forward(self, x):
            scores = torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
            active_routing().choose(0, scores)
            return torch.full((len(x), 2), torch.nan)

    x = torch.zeros(2, 1, 2, 2)
    assert dissect(Nan(), x, x, torch.zeros(2).long()).categories.tolist() == [3, 3]


def test_what_cannot_be_dissected(make_routed, make_images):
    x, y = make_images(4), torch.zeros(4).long()
    plain = create_model("resnet18", num_classes=5, width=8, input_size=16, kind="dense")
    with pytest.raises(ValueError, match=r"model must have MoE layers to be dissected, got \w+ with none"):
        dissect(plain, x, x, y)
    with pytest.raises(ValueError, match=r"x, x_adv and y must be .*\(3, 3, 16, 16\)"):
        dissect(make_routed(), x, x[:3], y)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got 5 for image 0"):
        dissect(make_routed(), x, x, y + 5)
    with pytest.raises(ValueError, match="with N >= 1"):
        dissect(make_routed(), x[:0], x[:0], y[:0])
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        dissect(make_routed(), x, x, y, batch_size=0)


def test_what_is_no_dissection():
    path, right = torch.zeros(3, 2).long(), torch.zeros(3).bool()
    with pytest.raises(ValueError, match=r"clean_pathway and adv_pathway must both be \(N, L\)"):
        Dissection(path, path[:2], right, right, 2)
    with pytest.raises(ValueError, match="L >= 1"):
        Dissection(path[:, :0], path[:, :0], right, right, 2)
    with pytest.raises(ValueError, match=r"adv_correct must be \(N,\) with N = 3, got shape \(2,\)"):
        Dissection(path, path, right, right[:2], 2)
    with pytest.raises(ValueError, match=r"experts must lie in 0 ... 1, got 0 ... 2"):
        Dissection(path, path + 2, right, right, 2)

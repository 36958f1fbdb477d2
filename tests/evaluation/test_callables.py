"""Attacks and data of the user's own in `evaluate`: functions, and whatever yields batches."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from advmoe import evaluate, load_dataset, pgd
from advmoe.attacks.pgd import LOSSES
from advmoe.errors import InputError
from advmoe.evaluation.suite import ATTACKS
from advmoe.threat import ThreatModel


def redder(x: Tensor) -> Tensor:
    """Class 1 where the mean is above a half."""
    mean = x.mean((1, 2, 3))
    return torch.stack([0.5 - mean, mean - 0.5], 1)


X = torch.tensor([0.2, 0.45, 0.55, 0.9])[:, None, None, None].expand(4, 3, 2, 2).contiguous()
Y = torch.tensor([0, 0, 1, 1])
THREAT = ThreatModel("linf", 0.1)


def towards_the_middle(predict, x, y, *, threat, seed):
    """What breaks both images near the middle, and would leave the ball."""
    return x + torch.where(y == 1, -0.3, 0.3)[:, None, None, None]


def test_a_function_counts_in_the_worst_case() -> None:
    told = evaluate(redder, (X, Y), attacks=[towards_the_middle, "pgd-1"], threat=THREAT, step_size=1e-6, seed=3)
    assert told["robust_accuracy"]["towards_the_middle"] == 0.5  # projected: 0.2 and 0.9 stay on their sides
    assert told["robust_accuracy"]["pgd-1"] >= 0.5 and told["worst_case"] == 0.5
    assert "towards_the_middle" not in ATTACKS


def test_a_function_that_fails_leaves_no_name_behind() -> None:
    def short(predict, x, y, *, threat, seed):
        return x[:1]

    with pytest.raises(InputError, match=r"the attack short must return images \(4, 3, 2, 2\)"):
        evaluate(redder, (X, Y), attacks=[short], threat=THREAT)
    assert "short" not in ATTACKS
    with pytest.raises(InputError, match="functions that have one"):
        evaluate(redder, (X, Y), attacks=[lambda *a, **k: X], threat=THREAT)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_loader_is_what_it_loads(batch: int) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=batch)
    expected = evaluate(redder, (X, Y), attacks=["pgd-2"], threat=THREAT)
    told = evaluate(redder, loader, attacks=["pgd-2"], threat=THREAT)
    assert {key: told[key] for key in ("clean_accuracy", "robust_accuracy")} == {
        key: expected[key] for key in ("clean_accuracy", "robust_accuracy")
    }


@pytest.mark.parametrize("batches", [[], [(X, Y), (torch.rand(2, 3, 4, 4), Y[:2])]])
def test_batches_of_no_one_shape_are_refused(batches: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(InputError, match="data must be batches of images of one shape"):
        evaluate(redder, batches, attacks=["pgd-1"], threat=THREAT)


def test_pgd_ascends_a_function_of_the_users() -> None:
    def logit(logits: Tensor, labels: Tensor) -> Tensor:
        return -logits.gather(1, labels[:, None])[:, 0]

    with torch.no_grad():
        start = torch.Generator().manual_seed(0)
    ours = pgd(redder, X, Y, threat=THREAT, steps=5, step_size=0.05, loss=logit, generator=start)
    assert (redder(ours).argmax(1) == Y).tolist() == [True, False, False, True]
    named = pgd(redder, X, Y, threat=THREAT, steps=5, step_size=0.05, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours, named)  # two losses that lead the same way, from one start
    assert set(LOSSES) == {"ce", "margin", "dlr", "kl", "pma"}


def test_loaded_sets_are_torch_datasets() -> None:
    train = load_dataset("digits").train
    x, y = train[3]
    assert torch.equal(x, train.pixels(slice(3, 4))[0]) and y == int(train.labels[3])
    assert torch.equal(train[-1][0], train[len(train) - 1][0])
    with pytest.raises(IndexError):
        train[len(train)]
    pixels, labels = next(iter(DataLoader(train, batch_size=5)))
    assert torch.equal(pixels, train.pixels(slice(0, 5))) and torch.equal(labels, train.labels[:5])

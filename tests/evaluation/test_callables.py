"""Attacks and data of the user's own in `evaluate`: functions, and whatever yields batches."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from advmoe import evaluate, load_dataset, pgd
from advmoe.attacks.pgd import LOSSES
from advmoe.errors import InputError
from advmoe.evaluation.harness import BatchTask
from advmoe.evaluation.shards import Shard
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

    def nowhere(predict, x, y, *, threat, seed):
        return x * math.nan

    with pytest.raises(InputError, match="the attack nowhere must return finite pixels, got NaN or infinity"):
        evaluate(redder, (X, Y), attacks=[nowhere], threat=THREAT)
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


def _linear():
    torch.manual_seed(0)
    x = torch.rand(12, 3, 8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return model, x, y


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_classes_of_any_integer_type_and_numpy_s_are_the_same(dtype):
    model, x, y = _linear()
    options = {"attacks": ["pgd-2", "pgd-2-margin"], "threat": ThreatModel("linf", 0.02)}
    expected = evaluate(model, (x, y), **options)["robust_accuracy"]
    assert evaluate(model, (x, y.to(dtype)), **options)["robust_accuracy"] == expected
    assert evaluate(model, (x.numpy(), y.to(dtype).numpy()), **options)["robust_accuracy"] == expected


@pytest.mark.parametrize("wrong", ["list", "dataset"])
def test_what_holds_no_batches_is_refused(wrong):
    model, x, y = _linear()
    data = [x, y] if wrong == "list" else torch.utils.data.TensorDataset(x, y)
    with pytest.raises(ValueError, match=r"^data must be \(pixels \(N, C, H, W\), classes \(N,\)\) or batches of such"):
        evaluate(model, data, attacks=["pgd-1"])


def test_a_double_model_is_attacked_by_every_part_of_autoattack():
    layer = _linear()[0][1].double()
    _, x, y = _linear()
    found = evaluate(lambda z: layer(z.flatten(1).double()), (x, y), attacks=["autoattack:fab"])
    assert 0 <= found["worst_case"] <= found["clean_accuracy"]


def test_names_that_results_use_otherwise_are_refused():
    def clean(predict, x, y, *, threat, seed):
        return x

    model, x, y = _linear()
    with pytest.raises(ValueError, match=r"^an attack's name must not be clean or worst case, got 'clean'$"):
        evaluate(model, (x, y), attacks=["pgd-1", clean])


def test_attacks_whose_names_differ_in_capitals_alone_have_results_of_their_own(tmp_path):
    names = ["FGSM", "fgsm", "NOOP", "pgd-5-A", "pgd-5-B", "autoattack:apgd-ce+fab", "autoattack:apgd-ce-fab"]
    files = [BatchTask(name, 0).file.lower() for name in names]
    shards = [Shard(attack=name, batches=(0,), mark="m").id.lower() for name in names]
    assert len(set(files)) == len(set(shards)) == len(names)
    assert BatchTask("pgd-50-margin", 8).file == "pgd-50-margin.8.json"

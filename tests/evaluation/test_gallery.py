"""A gallery: which images it shows, that they are attacked, and that what is said of them is what the model says."""

from collections import Counter

import numpy as np
import pytest
import torch

from advmoe.evaluation import gallery
from advmoe.evaluation.gallery import gallery_run
from advmoe.evaluation.subject import Options, open_subject
from advmoe.models.runs import load_run
from advmoe.moe.routing import pathway
from advmoe.report.results import load_gallery
from advmoe.rundir import GALLERY

EPS = 0.1


@pytest.fixture(scope="module")
def run_dir(make_digits_run, tmp_path_factory):
    return make_digits_run(tmp_path_factory.mktemp("runs") / "run")


def test_what_it_says_is_what_the_model_says(run_dir):
    path = gallery_run(run_dir, number=6, accelerator="cpu", threads=1)
    assert path == run_dir / GALLERY
    arrays = load_gallery(path)
    data = open_subject(run_dir).data
    clean, adversarial = (torch.from_numpy(arrays[kind]).float() for kind in ("clean", "adversarial"))
    # The images are those of the test set, and the attack stays in its ball, but for what float16 rounds.
    assert torch.allclose(clean, data.pixels(torch.from_numpy(arrays["index"])), atol=5e-4)
    assert arrays["labels"].tolist() == data.labels[torch.from_numpy(arrays["index"])].tolist()
    change = (adversarial - clean).abs().amax((1, 2, 3))
    assert change.max() <= EPS + 1e-3 and change.min() > 0.5 * EPS
    assert (str(arrays["attack"]), str(arrays["norm"]), float(arrays["eps"])) == ("pgd-2", "linf", EPS)
    assert arrays["classes"].tolist() == [str(digit) for digit in range(10)] and int(arrays["num_experts"]) == 2
    model = load_run(run_dir)
    for kind, x in (("clean", clean), ("adversarial", adversarial)):
        with torch.no_grad():
            confidence, prediction = model(x).softmax(1).max(1)
        assert arrays[f"{kind}_prediction"].tolist() == prediction.tolist()
        assert arrays[f"{kind}_confidence"] == pytest.approx(confidence.numpy(), abs=0.01)
        assert (arrays[f"{kind}_pathway"] == pathway(model, x).numpy()).mean() > 0.95  # of pixels rounded to float16


def test_the_seed_draws(run_dir):
    drawn = [np.load(gallery_run(run_dir, number=4, accelerator="cpu", seed=seed))["index"] for seed in (3, 3, 4)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def drawn(wrong, labels, number):
    """Which of some images are drawn, where the model is wrong about those in `wrong`."""
    labels = torch.tensor(labels)

    class Data:
        def __init__(self, index):
            self.index = index
            self.labels = labels[index]

        def __len__(self):
            return len(self.index)

        def subset(self, index):
            return Data(self.index[index])

        def pixels(self, index):
            return self.index[index].float().view(-1, 1, 1, 1)

    def predict(x):
        index = x.flatten().long()
        told = torch.where(torch.isin(index, torch.tensor(wrong)), (labels[index] + 1) % 3, labels[index])
        return torch.nn.functional.one_hot(told, 3).float()

    data = Data(torch.arange(len(labels)))
    return gallery._sampled(predict, data, number, 0, torch.device("cpu")).tolist()


def test_classes_take_turns_and_the_wrong_come_last():
    labels = [0, 0, 0, 0, 0, 1, 1, 2]
    positions = drawn([1, 5], labels, 8)
    assert sorted(positions) == list(range(8)) and set(positions[6:]) == {1, 5}
    assert [labels[at] for at in positions] == [0, 1, 2, 0, 0, 0, 0, 1]
    assert drawn([1, 5], labels, 3) == positions[:3]
    assert Counter(labels[at] for at in drawn([], labels, 5)) == {0: 2, 1: 2, 2: 1}


def test_a_plain_run_has_no_pathways(make_digits_run, tmp_path):
    arrays = load_gallery(gallery_run(make_digits_run(tmp_path / "plain", kind="dense"), number=2, accelerator="cpu"))
    assert arrays["clean_pathway"].shape == arrays["adversarial_pathway"].shape == (2, 0)
    assert int(arrays["num_experts"]) == 0


def test_options_are_those_of_every_measurement(run_dir, tmp_path):
    options = Options(attacks=["pgd-3-margin"], out=tmp_path / "elsewhere", accelerator="cpu", num_examples=5, seed=3)
    path = gallery_run(run_dir, options, number=8)
    arrays = load_gallery(path)
    assert path == tmp_path / "elsewhere" / GALLERY and str(arrays["attack"]) == "pgd-3-margin"
    assert sorted(arrays["index"]) == open_subject(run_dir, num_examples=5, seed=3).index.tolist()


def test_mistakes_leave_nothing(make_digits_run, tmp_path):
    folder = make_digits_run(tmp_path / "run")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="number must be >= 1, got 0"):
        gallery_run(folder, number=0)
    with pytest.raises(ValueError, match=r"eps must be .*got 2"):
        gallery_run(folder, overrides={"threat": {"eps": "2"}})
    with pytest.raises(ValueError, match="attacks to show must be a single one, got pgd-2, pgd-3"):
        gallery_run(folder, attacks=["pgd-2", "pgd-3"])
    assert sorted(folder.iterdir()) == before

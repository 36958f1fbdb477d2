"""What is measured, opened once: a run's model, images and threat model, or a classifier of the user's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from advmoe.config import Config
from advmoe.evaluation.subject import digest_of
from advmoe.evaluation.subject import open_subject as subject
from advmoe.models.runs import load_run
from advmoe.rundir import stored_digest
from advmoe.training.run import resume, train

pytestmark = pytest.mark.usefixtures("shallow_backbones")

OWN = """
import itertools, torch

made = itertools.count(1.0)

def make():
    last = torch.nn.Linear(64, 10)
    torch.nn.init.constant_(last.bias, next(made))
    return torch.nn.Sequential(torch.nn.Flatten(), last)
"""
DIGITS = {"data": {"name": "digits", "image_size": 8}, "threat": {"eps": "0.2"}}


def test_a_run_is_measured_by_its_own_settings_unless_others_are_given(make_digits_run, tmp_path):
    run = make_digits_run(tmp_path / "run")
    opened = subject(run, accelerator="cpu")
    assert (opened.threat.norm, opened.threat.eps) == ("linf", 0.1)
    assert opened.home == run and opened.data_name == "digits" and opened.classes == tuple(map(str, range(10)))
    assert opened.digest == stored_digest(run / "model.safetensors") == opened.described["model_sha256"]
    assert opened.described["data"] == {"name": "digits", "split": "test"}
    other = subject(run, accelerator="cpu", overrides={"threat": {"eps": "0.3"}}, out=tmp_path / "elsewhere")
    assert other.threat.eps == 0.3 and other.home == tmp_path / "elsewhere" and not other.home.exists()


def test_images_are_drawn_by_the_seed_in_their_order(make_digits_run, tmp_path):
    run = make_digits_run(tmp_path / "run")
    whole, first, again, other = (
        subject(run, num_examples=n, seed=seed) for n, seed in ((None, 0), (9, 0), (9, 0), (9, 1))
    )
    assert whole.index.tolist() == list(range(len(whole.data)))
    assert first.index.tolist() == again.index.tolist() == sorted(first.index.tolist()) != other.index.tolist()
    assert torch.equal(first.data.labels, whole.data.labels[first.index]) and len(first.data) == 9


def test_a_classifier_of_the_user_s_own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    opened = subject("own.py:make", overrides=DIGITS, num_examples=6, accelerator="cpu")
    assert str(opened.home) == "evaluations/own-make" and opened.threat.eps == 0.2
    # Each process loads it anew: a factory that makes other weights each time is found out.
    with pytest.raises(ValueError, match=r"own\.py:make must make the same weights every time it is loaded"):
        opened.load(torch.device("cpu"))


def test_a_digest_is_of_weights():
    assert digest_of(lambda x: x) is None
    one, other = (torch.nn.Linear(2, 2) for _ in range(2))
    assert digest_of(one) == digest_of(one) != digest_of(other)


def test_a_loaded_model_has_the_digest_of_its_file(make_digits_run, tmp_path):
    run = make_digits_run(tmp_path / "run")
    assert digest_of(load_run(run)) == stored_digest(run / "model.safetensors")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("run", {"weights": "w.safetensors"}, "weights must go with FILE.py:FACTORY"),
        ("own.py:make", {"source": "own.py:make"}, "--model must go with a run"),
        ("run", {"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ("run", {"overrides": {"data": {"name": "digits", "image_size": 8}, "threat": {"eps": 2}}}, "threat.eps"),
    ],
)
def test_what_cannot_be_measured_is_named(make_digits_run, tmp_path, monkeypatch, target, options, message):
    make_digits_run(tmp_path / "run")
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        subject(target, **options)


def test_a_model_without_moe_layers_cannot_be_traced(make_digits_run, tmp_path):
    opened = subject(make_digits_run(tmp_path / "run", kind="s-dense"), num_examples=4, accelerator="cpu")
    with pytest.raises(ValueError, match="a model to trace must have MoE layers"):
        opened.routed_under_pgd("trace")


def test_draws_are_averaged_by_evaluations_and_sweeps_alone(make_digits_run, tmp_path):
    opened = subject(make_digits_run(tmp_path / "run"), num_examples=4, accelerator="cpu", eot=3)
    attacked = opened.under_attack(["pgd-2"])
    assert attacked.job.setting.eot == 3
    with pytest.raises(ValueError, match="eot must be left out but by evaluate and sweep, got 3"):
        next(attacked.images("pgd-2"))


def test_every_image_is_attacked_within_the_ball(make_digits_run, tmp_path):
    opened = subject(make_digits_run(tmp_path / "run"), num_examples=5, batch_size=2, accelerator="cpu", threads=1)
    attacked = opened.under_attack(["pgd-2"])
    assert attacked.names == ("pgd-2",)
    batches = list(attacked.images("pgd-2"))
    assert [len(y) for _, _, y in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([y for *_, y in batches]), opened.data.labels)
    for x, x_adv, _ in batches:
        assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1


def pictures(folder, side, number=10):
    """A folder of two classes of so many pictures each, without a test set."""
    for which, name in enumerate(("flat", "steep")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for shade in range(number):
            picture = np.full((side, side, 3), 20 * shade, np.uint8)
            picture[: side // 2 if which else side] = 255 - 10 * shade
            Image.fromarray(picture).save(folder / name / f"{shade}.png")
    return folder


@pytest.fixture
def folder_run(tmp_path):
    """A run on 20 pictures of 16 pixels in `16`, of which four are its test set."""
    small = {"name": "folder", "root": str(pictures(tmp_path / "16", 16)), "val_fraction": 0.2}
    settings = {"model": {"name": "wrn-10-1", "kind": "dense", "width": 4}, "data": small}
    config = Config.from_dict({**settings, "training": {"method": "standard", "epochs": 1, "batch_size": 8}})
    return train(config, run_dir=tmp_path / "run")


def test_pictures_of_another_size_get_the_model_s(folder_run, tmp_path):
    """As `predict` has them."""
    assert subject(folder_run, accelerator="cpu").data.shape == (3, 16, 16)
    elsewhere = {"root": str(pictures(tmp_path / "64", 64))}
    assert subject(folder_run, overrides={"data": elsewhere}, accelerator="cpu").data.shape == (3, 16, 16)
    asked = {"data": {**elsewhere, "image_size": 32}}
    assert subject(folder_run, overrides=asked, accelerator="cpu").data.shape == (3, 32, 32)


def test_pictures_laid_beside_those_of_training_are_no_other_test_set(folder_run, tmp_path):
    """Another would be drawn, with images that the run was trained on."""
    pictures(tmp_path / "16", 16, number=12)
    rule = r"^data.root must hold the 20 images that the run's test set was drawn from, got 24 or others: "
    with pytest.raises(ValueError, match=rule):
        subject(folder_run, accelerator="cpu")
    with pytest.raises(ValueError, match=rule):
        resume(folder_run)
    named = subject(folder_run, overrides={"data": {"root": str(tmp_path / "16")}}, accelerator="cpu")
    assert len(named.data) == 5  # who names a folder means it
    for which in ("flat", "steep"):
        for number in (10, 11):
            (tmp_path / "16" / which / f"{number}.png").unlink()
    assert len(subject(folder_run, accelerator="cpu").data) == 4

"""The entry that a run has in a zoo: what it says was measured, and its weights as float16."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import advmoe
from advmoe.cli import main
from advmoe.config import Config
from advmoe.documents import read_arrays
from advmoe.evaluation.runs import evaluate_run
from advmoe.models import create_model, save_model
from advmoe.rundir import read_result, write_result
from advmoe.text import percent
from advmoe.zoo import FILES, INDEX, PACKED, PLACE, entries_of
from advmoe.zoo.entry import numbers

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
MADE_OF = {name: sorted((RESULTS / "zoo" / name).rglob("evaluation.json")) for name in entries_of(PACKED)}
"""The evaluations that the index was made of."""

WORDS = ["--name", "mine", "--title", "My model", "--licence", "mit", "--of", "digits"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits, evaluated on some images by PGD of two steps."""
    folder = tmp_path_factory.mktemp("zoo") / "run"
    folder.mkdir()
    values = {"data": {"name": "digits", "image_size": 16}, "threat": {"eps": "0.1"}, "attack": {"steps": 2}}
    Config.from_dict({"model": {"width": 4}, **values}).dump(folder / "config.yaml")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = create_model("resnet18", num_classes=10, in_channels=1, input_size=16, width=4)
        for _ in range(4):
            model(torch.rand(32, 1, 16, 16))
    save_model(model.eval(), folder)
    evaluate_run(folder, num_examples=60, workers=1)
    return folder


@pytest.fixture
def run(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


@pytest.mark.parametrize("name", MADE_OF)
def test_the_index_says_what_is_stored(name: str) -> None:
    told = entries_of(PACKED)[name].told
    stored = [json.loads(each.read_text()) for each in MADE_OF[name]]
    known = numbers(stored, told["cost"].get("hardware"))
    assert known == {key: told[key] for key in known}
    config = Config.load(PACKED / name / "config.yaml")
    assert told["method"] == config.training.method and told["threat"]["eps"] == float(config.threat.eps)


@pytest.mark.parametrize("name", MADE_OF)
def test_every_model_was_evaluated_as_docs_how_to_zoo_says(name: str) -> None:
    entry = entries_of(PACKED)[name]
    images = {attack: each.images for attack, each in entry.accuracy.items()}
    assert (images.pop("clean"), images.pop("pgd-50")) == (10_000, 10_000) and set(images.values()) == {1000}
    assert entry.worst_case.images == 1000 and entry.same.count == entry.same.images == 10_000
    assert {json.loads(each.read_text())["model_sha256"] for each in MADE_OF[name]} == {entry.digest}
    drawn = [read_arrays(each.with_name("evaluation-examples.npz"), ["index"])["index"] for each in MADE_OF[name]]
    first = RESULTS / "zoo" / "at-s-dense" / "strong" / "evaluation-examples.npz"
    assert any(np.array_equal(each, read_arrays(first, ["index"])["index"]) for each in drawn)


def evaluation(images: int, robust: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "clean_accuracy": 0.5 + images / 10_000, "robust_accuracy": robust, "worst_case": min(robust.values()),
        "num_examples": images, "masking_gap": 0.125, "threat": {"norm": "linf", "eps": 0.1, "extra": 1},
        "attacks": {name: {"flags": {f"{name}?": 2} if name == "autoattack" else {}} for name in robust},
        "cost": {"gmacs": 0.1, "parameters": 7, "active_parameters": 5, "ms_per_image": images / 100, "batch": 128,
                 "device": "cpu", "threads": 3},
    } | more  # fmt: skip


def test_numbers_by_hand() -> None:
    large, strong = evaluation(1000, {"pgd-50": 0.25}), evaluation(200, {"pgd-50": 0.3, "autoattack": 0.2})
    assert numbers([large, strong], "a machine") == numbers([strong, large], "a machine") == {
        "threat": {"norm": "linf", "eps": 0.1},
        "accuracy": {
            "clean": {"value": 0.6, "images": 1000},
            "pgd-50": {"value": 0.25, "images": 1000},
            "autoattack": {"value": 0.2, "images": 200},
        },
        "worst_case": {"value": 0.2, "images": 200, "attacks": ["pgd-50", "autoattack"]},
        "masking_gap": 0.125,
        "flags": {"autoattack": ["autoattack?"]},
        "cost": {
            "gmacs": 0.1, "parameters": 7, "active_parameters": 5, "ms_per_image": 2.0, "batch": 128, "device": "cpu",
            "threads": 3, "hardware": "a machine",
        },
    }  # fmt: skip
    strong["gradient_passes"] = {"straight_through": 50, "worst_case": 1100}
    assert numbers([large, strong])["gradient_passes"] == strong["gradient_passes"]
    assert numbers([strong])["cost"] == {"gmacs": 0.1, "parameters": 7, "active_parameters": 5}


def test_evaluations_of_two_threat_models_are_refused() -> None:
    other = evaluation(10, {"pgd-50": 0.1}, threat={"norm": "l2", "eps": 0.5})
    with pytest.raises(ValueError, match=r"^evaluations must be under one threat model, got .*'l2'"):
        numbers([evaluation(10, {"pgd-50": 0.1}), other])


def test_a_run_becomes_an_entry_that_every_command_takes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert main(["zoo", "entry", str(run), *WORDS, "--hardware", "this machine"]) == 0
    assert "ADVMOE_ZOO=zoo advmoe zoo show mine" in capsys.readouterr().out
    folder, measured = tmp_path / "zoo" / "mine", read_result(run / "evaluation.json")
    entry = entries_of(tmp_path / "zoo")["mine"]
    assert entry.accuracy["clean"].value == measured["clean_accuracy"] and entry.worst_case.images == 60
    assert entry.worst_case.value == measured["worst_case"] and entry.masking_gap == measured["masking_gap"]
    assert entry.time is not None and entry.time.ms == measured["cost"]["ms_per_image"]
    assert entry.same.images == 60 and entry.same.count >= 59
    before, after = load_file(run / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(after[name], value.half() if value.is_floating_point() else value)

    monkeypatch.setenv(PLACE, "zoo")
    there = {each: each.stat().st_mtime_ns for each in folder.iterdir()}
    assert set(each.name for each in there) == {*FILES, "README.md"}
    quick = ["--num-examples", "20", "--attack.steps", "1", "--threads", "1"]
    assert main(["evaluate", "zoo:mine", *quick, "--workers", "1"]) == 0
    again = read_result(tmp_path / "evaluations" / "mine" / "evaluation.json")
    assert again["model_sha256"] == entry.digest == advmoe.load("zoo:mine").origin.digest  # type: ignore[union-attr]
    assert main(["dissect", "zoo:mine", *quick, "--no-figure"]) == 0
    assert (tmp_path / "evaluations" / "mine" / "dissection.json").is_file()
    assert main(["cost", "zoo:mine", "--batch", "1", "--seconds", "0", "--threads", "1"]) == 0
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert main(["predict", "zoo:mine", str(tmp_path / "a.npy")]) == 2  # no picture
    assert "a.npy" in capsys.readouterr().err
    assert {each: each.stat().st_mtime_ns for each in folder.iterdir()} == there


def test_of_several_evaluations_each_number_is_the_largest_s(run: Path, tmp_path: Path) -> None:
    quick = ["--attack.steps", "2", "--threads", "1", "--workers", "1", "--num-examples"]
    assert main(["evaluate", "run", *quick, "20", "--attacks", "pgd-2,pgd-2-soft,pgd-2-margin", "--out", "strong"]) == 0
    assert main(["zoo", "entry", "run", *WORDS, "--evaluations", "strong,run"]) == 0
    entry, large = entries_of(tmp_path / "zoo")["mine"], read_result(run / "evaluation.json")
    strong = read_result(tmp_path / "strong" / "evaluation.json")
    assert entry.accuracy["clean"].value == large["clean_accuracy"] and entry.accuracy["clean"].images == 60
    assert entry.worst_case.value == strong["worst_case"] and entry.worst_case.images == 20
    card = (tmp_path / "zoo" / "mine" / "README.md").read_text()
    cells = [line[2:-2].split(" | ") for line in card.splitlines() if line[:2] == "| "]
    rows = {row[0]: row[1:] for row in cells if len(row) == 4}
    shown = {"clean": "none (clean, SA)", "pgd-2": "pgd-2 (RA)", "pgd-2-margin": "pgd-2-margin (RA)"}
    for name, title in shown.items():
        accuracy = entry.accuracy[name]
        assert (rows[title][0], rows[title][2]) == (percent(accuracy.value), str(accuracy.images))
    assert rows["worst case over all of them"][2] == "20" and "both on the 20 images): " in card
    assert "ms per image" not in card  # nobody says on what it was taken


def test_an_exported_model_lies_in_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def export_run(run: Path, **options: Any) -> Any:
        seen.update(options, run=run)
        raise advmoe.export.ExportFailed("enough")

    monkeypatch.setattr("advmoe.export.export_run", export_run)
    for words, out in (([], "advmoe.onnx"), (["--format", "torch-export"], "advmoe.pt2"), (["--out", "x"], "x")):
        assert main(["export", "zoo:advmoe", *words]) == 1
        assert (seen["run"], seen["out"]) == (PACKED / "advmoe", out)


def test_an_entry_is_replaced_and_others_stay(run: Path, tmp_path: Path) -> None:
    for name, title in (("a", "first"), ("b", "other"), ("a", "second")):
        assert main(["zoo", "entry", str(run), *WORDS, "--name", name, "--title", title]) == 0
    assert {name: each.title for name, each in entries_of(tmp_path / "zoo").items()} == {"a": "second", "b": "other"}


def test_a_model_may_lie_elsewhere(run: Path, tmp_path: Path) -> None:
    assert main(["zoo", "entry", str(run), *WORDS, "--url", "https://example.org/mine/"]) == 0
    assert entries_of(tmp_path / "zoo")["mine"].url == "https://example.org/mine"
    assert (tmp_path / "zoo" / "mine" / "model.safetensors").is_file()  # to be put there


def beyond(run: Path) -> None:
    """Give the run a weight that float16 does not hold."""
    weights = load_file(run / "model.safetensors")
    next(value for name, value in weights.items() if name.endswith("weight")).view(-1)[0] = 1e5
    save_file(weights, run / "model.safetensors")
    strip(run)


def strip(run: Path, **changes: Any) -> None:
    """Make the evaluation one of a version that wrote no digest."""
    result = read_result(run / "evaluation.json")
    del result["model_sha256"]
    write_result(run / "evaluation.json", result | changes)


def other_weights(run: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_model(create_model("resnet18", num_classes=10, in_channels=1, input_size=16, width=4).eval(), run)


def other_weights_without_digest(run: Path) -> None:
    other_weights(run)
    strip(run)


def fewer_examples(run: Path) -> None:
    arrays = read_arrays(run / "evaluation-examples.npz")
    np.savez(run / "evaluation-examples.npz", **{name: each[:-1] for name, each in arrays.items()})


def far_index(run: Path) -> None:
    arrays = read_arrays(run / "evaluation-examples.npz")
    np.savez(run / "evaluation-examples.npz", **arrays | {"index": arrays["index"] + 10_000})


def two_threats(run: Path) -> None:
    shutil.copytree(run, run.parent / "other")
    strip(run.parent / "other", threat={"norm": "linf", "eps": 0.2})


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), [], "must lie in run (advmoe evaluate), got none"),
        (other_weights, [], "must lie in run (advmoe evaluate), got one of other weights"),
        (other_weights_without_digest, [], "run must be of this model and these images: at least 99%"),
        (fewer_examples, [], "evaluation-examples.npz must hold every image of the evaluation"),
        (far_index, [], "data must be the test images of run, got 355 images"),
        (beyond, [], "weights must be finite and at most 65504 to be rounded to float16, got"),
        (two_threats, ["--evaluations", "run,other"], "evaluations must be under one threat model, got"),
        (lambda run: None, ["--name", "../mine"], "name must be small letters and digits, in words joined by -"),
        (lambda run: None, ["--url", "../mine"], "url must be an http(s) address or a folder's name, got '../mine'"),
        (lambda run: None, ["--evaluations", "nowhere"], "must lie in nowhere (advmoe evaluate), got none"),
        (lambda run: (run.parent / "zoo").write_text(""), [], "--out must be where files can be written"),
    ],
)
def test_what_cannot_be_an_entry_is_named_and_nothing_written(
    run: Path, tmp_path: Path, capsys: Any, change: Any, words: list[str], message: str
) -> None:
    change(run)
    capsys.readouterr()
    assert main(["zoo", "entry", "run", *WORDS, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("advmoe: error: ") and message in error
    assert not (tmp_path / "zoo").is_dir()


def test_a_network_of_ones_own_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    spec = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(spec | {"source": "net.py:make"}))
    assert main(["zoo", "entry", str(run), *WORDS]) == 2
    assert "net.py:make" in capsys.readouterr().err and not (tmp_path / "zoo").exists()


DATA = ROOT / "data" / "cifar10-jpeg"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs data/cifar10-jpeg (advmoe data cifar10-jpeg)")
@pytest.mark.slow
@pytest.mark.parametrize("name", MADE_OF)
def test_the_packed_weights_predict_as_the_index_says(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(PACKED / name, tmp_path / "run"))
    words = ["--name", "again", "--title", "again", "--licence", "mit", "--of", "it", "--data.root", str(DATA)]
    evaluations = ",".join(str(each.parent) for each in MADE_OF[name])
    assert main(["zoo", "entry", str(run), *words, "--evaluations", evaluations, "--out", str(tmp_path / "zoo")]) == 0
    again, known = entries_of(tmp_path / "zoo")["again"], entries_of(PACKED)[name]
    assert abs(again.same.count - known.same.count) <= 2 and again.digest == known.digest
    assert INDEX in {each.name for each in (tmp_path / "zoo").iterdir()}

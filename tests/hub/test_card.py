"""Model cards: their pieces by hand, and those of whole runs against the runs' own files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cards import front_matter, rows
from huggingface_hub import ModelCard

import advmoe
from advmoe.config import Config
from advmoe.hub.card import Record, model_card, portable

ATTACKED = Path(__file__).parents[2] / "docs" / "results" / "zoo" / "advmoe" / "strong" / "evaluation.json"
SPEC = {
    "name": "resnet18", "num_classes": 10, "in_channels": 3, "input_size": 32, "kind": "moe", "width": 64,
    "num_experts": 2, "scale": 0.5, "router": "layer", "experts": "subset",
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "clean_accuracy": 0.5, "robust_accuracy": {"pgd-50": 0.25, "autoattack": 0.2}, "worst_case": 0.2,
    "num_examples": 100, "threat": {"norm": "linf", "eps": 8 / 255}, "attacks": {},
    "data": {"name": "cifar10", "split": "test"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "short"),
    [
        ("runs/a", "runs/a"), ("/home/me/runs/a", "a"), ("~/data", "data"), ("--data.root=/home/me/d", "--data.root=d"),
        ("--threat.eps=8/255", "--threat.eps=8/255"), ("", ""),
    ],
)  # fmt: skip
def test_folders_of_one_machine_are_cut_off_a_word(word: str, short: str) -> None:
    assert portable(word) == short


def evaluated(**changes: Any) -> str:
    return model_card(SPEC, Record(evaluation={**EVALUATION, **changes}), name="m")


def test_the_attacks_settings_are_those_of_the_evaluation() -> None:
    given = {"steps": 50, "step_size": 0.5 / 255, "queries": 5000, "seed": None, "batch_size": 250}
    assert "- Settings of these attacks: steps 50, step_size 0.5/255, queries 5000.\n" in evaluated(attack=given)
    assert "Settings of these attacks" not in evaluated()


def test_front_matter_is_for_the_hub() -> None:
    front = yaml.safe_load(model_card(SPEC, Record(), name="m", license="mit").split("---\n", 2)[1])
    assert front["license"] == "mit" and front["library_name"] == "advmoe" and "resnet18" in front["tags"]


def test_an_autoattack_that_raised_no_flag_says_so() -> None:
    assert "- AutoAttack (`autoattack`) raised no flag." in evaluated()
    flagged = evaluated(attacks={"autoattack": {"flags": {"a warning": 3}}})
    assert "- AutoAttack's flag (`autoattack`): a warning" in flagged and "raised no flag" not in flagged


def test_what_was_skipped_and_what_failed_is_told() -> None:
    card = evaluated(
        attacks={"routed": {"skipped": "no MoE layers"}},
        checks=[{"name": "logits", "passed": False}, {"name": "labels", "passed": True}],
    )
    assert "- `routed` was skipped: no MoE layers." in card
    assert "- A check made before attacking failed: logits." in card and "failed: labels" not in card


def test_how_to_load_names_folder_or_repository() -> None:
    assert 'from_pretrained("path/to/this/folder")' in model_card(SPEC, Record(), name="m")
    assert 'from_pretrained("lab/m")' in model_card(SPEC, Record(), name="m", repo_id="lab/m")
    assert "# x: (N, 3, 32, 32), pixels in [0, 1]" in model_card(SPEC, Record(), name="m")


def test_an_evaluation_of_other_weights_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({**EVALUATION, "model_sha256": "a" * 64}))
    assert Record.read(tmp_path, "a" * 64).evaluation is not None
    other = Record.read(tmp_path, "b" * 64)
    assert other.evaluation is None and "evaluation.json" not in other.texts
    assert "is of other weights than these" in model_card(SPEC, other, name="m")


@pytest.mark.parametrize("missing", ["clean_accuracy", "robust_accuracy", "worst_case", "num_examples", "threat"])
def test_an_evaluation_without_its_numbers_is_damaged(tmp_path: Path, missing: str) -> None:
    content = {name: value for name, value in EVALUATION.items() if name != missing}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"evaluation\.json must hold clean_accuracy, .*, got one without"):
        Record.read(tmp_path)


# Whole runs


def test_the_card_of_a_real_run_says_what_its_files_say(stored_run: Path, tmp_path: Path) -> None:
    folder = advmoe.save_pretrained(stored_run, tmp_path / "table-advmoe", license="apache-2.0")
    card, evaluation = (folder / "README.md").read_text(), json.loads((stored_run / "evaluation.json").read_text())
    data = ModelCard(card).data  # as the Hub's own reader takes it
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "advmoe", "image-classification")
    assert {"advmoe", "adversarial-robustness", "mixture-of-experts", "resnet18"} == set(data.tags)
    assert data.metrics == ["accuracy"] and data.datasets is None  # a folder of images has no name on the Hub
    metrics = {each.metric_name: each.metric_value for each in data.eval_results}
    assert metrics == {
        "clean accuracy": 0.4285,
        "robust accuracy, pgd-50, linf 8/255": 0.2455,
        "robust accuracy, worst case, linf 8/255": 0.2455,
    }
    assert {(e.dataset_name, e.dataset_split, e.task_type) for e in data.eval_results} == {
        ("folder", "test", "image-classification")
    }
    table = rows(card)
    assert table["none (clean, SA)"][0] == "42.9" and table["pgd-50 (RA)"][0] == "24.6"
    # 2,455 of 10,000 images: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), worked by hand.
    assert table["worst case over all of them"] == ["24.6", "23.7 to 25.4"]
    assert table["parameters stored"] == [f"{evaluation['cost']['parameters']:,}"] == ["354,314"]
    assert table["parameters that one image uses"] == ["182,666"]
    assert table["MMACs of one image's pathway, routers included"] == ["8.878"]
    assert table["ms per image (batch 128, cpu, 1 thread, fp32)"] == ["0.4003"]
    for text in (
        "Measured on 10,000 images of `folder` (test), threat model linf 8/255",
        "Threat model in training: linf, eps 8/255",
        "inner attack of 2 steps of 5/255, beta 6",
        "3 epochs, batch 64, learning rate 0.05",
        "torch 2.13.0+cpu",
        "fd2ea8cce3f4cb4dd96de9645ee91a3dde9022d9",
        "AutoAttack was not run",
        'from_pretrained("path/to/this/folder")',
        f"```yaml\n{(stored_run / 'config.yaml').read_text()}```",
    ):
        assert text in card, text
    assert "Not evaluated" not in card and "flag" not in card


def test_the_card_reports_intervals_and_autoattacks_flags(stored_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stored_run, tmp_path / "run"))
    shutil.copy(ATTACKED, run)
    evaluation = json.loads(ATTACKED.read_text())
    card = (advmoe.save_pretrained(run, tmp_path / "saved") / "README.md").read_text()
    table = rows(card)
    for name, report in evaluation["attacks"].items():
        low, high = report["interval"]
        shown = f"{100 * report['robust_accuracy']:.1f}"
        assert table[f"{name} (RA)"] == [shown, f"{100 * low:.1f} to {100 * high:.1f}"]
    flags = evaluation["attacks"]["autoattack"]["flags"]
    assert flags and all(f"AutoAttack's flag (`autoattack`): {flag}" in card for flag in flags)
    assert "AutoAttack was not run" not in card and "raised no flag" not in card
    assert (
        "Masking gap (straight-through PGD less the worst case): 5.0 points. Gradient passes that a robust im" in card
    )
    evaluation["gradient_passes"] = {"straight_through": 50, "worst_case": 1600}
    del evaluation["checksum"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = (advmoe.save_pretrained(run, tmp_path / "again") / "README.md").read_text()
    assert "5.0 points. Gradient passes that a robust image withstood: 1,600 in the worst case, 50 under that" in card


def test_a_card_tells_the_options_of_the_training(stored_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stored_run, tmp_path / "run"))
    values = Config.load(stored_run / "config.yaml").to_dict()
    values["training"] |= {"alternation": "every-4"}
    Config.from_dict(values).dump(other / "config.yaml")
    plain = (advmoe.save_pretrained(other, tmp_path / "plain") / "README.md").read_text()
    assert "- Options: alternation every-4.\n" in plain  # the default departs from the paper's Algorithm 1
    values["training"] |= {"alternation": "warm-start", "ema": 0.99}
    values["data"]["train_examples"] = 300
    Config.from_dict(values).dump(other / "config.yaml")
    card = (advmoe.save_pretrained(other, tmp_path / "saved") / "README.md").read_text()
    assert "- Options: alternation warm-start, ema 0.99.\n" in card and "inner attack of 1 step of" in card
    assert "; 300 of its training images; images of" in card
    for each in ({"alternation": "both"}, {"alternation": "every-4", "method": "at"}):
        values["training"] |= {"ema": 0, **each}
        Config.from_dict(values).dump(other / "config.yaml")
        saved = advmoe.save_pretrained(other, tmp_path / each["alternation"])
        assert "Options" not in (saved / "README.md").read_text()
    values["training"] |= {"objective": "pgd-at", "optimizer": "adamw", "router_lr": 0.01}
    Config.from_dict(values).dump(other / "config.yaml")
    card = (advmoe.save_pretrained(other, tmp_path / "pgd-at") / "README.md").read_text()
    assert "- Options: objective pgd-at, optimizer adamw, router_lr 0.01.\n" in card
    assert "adversarial training (PGD-AT) of all parameters.\n" in card and ", beta 6" not in card
    values["training"] |= {"objective": "trades", "teacher": "/somewhere/wide"}
    Config.from_dict(values).dump(other / "config.yaml")
    card = (advmoe.save_pretrained(other, tmp_path / "taught") / "README.md").read_text()
    assert "- Taught by `wide`: its soft labels in the place of classes and TRADES ([RSLAD]" in card
    assert "weight 0.833)" in card and ", beta" not in card


def test_a_card_says_what_is_unknown(stored_run: Path, tmp_path: Path) -> None:
    bare = model_card(SPEC, Record(), name="bare")
    assert "**Not evaluated.**" in bare and bare.count("Unknown") == 3 and "Not measured." in bare
    assert front_matter(bare)["license"] == "unknown" and "model-index" not in front_matter(bare)
    unevaluated = Path(shutil.copytree(stored_run, tmp_path / "run"))
    (unevaluated / "evaluation.json").unlink()
    (unevaluated / "manifest.json").write_text(
        json.dumps(json.loads((stored_run / "manifest.json").read_text()) | {"finished": None})
    )
    card = model_card(SPEC, Record.read(unevaluated), name="x")
    assert "**Not evaluated.**" in card and "**Training had not finished**" in card
    assert "metrics" not in front_matter(card) and "linf, eps 8/255" in card


def test_a_card_tells_the_images_size_and_what_was_left_out() -> None:
    config = Config.from_dict({"data": {"name": "imagenet"}, "model": {"width": 4}})
    note = "train: 2 files left out (the name's ending is none of .png): 2 '.heic'"
    card = model_card({**SPEC, "input_size": 224}, Record(config, {"data_notes": [note]}), name="m")
    # ImageNet's customary size, which no field of the run says.
    assert "images of 224 pixels a side" in card and f"What was not used:\n\n- `{note}`" in card
    for nothing in ({}, {"data_notes": 3}):
        assert "What was not used" not in model_card({**SPEC, "input_size": 224}, Record(config, nothing), name="m")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation.json", '{"clean_accuracy": 0.5'),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"clean_accuracy": 0.5, "worst_case": 50}'),
        ("manifest.json", "no"),
        ("config.yaml", "model: [1"),
    ],
)
def test_a_damaged_record_makes_no_card(stored_run: Path, tmp_path: Path, name: str, text: str) -> None:
    spoilt = Path(shutil.copytree(stored_run, tmp_path / "run"))
    (spoilt / name).write_text(text)
    with pytest.raises(ValueError, match=name) as error:
        advmoe.save_pretrained(spoilt, tmp_path / "saved")
    assert "\n" not in str(error.value) and not (tmp_path / "saved").exists()

"""Pieces of a model card that no run is needed for. Cards of whole runs are in test_hub.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from advmoe.hub.card import Record, model_card, portable

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

"""What a command prints stands in 80 columns."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from advmoe import cli
from advmoe.cli import COMMANDS, evaluate, export
from advmoe.evaluation import cost_report, pathways, sweep
from advmoe.evaluation.dissection import Dissection
from advmoe.studies.tables import text
from advmoe.text import WIDTH, listing, macs, macs_column, macs_unit, tabular, wrapped

STUDIES = sorted((Path(__file__).parents[2] / "docs" / "results" / "studies").glob("*/study.json"))
LAYERS, EXPERTS = 28, 8


def too_wide(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if len(line) > WIDTH]


def dissection() -> Dissection:
    generator = torch.Generator().manual_seed(0)
    clean, attacked = torch.randint(EXPERTS, (2, 20, LAYERS), generator=generator)
    clean[:5] = clean[0]
    right, labels = torch.arange(20) % 2 == 0, torch.arange(20) % 10
    return Dissection(clean, attacked, right, right, EXPERTS, labels)


def traced() -> dict[str, Any]:
    units = [torch.eye(EXPERTS, dtype=torch.bool)] * LAYERS
    found = pathways.statistics(dissection(), units, num_classes=10, other=(units, dissection()))
    found["attack"]["name"], found["against"]["run"] = "pgd-50-margin-soft", "runs/another"
    return found | {"classes": [f"a class of several words, number {k}" for k in range(10)]}


def swept() -> dict[str, Any]:
    robust = {0.0: 90, 2 / 255: 40, 1.0: 80}
    return sweep.sweep(lambda eps: torch.arange(100) < robust[eps], list(robust), norm="linf")


KINDS = ("moe", "s-dense", "dense")
COST = {
    "model": {
        "name": "tiny-imagenet-backbone", "kind": "moe", "num_experts": 16, "scale": 0.25, "router": "embedding",
        "width": 160, "input_size": 224,
    },
    "weights": "new ones, of seed 0; no accuracy is measured of them", "images": "random, as no data set was named",
    "device": "cuda (an accelerator of a long name)", "threads": 16, "precision": "fp32, channels-last, eval mode",
    "torch": "2.13.0+cu130", "kernels": "advmoe",
    "models": {kind: {"gmacs": 5.24, "parameters": 36_479_194, "active_parameters": 9_344_618} for kind in KINDS},
    "batches": [
        {
            "batch": 128, "ms_per_image": dict.fromkeys(KINDS, 2149.5883), "busiest": 0.5,
            "ratio_to": {"s-dense": {"moe": 1.1, "dense": 3.2}, "dense": {"moe": 0.4, "s-dense": 0.3}},
            "activation_bytes": dict.fromkeys(KINDS, 123_456 * 2**20),
        }
    ],
}  # fmt: skip
NAME = "autoattack:apgd-ce+apgd-t+fab-t+square"
REPORT = {
    "interval": [0.1, 0.6], "seconds": 12_345.0, "flags": {"a flag of so many words, about an attack's setting": 3},
    "parts": {f"routers w={w}": {"attempted": 6000, "broken": 2000} for w in (0.01, 0.1)},
    "settings": {"pathways": {"reached": 7512, "attacked": 32}},
}  # fmt: skip
EVALUATION = {
    "clean_accuracy": 0.6, "robust_accuracy": {NAME: 0.3}, "worst_case": 0.3, "num_examples": 10_000,
    "masking_gap": 0.125, "threat": {"norm": "linf", "eps": 0.1}, "cost": {"gmacs": 0.0312, "ms_per_image": 0.25},
    "attacks": {NAME: REPORT, "routed": {"skipped": "the model has no MoE layers, so routed adds nothing at all"}},
}  # fmt: skip
EXPORTED = {
    "format": "torch-export", "bytes": 1e9, "computes": "every expert, and takes the chosen one of each image",
    "input": {"name": "pixels", "shape": ["batch", 3, 224, 224], "type": "float32",
              "meaning": "pixels in [0, 1], not normalised; the graph normalises"},
    "outputs": {"logits": ["batch", 1000], "pathway": ["batch", 28]}, "gmacs": 0.00888,
    "check": {"images": 100, "on": "test images of tiny-imagenet", "pathways": 99, "largest_difference": 1e-6,
              "ties": []},
    "time": {"threads": 16, "passes": 40, "pytorch_ms": 123.4, "exported_ms": 56.7, "speedup": 2.18},
}  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    "evaluate": lambda: evaluate._table(EVALUATION),
    "export": lambda: export._exported(EXPORTED),
    "cost": lambda: cost_report.table(COST),
    "dissect": lambda: dissection().table(),
    "pathways": lambda: pathways.table(traced()),
    "sweep-eps": lambda: sweep.table(swept()),
    **{f"study {path.parent.name}": lambda path=path: studied(path) for path in STUDIES},  # type: ignore[misc]
}


def studied(path: Path) -> str:
    return "\n".join(map(text, json.loads(path.read_text())["tables"]))


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    printed = TABLES[name]()
    assert printed.count("\n") > 2 and too_wide(printed) == []


@pytest.mark.parametrize("words", [["recipes"], ["study", "list"], ["data", "list"], ["zoo", "list"], ["help"]])
def test_lists(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) if words == ["help"] else nothing():
        assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 5 and too_wide(printed) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["help", command])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: advmoe {command}") and too_wide(printed) == []
    assert "%%" not in printed


def test_predictions(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    classes = [f"class-{k}-of-a-long-name" for k in range(5)]
    one = SimpleNamespace(classes=classes, probabilities=[0.2] * 5, pathway=None)
    model = SimpleNamespace(predict=lambda images, top: [one] * len(images))
    monkeypatch.setattr("advmoe.exported.ExportedModel", lambda path: model)
    (tmp_path / "m.onnx").touch()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "m.onnx", "a.jpg", "another-picture.jpg"]) == 0
    printed = capsys.readouterr().out
    assert too_wide(printed) == [] and all(printed.count(name) == 2 for name in classes)


class nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def test_heads_then_labels_go_on_below_themselves_then_columns_are_parted() -> None:
    assert tabular(["a", "bb"], [["x", "1"], ["y", "23"]], "<>") == ["a  bb", "x   1", "y  23"]
    heads = ["method", *(f"a head of number {k}" for k in range(4))]
    assert tabular(heads, [["m", *"1234"]], "<>") == [
        "        a head of  a head of  a head of  a head of",
        "method   number 0   number 1   number 2   number 3",
        "m               1          2          3          4",
    ]
    words = "a label of quite many words"
    assert tabular(["label", *(letter * 20 for letter in "abcd")], [[words, *"1234"]]) == [
        f"label                  {'a' * 20}  {'b' * 20}",
        "a label of quite many  1                     2",
        "words",
        "",
        f"label                  {'c' * 20}  {'d' * 20}",
        "a label of quite many  3                     4",
        "words",
    ]


def test_a_text_goes_on_below_itself() -> None:
    assert listing([("a", "b " * 39), ("long", "c")], indent="  ") == [
        "  a     " + "b " * 35 + "b",
        "        b b b",
        "  long  c",
    ]
    assert wrapped("word " * 17, "  ") == ["word " * 15 + "word", "  word"]
    assert wrapped("x" * 90) == ["x" * 90] and wrapped("") == [""]


@pytest.mark.parametrize(
    ("gmacs", "shown"),
    [(0.0312, "31.2 MMACs"), (0.0999, "99.9 MMACs"), (0.1, "0.1 GMACs"), (5.2433, "5.243 GMACs"), (0.0, "0 MMACs")],
)
def test_multiply_accumulates_have_a_unit_without_zeros(gmacs: float, shown: str) -> None:
    assert macs(gmacs) == shown


def test_numbers_that_stand_together_have_one_unit() -> None:
    assert macs_unit([0.02, None, 0.5]) == ("GMACs", 1)
    assert macs_unit([0.02, None]) == ("MMACs", 1000)
    assert macs_unit([None]) == ("GMACs", 1)
    columns = [{"key": "method", "title": "Method"}, {"key": "gmacs", "title": "GMACs", "better": "lower"}]
    cell = {"mean": 0.008, "std": 0.001, "n": 2, "paper": 0.54, "paper_std": None}
    rows = [{"method": "AT", "gmacs": cell}, {"method": "none", "gmacs": None}]
    heads, scaled = macs_column(columns, rows)
    assert heads == [columns[0], {"key": "gmacs", "title": "MMACs", "better": "lower"}]
    expected = {"mean": 8.0, "std": 1.0, "n": 2, "paper": 540.0, "paper_std": None}
    assert scaled == [{"method": "AT", "gmacs": pytest.approx(expected)}, rows[1]]
    assert rows[0]["gmacs"] == cell  # the file's stays
    large = [{"method": "AT", "gmacs": {"mean": 0.54}}]
    assert macs_column(columns, large) == (columns, large)

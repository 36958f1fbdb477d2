"""Pathways counted: planted ones by hand, those of small routed models, and of runs as a user traces them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from advmoe import cli, pathway_statistics
from advmoe.evaluation.dissection import Dissection, dissect
from advmoe.evaluation.overlap import iou, units_of
from advmoe.evaluation.pathways import pathways_run, statistics, table
from advmoe.evaluation.scoring import take
from advmoe.evaluation.subject import open_subject
from advmoe.models import create_model, save_model
from advmoe.models.runs import load_run
from advmoe.moe.routing import pathway

ROOT = Path(__file__).parents[2]

# Two layers of two experts, the halves of 4 rows each. Classes 0, 0, 0, 1, 1; class 2 has no image.
HALVES = [torch.tensor([[True, True, False, False], [False, False, True, True]])] * 2
CLEAN = [[0, 0], [0, 0], [0, 1], [1, 1], [1, 1]]
ADVERSARIAL = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]
LABELS = [0, 0, 0, 1, 1]


def planted(clean=CLEAN, adversarial=ADVERSARIAL, labels=LABELS):
    right = torch.ones(len(labels)).bool()
    return Dissection(torch.tensor(clean), torch.tensor(adversarial), right, right, 2, torch.tensor(labels))


def third(*values):
    """Nested lists of shares that may be thirds."""
    return [pytest.approx(value) for value in values]


def test_planted_pathways():
    result = statistics(planted(), HALVES, num_classes=3)
    assert [result[name] for name in ("num_examples", "num_classes", "num_layers", "num_experts")] == [5, 3, 2, 2]
    assert result["tokens"] is None and result["against"] is None
    clean = result["clean"]
    assert clean["distinct"] == 3
    # Shares 2/5, 2/5 and 1/5: 0.8 log2 (5/2) + 0.2 log2 5.
    assert clean["entropy"] == pytest.approx(0.8 * math.log2(2.5) + 0.2 * math.log2(5))
    assert clean["max_entropy"] == 2  # two choices of two, which five images could fill
    assert clean["frequent"] == [
        {"pathway": [0, 0], "count": 2, "share": 2 / 5, "classes": [{"class": 0, "share": 1.0}]},
        {"pathway": [1, 1], "count": 2, "share": 2 / 5, "classes": [{"class": 1, "share": 1.0}]},
    ]
    assert clean["load"] == [[3 / 5, 2 / 5], [2 / 5, 3 / 5]]
    assert clean["class_shares"] == [[[1, 0], third(2 / 3, 1 / 3)], [[0, 1], [0, 1]], None]
    assert clean["flows"] == [[[2 / 5, 1 / 5], [0, 2 / 5]]]
    # Within class 0 the pairs have 1, 1/3 and 1/3 in common; of the classes, 2 * (0, 0, 1/3).
    within, across = (1 + 2 / 3) / 3, 1 / 9
    expected = [[within, across, None], [across, 1, None], [None, None, None]]
    assert clean["class_iou"] == [[None if v is None else pytest.approx(v, abs=1e-6) for v in row] for row in expected]
    assert clean["iou_within_classes"] == pytest.approx((1 + 2 / 3 + 1) / 4)
    assert clean["iou_between_classes"] == pytest.approx(1 / 9)


def test_planted_attack():
    result = statistics(planted(), HALVES)
    assert result["num_classes"] == 2
    assert result["attack"]["unchanged"] == 3 / 5
    # 1, 1/3, 0, 1, 1
    assert result["attack"]["iou"]["mean"] == pytest.approx((3 + 1 / 3) / 5)
    assert result["attack"]["iou"]["quantiles"]["p25"] == pytest.approx(1 / 3)
    adversarial = result["adversarial"]
    assert adversarial["distinct"] == 4 and adversarial["flows"] == [[[1 / 5, 1 / 5], [1 / 5, 2 / 5]]]
    assert [each["pathway"] for each in adversarial["frequent"]] == [[1, 1]]  # no other occurs twice
    assert json.loads(json.dumps(result)) == result


def test_planted_mask():
    mask = [torch.tensor([[True, True, True, False]]), torch.tensor([[False, False, False, True]])]
    result = statistics(planted(), HALVES, other=(mask, None))["against"]
    assert result["kind"] == "mask" and "other_images" not in result
    # Both have 4 units. Shared: 2 or 1 in layer 0, 0 or 1 in layer 1: 00 -> 2/6, 01 -> 3/5, 11 -> 2/6, 10 -> 1/7.
    assert result["clean"]["mean"] == pytest.approx((4 / 3 + 3 / 5) / 5)
    assert result["adversarial"]["mean"] == pytest.approx((1 + 3 / 5 + 1 / 7) / 5)
    assert result["random_pathways"]["mean"] == pytest.approx((2 / 3 + 3 / 5 + 1 / 7) / 4)
    # Layer 0 of a random mask shares 1 or 2 alike, layer 1 shares 0 or 1 alike.
    assert result["random_masks"]["mean"] == pytest.approx((1 / 7 + 2 * 2 / 6 + 3 / 5) / 4)


def test_planted_pathways_of_another():
    theirs = planted(CLEAN[::-1], CLEAN)
    result = statistics(planted(), HALVES, other=(HALVES, theirs))["against"]
    assert result["kind"] == "pathways" and "random_masks" not in result
    assert result["clean"]["mean"] == pytest.approx((0 + 0 + 1 + 0 + 0) / 5)
    assert result["adversarial"]["mean"] == pytest.approx((1 + 1 / 3 + 0 + 1 + 1) / 5)
    # All 25 pairs of 00, 00, 01, 11, 11 with themselves have 4 + 4 + 1 ones and 8 thirds; the 5 in order, one 1.
    assert result["other_images"]["clean"] == pytest.approx((9 + 8 / 3 - 1) / 20)
    assert result["random_pathways"]["mean"] == pytest.approx((1 + 2 / 3) / 4)


def test_one_image():
    result = statistics(
        planted(CLEAN[:1], ADVERSARIAL[:1], [0]), HALVES, other=(HALVES, planted([[0, 1]], [[0, 1]], [0]))
    )
    clean = result["clean"]
    assert (clean["distinct"], clean["entropy"], clean["max_entropy"], clean["frequent"]) == (1, 0, 0, [])
    assert clean["class_iou"] == [[None]] and clean["iou_within_classes"] is None
    assert result["against"]["other_images"] == {"clean": None, "adversarial": None}
    assert "-" in table({**result, "classes": ["a"], "against": None, "attack": {**result["attack"], "name": "pgd-1"}})


def test_tokens_count_one_by_one():
    clean = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [0, 1]]])  # (N, L, T)
    right = torch.ones(2).bool()
    result = statistics(Dissection(clean, clean, right, right, 2, torch.tensor([0, 1])), HALVES)
    assert result["tokens"] == 2 and result["clean"]["frequent"] == []
    assert result["clean"]["load"] == [[3 / 4, 1 / 4], [1 / 4, 3 / 4]]
    # Tokens go 0 -> 1, 1 -> 1, 0 -> 0, 0 -> 1.
    assert result["clean"]["flows"] == [[[1 / 4, 2 / 4], [0, 1 / 4]]]
    assert result["clean"]["class_shares"] == [[[1 / 2, 1 / 2], [0, 1]], [[1, 0], [1 / 2, 1 / 2]]]
    assert result["clean"]["max_entropy"] == 1 and result["clean"]["entropy"] == 1
    assert result["clean"]["iou_between_classes"] == pytest.approx(4 / 12)  # of 8 units each, 2 + 2 in common
    assert result["attack"] == {"unchanged": 1.0, "iou": result["attack"]["iou"]}


@pytest.mark.parametrize(("classes", "labels"), [(1, [0, 1, 0, 0, 0]), (2, [0, -1, 0, 0, 0])])
def test_classes_out_of_range(classes, labels):
    with pytest.raises(ValueError, match=rf"y must lie in 0 ... {classes - 1}, got {min(labels)} ... {max(labels)}"):
        statistics(planted(labels=labels), HALVES, num_classes=classes)


def test_a_routed_model(make_routed, make_images, tmp_path):
    model, other = make_routed(), make_routed(router="embedding")
    x, x_adv, y = make_images(10, seed=5), make_images(10, seed=6), torch.arange(10) % 5
    result = pathway_statistics(model, x, x_adv, y, batch_size=4)
    paths = pathway(model, x)
    assert result["clean"]["distinct"] == len(paths.unique(dim=0)) > 1
    assert result["num_classes"] == 5 and result["against"] is None
    for layer, load in enumerate(result["clean"]["load"]):
        assert load == [pytest.approx((paths[:, layer] == expert).double().mean().item()) for expert in (0, 1)]
    # Flows leave a layer as its load says, and arrive as the next one's does.
    for kind in ("clean", "adversarial"):
        for at, flows in enumerate(result[kind]["flows"]):
            assert [sum(row) for row in flows] == [pytest.approx(v) for v in result[kind]["load"][at]]
            assert [sum(column) for column in zip(*flows, strict=True)] == third(*result[kind]["load"][at + 1])
    units = units_of(model)
    expected = iou(paths, pathway(model, x_adv), units, units).mean().item()
    assert result["attack"]["iou"]["mean"] == pytest.approx(expected)
    # Another model of the same banks sees the same images; the model itself has all in common.
    against = pathway_statistics(model, x, x_adv, y, against=other)["against"]
    assert against["adversarial"]["mean"] == pytest.approx(
        iou(pathway(model, x_adv), pathway(other, x_adv), units, units).mean().item()
    )
    assert pathway_statistics(model, x, x_adv, y, against=model)["against"]["clean"]["mean"] == 1
    # A mask that keeps what expert 0 uses has all in common with a pathway of zeros.
    write_masks(tmp_path, model)
    masked = pathway_statistics(model, x, x_adv, y, against=tmp_path / "masks.json")["against"]
    zeros = iou(paths, torch.zeros_like(paths), units, units)
    assert masked["clean"]["mean"] == pytest.approx(zeros.mean().item())


def write_masks(folder, model):
    """The masks of a sparse run, which keep the rows of expert 0."""
    layers = [
        {"layer": at, "of": unit.shape[1], "rows": unit[0].nonzero()[:, 0].tolist()}
        for at, unit in enumerate(units_of(model))
    ]
    (folder / "masks.json").write_text(json.dumps({"layers": layers}))


def test_tokens_of_a_transformer(tmp_path):
    torch.manual_seed(0)
    settings = {"num_classes": 3, "width": 12, "input_size": 16, "in_channels": 1}
    with torch.no_grad():
        model = create_model("deit-tiny", route_per="token", **settings).eval()
    x, y = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    result = pathway_statistics(model, x, x, y)
    assert result["tokens"] == pathway(model, x).shape[2] and result["attack"]["unchanged"] == 1
    write_masks(tmp_path, model)
    for against in (model, tmp_path / "masks.json"):
        with pytest.raises(ValueError, match="against must be left out where tokens are routed one by one"):
            pathway_statistics(model, x, x, y, against=against)


def test_what_cannot_be_traced(make_routed, make_images):
    x, y = make_images(4), torch.zeros(4).long()
    plain = create_model("resnet18", num_classes=5, width=8, input_size=16, kind="dense")
    with pytest.raises(ValueError, match="must have MoE layers"):
        pathway_statistics(plain, x, x, y)
    with pytest.raises(ValueError, match="model must have MoE layers, got Classifier with none"):
        pathway_statistics(make_routed(), x, x, y, against=plain)
    with pytest.raises(ValueError, match="against must have 8 rows in MoE layer 0, as the run has, got 16"):
        pathway_statistics(make_routed(), x, x, y, against=make_routed(width=16))


# Runs


@pytest.fixture(scope="module")
def runs(make_digits_run, tmp_path_factory):
    """Run directories: two routed ones of the same banks, one of others, a plain one, and two with masks."""
    home = tmp_path_factory.mktemp("runs")
    model = load_run(make_digits_run(home / "run"))
    for name, seed, settings in (
        ("other", 1, {"router": "embedding"}), ("wide", 2, {"width": 16}), ("plain", 3, {"kind": "s-dense"}),
        ("sparse", 4, {"kind": "dense"}), ("damaged", 5, {"kind": "dense"}),
    ):  # fmt: skip
        make_digits_run(home / name, seed, **settings)
    write_masks(home / "sparse", model)
    (home / "damaged" / "masks.json").write_text("{")
    return home


SMALL = ["--num-examples", "40", "--accelerator", "cpu"]


@pytest.mark.slow
def test_a_run_is_traced_as_a_user_does(runs, tmp_path):
    words = ["pathways", runs / "run", "--against", runs / "sparse", "--out", tmp_path / "found", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "advmoe", *map(str, words)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads((tmp_path / "found" / "pathways.json").read_text())
    assert (
        table(result) in done.stdout and f"written to {tmp_path / 'found' / 'pathways.json'} and 7 fig" in done.stdout
    )
    drawn = {path.stem for path in (tmp_path / "found").glob("*.svg")}
    kinds = ("classes-clean", "classes-adversarial", "class-iou-clean", "class-iou-adversarial")
    assert drawn == {f"pathways-{name}" for name in ("flow", *kinds, "iou-attack", "iou-against")}
    assert result["num_examples"] == 40 and result["classes"] == [str(digit) for digit in range(10)]
    assert result["attack"]["name"] == "pgd-2" and result["threat"] == {"norm": "linf", "eps": 0.1}
    assert result["data"] == {"name": "digits", "split": "test"} and result["against"]["run"] == str(runs / "sparse")
    assert result["clean"]["distinct"] > 1
    # The mask is expert 0 of every layer: in disjoint halves s of 16 layers shared, weighed by their rows.
    assert result["against"]["clean"]["mean"] == pytest.approx(zero_share(runs, result))


def zero_share(runs, result):
    """The mean IoU of the run's pathways with expert 0 everywhere, from its images."""
    subject, model = open_subject(runs / "run", num_examples=result["num_examples"]), load_run(runs / "run")
    x, _ = take(subject.data, slice(0, 40), torch.device("cpu"))
    chosen, sizes = pathway(model, x), torch.tensor([unit.sum(1)[0] for unit in units_of(model)])
    shared = ((chosen == 0) * sizes).sum(1).double()
    return (shared / (2 * sizes.sum() - shared)).mean().item()


def test_another_run_sees_the_same_images(runs, tmp_path, capsys):
    options = {"num_examples": 30, "accelerator": "cpu", "threads": 1}
    home, result = pathways_run(runs / "run", against=runs / "other", out=tmp_path / "a", **options)
    assert home == tmp_path / "a" and json.loads((home / "pathways.json").read_text()) == result
    assert result["against"]["kind"] == "pathways"
    with np.load(home / "pathways-examples.npz") as examples:
        assert examples["unchanged"].mean() == pytest.approx(result["attack"]["unchanged"])
        assert examples["index"].tolist() == open_subject(runs / "run", num_examples=30).index.tolist()
    # The numbers are those of the attack's images, however they are cut into batches of the same attack.
    opened = open_subject(runs / "run", num_examples=30, accelerator="cpu").routed_under_pgd("trace")
    (batch,) = opened.images(*opened.names)
    assert (batch[1] - batch[0]).abs().max() == pytest.approx(0.1, abs=1e-6)
    ours, theirs = dissect(opened.predict, *batch), dissect(load_run(runs / "other"), *batch)
    units = units_of(opened.predict)
    for kind, one, two in (
        ("clean", ours.clean_pathway, theirs.clean_pathway), ("adversarial", ours.adv_pathway, theirs.adv_pathway)
    ):  # fmt: skip
        assert result["against"][kind]["mean"] == pytest.approx(iou(one, two, units, units).mean().item())
    # And with itself a run has all in common; without figures none is drawn.
    words = ["pathways", runs / "run", "--against", runs / "run", "--out", tmp_path / "b", *SMALL, "--no-figure"]
    assert cli.main([str(word) for word in words]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"IoU with the pathways of {runs / 'run'}\n.*\nclean +1\.000  0\.000  1\.000", text)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["pathways-examples.npz", "pathways.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain"], "a model to trace must have MoE layers, got '.*plain' without"),
        (["run", "--against", "absent"], "--against must be a run directory"),
        (["run", "--against", "plain"], "against must be a sparse run .one that holds a masks.json. or a routed one"),
        (["run", "--against", "wide"], "against must have 8 rows in MoE layer 0, as the run has, got 16"),
        (["wide", "--against", "sparse"], "against must have 16 rows in MoE layer 0, as the run has, got 8"),
        (["run", "--against", "damaged"], "damaged/masks.json must be JSON"),
        (["run", "--attacks", "pgd-2,pgd-3"], "attacks to trace must be a single one, got pgd-2, pgd-3"),
        (["run", "--attacks", "routed"], "attacks to trace must be PGD's, got 'routed'"),
        (["run", "--num-examples", "0"], "--num-examples must be >= 1, got 0"),
        (["run", "--aganst", "x"], "--aganst is no option of pathways: did you mean --against"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(runs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    options = [] if "--num-examples" in words else ["--num-examples", "20"]
    assert cli.main(["pathways", *words, *options, "--accelerator", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(message, err)
    assert sorted(runs.rglob("*")) == before


def test_other_images_are_refused(runs, make_digits_run, tmp_path):
    folder = make_digits_run(tmp_path / "rgb")
    with torch.random.fork_rng(devices=[]):
        save_model(create_model("resnet18", num_classes=10, width=8, input_size=8), folder)
    with pytest.raises(ValueError, match=r"against must take the run's images, .* \[1, 8\], got \[3, 8\]"):
        pathways_run(runs / "run", against=folder, num_examples=20, accelerator="cpu")


def test_a_callable_is_no_module(tmp_path):
    (tmp_path / "own.py").write_text(
        "from advmoe import create_model\n"
        "def make():\n"
        "    model = create_model('resnet18', num_classes=10, in_channels=1, width=8, input_size=8).eval()\n"
        "    return lambda x: model(x)\n"
    )
    overrides = {"data": {"name": "digits", "image_size": 8}}
    with pytest.raises(ValueError, match=r"a model to trace must be a torch\.nn\.Module, got function"):
        pathways_run(f"{tmp_path / 'own.py'}:make", overrides=overrides, num_examples=5, accelerator="cpu")


def test_a_module_of_the_user_s_own(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\nfrom advmoe import create_model\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    model = create_model('resnet18', num_classes=10, in_channels=1, width=8, input_size=8).eval()\n"
        "    return torch.nn.Sequential(model)\n"
    )
    overrides = {"data": {"name": "digits", "image_size": 8}, "attack": {"steps": 1}}
    home, result = pathways_run(
        f"{tmp_path / 'own.py'}:make", overrides=overrides, num_examples=5, accelerator="cpu", out=tmp_path / "out"
    )
    assert result["num_layers"] == 16 and (home / "pathways.json").is_file()

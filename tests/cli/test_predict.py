"""`advmoe predict`, of a run and of a file that it was exported to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from advmoe import cli
from advmoe.config import Config
from advmoe.export import export_model
from advmoe.models import create_model, save_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as `predict` reads it, beside two pictures."""
    home = tmp_path_factory.mktemp("predict")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("wrn-10-1", num_classes=3, width=4, input_size=16, classes=("ant", "bee", "cat"))
    (home / "run").mkdir()
    save_model(model.eval(), home / "run")
    Config().dump(home / "run" / "config.yaml")
    for name, colour in (("a.png", (200, 10, 10)), ("b.jpg", (10, 10, 200))):
        Image.new("RGB", (40, 30), colour).save(home / name)
    return home


def predicted(capsys: Any, *args: str | Path) -> Any:
    assert cli.main(["predict", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_names_probabilities_and_pathways(run: Path, capsys: Any) -> None:
    told = predicted(capsys, run / "run", run / "a.png", run / "b.jpg")
    assert [each["image"] for each in told] == [str(run / "a.png"), str(run / "b.jpg")]
    for each in told:
        shares = [one["probability"] for one in each["classes"]]
        assert sorted(one["class"] for one in each["classes"]) == ["ant", "bee", "cat"]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
        assert set(each["pathway"]) <= {0, 1}
    assert cli.main(["predict", str(run / "run"), str(run / "a.png"), "--top", "1"]) == 0
    best = told[0]["classes"][0]
    assert capsys.readouterr().out.split() == [
        str(run / "a.png"), best["class"], f"{100 * best['probability']:.1f}", "%",
    ]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_an_exported_file_says_what_the_run_says(run: Path, capsys: Any, dynamic: bool) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from advmoe import load_run

    file = run / f"{dynamic}.onnx"
    export_model(load_run(run / "run"), file, dynamic_batch=dynamic, images=torch.rand(2, 3, 16, 16))
    pictures = (run / "a.png", run / "b.jpg")
    for ours, theirs in zip(predicted(capsys, run / "run", *pictures), predicted(capsys, file, *pictures), strict=True):
        assert theirs["pathway"] == ours["pathway"]
        for one, other in zip(ours["classes"], theirs["classes"], strict=True):
            assert one["class"] == other["class"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("model", "image", "more", "parts"),
    [
        ("run", "absent.png", [], ["an image must be", "absent.png"]),
        ("run", "run/config.yaml", [], ["an image must be", "config.yaml"]),
        ("run", "run", [], ["an image must be", "'run'"]),
        ("absent", "a.png", [], ["RUN|FILE.onnx must be a run directory", "'absent'"]),
        ("a.png", "a.png", [], ["a.png must be an ONNX file"]),
        ("run", "a.png", ["--top", "0"], ["--top must be >= 1, got 0"]),
        ("a.png", "a.png", ["--model", "x.py:make"], ["--model must go with a run"]),
    ],
)
def test_mistakes_are_one_line(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, model: str, image: str, more: list[str], parts: list[str]
) -> None:
    if model == "a.png" and not more:
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(run)
    assert cli.main(["predict", model, image, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in parts), err

"""`advmoe export`: what is passed on, how the report is shown, and mistakes. The export itself: tests/export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from advmoe import cli, export

ROOT = Path(__file__).parents[2]
REPORT = {
    "format": "onnx", "opset": 20, "bytes": 1_234_567, "computes": "the chosen experts alone", "gmacs": 0.13927,
    "input": {"name": "pixels", "shape": [1, 3, 32, 32], "type": "float32", "meaning": "pixels in [0, 1]"},
    "outputs": {"logits": [1, 10], "pathway": [1, 16]},
    "check": {
        "images": 100, "on": "random images", "pathways": 7, "largest_difference": 2.34e-6,
        "ties": [{"image": 3, "layer": 5, "gap": 1.2e-7}],
        "also": {"images": 3, "on": "images of other sizes", "pathways": 2, "largest_difference": 1e-6, "ties": []},
    },
    "time": {"pytorch_ms": 12.345, "exported_ms": 4.115, "speedup": 3.0, "threads": 2, "passes": 40},
}  # fmt: skip


def test_everything_is_passed_on_and_the_report_is_aligned_lines(monkeypatch, capsys):
    asked = []

    def export_run(*arguments, **options):
        asked.append((arguments, options))
        return Path("m.onnx"), REPORT

    monkeypatch.setattr(export, "export_run", export_run)
    words = ["runs/a", "--format", "onnx", "--opset", "20", "--threads", "2", "--num-examples", "9", "--dynamic-batch"]
    assert cli.main(["export", *words]) == 0
    ((arguments, options),) = asked
    assert arguments == ("runs/a",)
    assert options == {"format": "onnx", "opset": 20, "threads": 2, "num_examples": 9, "dynamic_batch": True}
    assert capsys.readouterr().out.splitlines() == [
        "file      onnx, opset 20, 1.2 MB, computes the chosen experts alone",
        "input     pixels 1x3x32x32 float32, pixels in [0, 1]",
        "outputs   logits 1x10, pathway 1x16",
        "GMACs     0.1393 per image",
        "check     100 random images, 7 pathways: 2.3e-06 from PyTorch",
        "tie       image 3, layer 5: another expert, whose score is 1.2e-07 less",
        "check     3 images of other sizes, 2 pathways: 1e-06 from PyTorch",
        "ms/image  PyTorch 12.3, exported 4.12: 3.00x as fast (batch 1, 2 threads,",
        "          medians of 40)",
        "",
        "written to m.onnx and m.onnx.json",
    ]


def test_a_file_that_computes_something_else_is_a_failure(monkeypatch, capsys):
    def differs(*_, **__):
        raise export.ExportFailed("it computes something else")

    monkeypatch.setattr(export, "export_run", differs)
    assert cli.main(["export", "runs/a"]) == 1
    assert capsys.readouterr() == ("", "advmoe: error: it computes something else\n")


@pytest.mark.parametrize("words", [["--opset", "17"], ["--threads", "0"], ["--num-examples", "x"]])
def test_numbers_out_of_range_are_named(capsys, words):
    assert cli.main(["export", "runs/a", *words]) == 2
    assert capsys.readouterr().err.startswith(f"advmoe: error: {words[0]} must be ")


@pytest.fixture
def run_dir(make_digits_run, tmp_path):
    return make_digits_run(tmp_path / "run")


@pytest.mark.slow
def test_the_command_in_a_process(run_dir):
    done = subprocess.run(
        [sys.executable, "-m", "advmoe", "export", run_dir, "--threads", "1", "--num-examples", "30"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((run_dir / "model.onnx.json").read_text())
    for part in (
        "computes the chosen experts alone", "input     pixels 1x1x8x8 float32, pixels in [0, 1]",
        "logits 1x10, pathway 1x16", f"check     30 test images of digits, {report['check']['pathways']} pathways",
        "(batch 1, 1 threads, medians of 40)", f"written to {run_dir / 'model.onnx'} and model.onnx.json",
    ):  # fmt: skip
        assert " ".join(part.split()) in " ".join(done.stdout.split())
    metadata = {each.key: each.value for each in onnx.load(run_dir / "model.onnx").metadata_props}
    assert json.loads(metadata["input"]) == report["input"] and json.loads(metadata["classes"]) == 10
    assert json.loads(metadata["versions"])["torch"] == torch.__version__
    assert json.loads(metadata["source"])["run"] == "run" and float(metadata["gmacs"]) == report["gmacs"]
    assert str(ROOT).encode() not in (run_dir / "model.onnx").read_bytes()
    (weights,) = [path for path in run_dir.iterdir() if path.suffix == ".safetensors"]
    assert (run_dir / "model.onnx").stat().st_size < 2 * weights.stat().st_size


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "tflite"], "format must be one of onnx, torch-export, got 'tflite'"),
        (["--opset", "17"], "--opset must be >= 18, got 17"),
        (["--opset", "99"], "opset must be >= 18 and <= "),
        (["--opset", "new"], "--opset must be a whole number, got 'new'"),
        (["--opset", "20", "--format", "torch-export"], "opset must be left out for format torch-export, got 20"),
        (["--out", "net.pt2"], "the file to write must end in .onnx for format onnx, got 'net.pt2'"),
        (["--out", "nowhere/net.onnx"], "the file to write must lie in a directory that exists, and be none"),
        (["--out", "/proc/net.onnx"], "the file to write must be where files can be written, got '/proc'"),
        (["--num-examples", "0"], "--num-examples must be >= 1, got 0"),
        (["--threads", "0"], "--threads must be >= 1, got 0"),
        (["--dynamic-bach"], "--dynamic-bach is no option of export: did you mean --dynamic-batch?"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(run_dir, capsys, monkeypatch, words, message):
    monkeypatch.chdir(run_dir)
    before = sorted(path.name for path in run_dir.iterdir())
    assert cli.main(["export", str(run_dir), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"advmoe: error: {message}") and err.count("\n") == 1
    assert sorted(path.name for path in run_dir.iterdir()) == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra_is_named(run_dir, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["export", str(run_dir)]) == 2
    err = capsys.readouterr().err
    assert "format onnx needs the extra export: pip install 'advmoe[export]', got: " in err and err.count("\n") == 1
    assert not list(run_dir.glob("model.onnx*"))

"""`advmoe export`: what is passed on, and how the report is shown. The export itself is in tests/test_export.py."""

from pathlib import Path

import pytest

from advmoe import cli, export

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

"""`advmoe cost`: a table on stdout, and the same figures as JSON where a file is asked for."""

import json

from advmoe import cli
from advmoe.evaluation.cost_report import table

WORDS = ["cost", "vgg16", "--width", "4", "--input-size", "16", "--batch", "1, 2", "--seconds", "0", "--threads", "1"]


def test_a_backbone_is_measured_as_asked(tmp_path, capsys):
    path = tmp_path / "new" / "cost.json"
    assert cli.main([*WORDS, "--router", "image", "--num-classes", "7", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert capsys.readouterr().out == f"{table(report)}\nwritten to {path}\n"
    assert list(report["models"]) == ["moe", "s-dense", "dense"]
    assert [entry["batch"] for entry in report["batches"]] == [1, 2]
    assert (report["model"]["router"], report["model"]["num_classes"], report["threads"]) == ("image", 7, 1)


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*WORDS[:-2], "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "written to" not in out and err == "" and list(tmp_path.iterdir()) == []

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from advmoe import cli
from advmoe.config import Config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a moment, really trained."""
    from advmoe.training.run import train

    values = {
        "data": {"name": "digits"}, "model": {"width": 4}, "threat": {"eps": 0.1}, "attack": {"steps": 2},
        "training": {"epochs": 1, "batch_size": 512, "attack_steps": 1, "val_attack_steps": 1},
    }  # fmt: skip
    return train(Config.from_dict(values), run_dir=tmp_path_factory.mktemp("runs") / "digits", threads=1)


@pytest.fixture
def report(capsys, tmp_path, monkeypatch):
    """Runs the command in a folder of its own: its exit code, and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code = cli.main(["report", *map(str, args)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def bare(tmp_path):
    """A run directory that holds a configuration alone."""
    (tmp_path / "bare").mkdir()
    Config().dump(tmp_path / "bare" / "config.yaml")


@pytest.mark.slow
def test_a_trained_run_gets_its_gallery_once(trained, report, tmp_path):
    told = report(str(trained), "-o", "out/page.html", "--threads", "1")
    assert told == (0, "written to out/page.html, its figures to out/page-figures\n", "")
    text = (tmp_path / "out" / "page.html").read_text()
    assert text.count('<li class="card">') == 8
    assert f"advmoe report {trained} -o out/page.html --threads 1" in text
    with np.load(trained / "gallery.npz") as found:
        assert np.abs(found["adversarial"].astype(float) - found["clean"]).max() <= 0.1 + 1e-3  # float16
    made = (trained / "gallery.npz").stat().st_mtime_ns
    assert cli.main(["report", str(trained), "-o", str(tmp_path / "again.html")]) == 0
    assert (trained / "gallery.npz").stat().st_mtime_ns == made
    assert (tmp_path / "again.html").read_text().count('<li class="card">') == 8

    # Of other weights than are there now it is no picture.
    weights = load_file(trained / "model.safetensors")
    save_file({name: value + 0 if value.is_floating_point() else value + 1 for name, value in weights.items()},
              trained / "model.safetensors")  # fmt: skip
    assert cli.main(["report", str(trained), "-o", str(tmp_path / "again.html"), "--no-gallery"]) == 0
    assert '<li class="card">' not in (tmp_path / "again.html").read_text()
    assert cli.main(["report", str(trained), "-o", str(tmp_path / "again.html")]) == 0
    assert (trained / "gallery.npz").stat().st_mtime_ns > made


def test_no_gallery_where_none_is_wanted(report, bare):
    assert report("bare", "--no-gallery") == (0, "written to report.html\n", "")
    assert "No gallery could be made" not in Path("report.html").read_text()


def test_why_there_is_no_gallery_is_a_note_and_no_error(report, bare):
    code, out, err = report("bare", "--title", "A <title>")
    reason = "a run directory must hold model.json, got 'bare'"
    assert (code, out, err) == (0, "written to report.html\n", f"note  no gallery of bare: {reason}\n")
    text = Path("report.html").read_text()
    assert f"No gallery could be made: {reason}" in text and "<h1>A &lt;title&gt;</h1>" in text
    assert not Path("bare/gallery.npz").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: RUN_OR_STUDY"),
        (
            ["absent"],
            "RUN_OR_STUDY must be a run directory (one that holds a config.yaml) or a study (a study.json), got",
        ),
        (["bare", "absent"], "got 'absent'"),
        (["bare", "-o", "page.pdf"], "path must be a file ending in .html, got 'page.pdf'"),
        (["bare", "-o", "bare/config.yaml/page.html", "--no-gallery"], "path must be where files can be written"),
        (["bare", "--data.workers", "-1"], "data.workers must be >= 0, got -1"),
        (["bare", "--threads", "0"], "--threads must be >= 1, got 0"),
        (["bare", "--accelerator", "tpu"], "--accelerator must be one of auto, cpu, cuda, got 'tpu'"),
        (["bare", "--no-galery"], "--no-galery is no option of report: did you mean --no-gallery?"),
    ],
)
def test_a_mistake_is_one_line_and_creates_nothing(report, bare, args, message):
    code, out, err = report(*args)
    assert (code, out) == (2, "")
    assert err.startswith("advmoe: error: ") and err.count("\n") == 1 and message in err
    assert sorted(map(str, Path().rglob("*"))) == ["bare", "bare/config.yaml"]

"""What a run or a backbone costs beside its Dense and S-Dense forms."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from torch import nn

from advmoe import cli, to_moe
from advmoe.config import Config
from advmoe.evaluation.cost import activation_bytes, gmacs, parameters
from advmoe.evaluation.cost_report import cost_report, fit_norms, random_images, table
from advmoe.evaluation.subject import Options, open_subject
from advmoe.models import BACKBONES, create_model, save_model
from advmoe.moe import pathway, routers_of
from advmoe.ops import kernels_used

SMALL = {"width": 8, "input_size": 16}
MANY = 16  # few enough to be quick, enough for untrained routers to tell some apart
QUICK = {"batches": (1, MANY), "threads": 1, "seconds": 0}


def check(report, kinds):
    """That the figures of a report agree with one another."""
    assert list(report["models"]) == kinds and [entry["batch"] for entry in report["batches"]] == [1, MANY]
    for entry in report["batches"]:
        times = entry["ms_per_image"]
        assert list(times) == list(entry["activation_bytes"]) == kinds and entry["repeats"] >= 3
        for kind, (low, high) in entry["range_ms_per_image"].items():
            assert 0 < low <= times[kind] <= high
        for reference, ratios in entry["ratio_to"].items():
            assert set(ratios) == set(kinds) - {reference}
            for kind, ratio in ratios.items():
                assert ratio == pytest.approx(times[kind] / times[reference], rel=2e-2, abs=1e-3)
        for shares in entry.get("loads", []):
            assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert json.loads(json.dumps(report)) == report
    shown = table(report).splitlines()
    for entry in report["batches"]:
        for kind, milliseconds in entry["ms_per_image"].items():
            assert any(line.split()[:3] == [str(entry["batch"]), kind, f"{milliseconds:.4g}"] for line in shown)


@pytest.mark.parametrize("name", [*BACKBONES, "wrn-10-1"])
def test_every_backbone(name, shallow_backbones):
    report = cost_report(name, model=SMALL, **QUICK)
    check(report, ["moe", "s-dense", "dense"])
    for kind, figures in report["models"].items():
        model = create_model(name, kind=kind, num_classes=10, **SMALL)
        assert figures["gmacs"] == pytest.approx(gmacs(model), abs=1e-6)
        assert (figures["parameters"], figures["active_parameters"]) == parameters(model)
        if kind != "moe":  # whose take depends on the routing
            x = torch.rand(MANY, 3, 16, 16).contiguous(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)
            assert report["batches"][1]["activation_bytes"][kind] == activation_bytes(model, x)
    assert (report["precision"], report["kernels"]) == ("fp32, channels-last, eval mode", kernels_used())
    assert "kernels: " in " ".join(table(report).split())
    assert report["images"] == "random images" and "untrained" in report["weights"]
    loads = report["batches"][1]["loads"]
    assert any(max(shares) < 1 for shares in loads), "with one pathway for all nothing would be dispatched"
    assert report["batches"][1]["busiest"] == pytest.approx(sum(map(max, loads)) / len(loads), abs=1e-3)


def test_fitted_norms_hold_the_statistics_of_the_images():
    model, images = create_model("resnet18", num_classes=3, **SMALL), random_images((3, 16, 16), 64)
    router, seen = next(routers_of(model)), []
    router.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit_norms(model, images)
    assert not any(module.training for module in model.modules())
    assert router.norm.momentum == 0.1
    means = torch.stack([part.mean(0) for part in seen])
    torch.testing.assert_close(router.norm.running_mean, means.mean(0))


def save(folder, config=None, **kwargs):
    """A run directory with a model of digits, 8x8."""
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, width=8, input_size=8, in_channels=1, **kwargs)
    fit_norms(model, random_images((1, 8, 8), 64))
    folder.mkdir()
    save_model(model, folder)
    if config is not None:
        Config.from_dict(config).dump(folder / "config.yaml")
    return model


def test_a_run_is_timed_on_its_own_images(tmp_path):
    model = save(tmp_path / "run", {"data": {"name": "digits", "image_size": 8}}, num_experts=3)
    report = cost_report(tmp_path / "run", **QUICK)
    check(report, ["moe", "s-dense", "dense"])
    assert (report["weights"], report["images"]) == ("the run's", "test images of digits")
    assert report["model"]["num_experts"] == 3
    images = open_subject(tmp_path / "run", num_examples=MANY, seed=0).data.pixels(slice(0, MANY))
    chosen = pathway(model, images)
    expected = [[(layer == expert).float().mean().item() for expert in range(3)] for layer in chosen.T]
    for shares, counted in zip(report["batches"][1]["loads"], expected, strict=True):
        assert shares == pytest.approx(counted, abs=1e-4)  # rounded to four places
    assert len({tuple(shares) for shares in expected}) > 1
    assert report["batches"][0]["busiest"] == 1


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "the run has no config.yaml"),
        ({"data": {"name": "folder", "root": "nowhere"}}, "nowhere"),
        ({"data": {"name": "cifar10", "root": "nowhere", "download": True}}, "data.download"),
        ({"data": {"name": "digits", "image_size": 16}}, "the model takes images of 8 x 8, got (16, 16)"),
    ],
    ids=["no config", "no data", "no download", "other size"],
)
def test_without_the_runs_images_the_report_says_so(tmp_path, config, why):
    save(tmp_path / "run", config, kind="s-dense")
    report = cost_report(tmp_path / "run", **QUICK)
    check(report, ["s-dense", "dense"])
    assert report["images"].startswith("random images, not the run's (") and why in report["images"]
    assert "loads" not in report["batches"][0]


OWN = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
"""


def test_a_network_of_the_users_own_is_timed_beside_itself(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    model = to_moe(plain, example=torch.rand(4, 3, 8, 8))
    save_model(model, tmp_path)
    report = cost_report(tmp_path, source=f"{tmp_path / 'own.py'}:net", **QUICK)
    check(report, ["moe", "dense"])
    dense = 6 * 6 * 27 * 8 + 4 * 4 * 72 * 8 + 8 * 4
    assert report["models"]["dense"]["gmacs"] == pytest.approx(dense / 1e9, abs=1e-6)
    assert report["models"]["moe"]["active_parameters"] > report["models"]["dense"]["parameters"]
    with pytest.raises(ValueError, match="--model"):
        cost_report(tmp_path, **QUICK)


def test_options_are_those_of_every_measurement():
    report = cost_report("vgg16", Options(accelerator="cpu", threads=1), batches=[1, MANY], seconds=0, model=SMALL)
    check(report, ["moe", "s-dense", "dense"])
    assert (report["device"], report["threads"]) == ("cpu", 1)
    with pytest.raises(ValueError, match="data and --model must be left out for a backbone"):
        cost_report("vgg16", Options(source="net.py:net"), model=SMALL)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    command = ["cost", "vgg16", "--width", "8", "--input-size", "16", "--batch", f"1,{MANY}", "--seconds", "0"]
    words = [
        *command,
        "--threads",
        "1",
        "--router",
        "image",
        "--num-classes",
        "7",
        "--out",
        str(tmp_path / "a" / "b.json"),
    ]
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(words) == 0
    report = json.loads((tmp_path / "a" / "b.json").read_text())
    check(report, ["moe", "s-dense", "dense"])
    assert out.getvalue() == f"{table(report)}\nwritten to {tmp_path / 'a' / 'b.json'}\n"
    assert (report["model"]["router"], report["model"]["num_classes"], report["threads"]) == ("image", 7, 1)


KNOWN = f"a backbone, one of {BACKBONES.known()}"
MISTAKES = [
    (["cost", "resnet19"], f"RUN_OR_NAME must be a run directory (one that holds a model.json) or {KNOWN}"),
    (["cost", "wrn-27-10"], "model.name wrn-D-K must have D = 6n + 4"),
    (["cost", "resnet18", "--batch", "1,0"], "--batch must be >= 1, got 0"),
    (["cost", "resnet18", "--batch", ","], "--batch must be batch sizes separated by commas, got ','"),
    (["cost", "resnet18", "--device", "tpu"], "--device must be one of cpu, cuda, got 'tpu'"),
    (["cost", "resnet18", "--seconds", "-1"], "--seconds must be >= 0, got -1.0"),
    (["cost", "resnet18", "--seconds", ".inf"], "--seconds must be >= 0 and <= 86400, got inf"),
    (["cost", "resnet18", "--scale", "0"], "--scale must be > 0 and <= 1, got 0.0"),
    (["cost", "resnet18", "--data.root", "x"], "data and --model must be left out for a backbone"),
    (["cost", "resnet18", "--out", "."], "--out must be a file to write"),
    (["cost", "run", "--width", "8"], "width must be left out for a run, which has its model, got run"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:30])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "run")
    assert cli.main([*words, "--out", "made.json"] if "--out" not in words else words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("advmoe: error: ") and err.count("\n") == 1 and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

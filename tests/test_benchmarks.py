"""The benchmarks run, as real processes at tiny sizes, and report what they measured. No time is asserted."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from advmoe.models import BACKBONES, save_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = ("--threads", "1", "--width", "8", "--batch", "8", "--image-size", "16", "--repeats", "2", "--settle", "5")


def run(script: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`benchmarks/gpu.py` as a module, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield import_module("gpu")
    torch.set_num_threads(threads)


def check(line: dict[str, Any], batch: int, width: int = 8) -> None:
    """What every line must hold, and that its figures agree with one another."""
    medians = line["medians_ms"]
    assert line["what"] and line["measured"]
    assert {"torch", "python", "advmoe"} == set(line["versions"])
    assert {"cpu", "device", "cores", "load_average", "bf16_units"} <= set(line["hardware"])
    assert "git_commit" in line
    setting = line["setting"]
    assert {"width", "batch", "threads", "repeats", "precision", "memory_format"} <= set(setting)
    assert (setting["width"], setting["batch"], setting["threads"]) == (width, batch, 1)
    for side, median in medians.items():
        low, high = line["range_ms"][side]
        assert 0 < low <= median <= high
    for name, ratio in line["ratios"].items():
        top, bottom = name.split("/")
        ours = next((side for side in medians if side.startswith("ours") and ":" not in side), None)
        quotient = medians[ours if top == "ours" else top] / medians[ours if bottom == "ours" else bottom]
        assert ratio == pytest.approx(quotient, abs=1e-4)
    for target in line["targets"]:
        ratio = line["ratios"][target["ratio"]]
        assert target["met"] == (ratio <= target["at_most"] if "at_most" in target else ratio >= target["at_least"])
    for each in line["loads"].values():
        assert len(each) == 16 and all(sum(shares) == pytest.approx(1, abs=2e-3) for shares in each)
    if batch > 1:  # one pathway for all would need no dispatch
        assert all(min(shares) > 0 for shares in line["loads"]["eval"])


def test_speed_prints_one_line_a_result(tmp_path: Path) -> None:
    done = run("speed.py", *TINY, "--out", "lines/speed.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines" / "speed.jsonl").read_text() == done.stdout
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    names = ["forward-batch-8", "forward-batch-1", "step", "plain-bf16-mixed", "plain-32-true"]
    assert list(lines) == names
    for name, line in lines.items():
        check(line, 1 if name == "forward-batch-1" else 8)
    assert {target["ratio"] for target in lines["forward-batch-8"]["targets"]} == {"moe/s-dense", "dense/moe"}
    parts = {"advmoe: routers level", "advmoe: experts level", "advmoe: one attack", "at-moe", "at-s-dense: one attack"}
    assert {f"{part}/at-s-dense" for part in parts} < set(lines["step"]["ratios"])
    for name in names[3:]:
        assert lines[name]["largest_logit_difference_fp32"] < 1e-4
        assert lines[name]["setting"]["memory_format"] == {"ours": "channels_last", "plain": "contiguous"}


def test_backbones_prints_one_line_each_and_their_table(tmp_path: Path) -> None:
    done = run("backbones.py", *TINY, "--width", "20", "--out", "lines.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines.jsonl").read_text() == done.stdout
    lines = {line["backbone"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == {*BACKBONES, "wrn-28-10"}
    for name, line in lines.items():
        loads = line.pop("loads")["eval"]
        check(line | {"loads": {"eval": 16 * loads[:1]}}, 8, width=20)
        assert loads and all(sorted(shares) == [0.5, 0.5] for shares in loads)
        targets = {target["ratio"]: target.get("at_most", target.get("at_least")) for target in line["targets"]}
        saving = {"densenet40": {"dense/moe": 1.5}, "deit-tiny": {}}.get(name, {"dense/moe": 2})
        assert targets == {"moe/s-dense": 1.3, **saving}
        assert line["gmacs"]["s-dense"] <= line["gmacs"]["moe"] < line["gmacs"]["dense"]
        assert line["parameters"]["moe"]["active"] < line["parameters"]["moe"]["stored"]
    again = lines["vgg16"] | {"ratios": {"moe/s-dense": 1.25, "dense/moe": 3}}
    again["targets"] = [{"ratio": "moe/s-dense", "at_most": 1.3, "met": True}]
    again["medians_ms"] |= {"moe": 16.0, "dense": 24.0, "s-dense": 12.8, "dense compiled": 8.0, "moe compiled": 4.0}
    again["gmacs"] = {"dense": 0.3138, "s-dense": 0.0789, "moe": 0.07912}
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    shown = run("backbones.py", "--markdown", "lines.jsonl", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    caption, _, head, rule, *rows = shown.stdout.splitlines()
    assert caption.startswith("Batch 8, 1 threads, fp32, PyTorch ") and len(rows) == len(lines)
    assert head.count("|") == rule.count("|") == 7 and head.endswith("| ms/image with `torch.compile` |")
    # The last line of a backbone counts: 24, 12.8 and 16 ms are 3, 1.6 and 2 for each of 8 images.
    assert "| vgg16, 16x16 | 0.314 / 0.0789 / 0.0791 | 3 / 1.6 / 2 | 1.25 | 3.00 | 1 / - / 0.5 |" in rows


def test_backbones_times_compiled_models_too(tmp_path: Path) -> None:
    done = run("backbones.py", *TINY, "--only", "vgg16", "--compile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert "not_compiled" not in line
    assert {f"{kind} compiled/{kind}" for kind in ("dense", "s-dense", "moe")} < set(line["ratios"])


def test_backbones_names_a_mistake(tmp_path: Path) -> None:
    done = run("backbones.py", "--only", "resnet18,wrn-27-1", cwd=tmp_path)
    assert done.returncode == 2 and "--only: model.name wrn-D-K must have" in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_speed_refuses_an_unknown_result(tmp_path: Path) -> None:
    done = run("speed.py", "--only", "forward,stride", cwd=tmp_path)
    assert done.returncode == 2 and "--only must name some of forward, step, plain, got stride" in done.stderr
    assert done.stdout == ""


def test_attacks_reports_pgd_and_autoattack(tmp_path: Path, make_routed: Any, make_images: Any) -> None:
    pytest.importorskip("pyautoattack")
    model, images = make_routed(num_classes=10), (255 * make_images(6)).byte()
    (tmp_path / "run").mkdir()
    save_model(model, tmp_path / "run")
    classes = model(images / 255).argmax(1).tolist()
    # Each image as its class, so that there is something to attack, and one image as every class, so that all exist.
    labelled = [*zip(images, classes, strict=True), *((images[0], k) for k in range(10))]
    for part in ("train", "test"):
        for number, (image, label) in enumerate(labelled):
            path = tmp_path / "images" / part / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    args = ["--only", "pgd,autoattack", "--steps", "2", "--run", "run", "--root", "images", "--num-examples", "4"]
    done = run("attacks.py", *TINY, *args, "--out", "lines.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines.jsonl").read_text() == done.stdout
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["pgd-moe", "pgd-s-dense", "autoattack"]
    check(lines["pgd-moe"], 8)
    for name, line in lines.items():
        for target in line["targets"]:
            assert target["met"] == (line["ratios"][target["ratio"]] >= target["at_least"])
        for side, median in line["medians_ms"].items():
            expected = 1000 * line["setting"]["batch"] / median
            assert line["images_per_second"][side] == pytest.approx(expected, abs=1e-2), name
    found = lines["autoattack"]
    assert found["setting"]["batch"] == 4 and found["setting"]["memory_format"]["plain"] == "contiguous"
    robust = found["robust_accuracy"]
    assert set(robust) == {"ours", "plain", "ours, two processes"} <= set(found["medians_ms"])
    assert found["same_robust_accuracy"] == (len({round(4 * share) for share in robust.values()}) == 1)
    assert all(0 <= share <= found["clean_accuracy"] <= 1 for share in robust.values())


def test_attacks_needs_a_run_for_autoattack(tmp_path: Path) -> None:
    done = run("attacks.py", "--only", "autoattack", cwd=tmp_path)
    assert done.returncode == 2 and "--run must name a run directory for autoattack, got None" in done.stderr


def test_gpu_smoke_measures_trains_evaluates_and_packs(tmp_path: Path, gpu: ModuleType) -> None:
    done = run("gpu.py", "--smoke", "--out", "flat", "--seed", "3", "--accelerator", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    flat = tmp_path / "flat"
    names = ["results.json", "weights-advmoe.safetensors", "weights-at-s-dense.safetensors"]
    assert sorted(path.name for path in flat.iterdir()) == names
    results = json.loads((flat / "results.json").read_text())
    assert {"hardware", "versions", "git_commit", "cpu", "device", "command", "data", "wall_seconds"} <= set(results)
    assert results["seed"] == 3 and "--smoke" in results["command"]
    assert len(results["speed"]) == 5
    for line in results["speed"]:
        check(line, 1 if line["name"] == "forward-batch-1" else 8)
    assert [entry["method"] for entry in results["runs"]] == ["advmoe", "at-s-dense"]
    for entry in results["runs"]:
        assert entry["status"] == "finished" and entry["error"] is None, entry
        assert entry["epochs"] == entry["epochs_done"] == len(entry["seconds_per_epoch"]) == 1
        assert entry["config"]["training"]["seed"] == 3 and entry["manifest"]["finished"]
        evaluation = entry["evaluation"]
        expected = {"pgd-50", "pgd-50-soft"} if entry["method"] == "advmoe" else {"pgd-50"}
        assert set(evaluation["robust_accuracy"]) == expected and evaluation["num_examples"] == 32
        assert entry["weights"] == [f"weights-{entry['method']}.safetensors"]
        assert entry["weights_predict_alike"] > 0.9
        model = gpu.load_weights([flat / entry["weights"][0]])
        assert model.spec["kind"] == ("moe" if entry["method"] == "advmoe" else "s-dense")
        assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--resume"], "--resume must find a run to continue in --runs, got 'runs/gpu'"),
        (["--set", "training.lr=-1"], "training.lr must be > 0, got -1"),
        (["--set", "lr"], "--set must be GROUP.FIELD=VALUE, got 'lr'"),
        (["--archive", "absent.tar.xz"], "absent.tar.xz"),
    ],
)
def test_gpu_reports_mistakes_in_one_line(
    tmp_path: Path,
    gpu: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["--smoke", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gpu.py: error: ") and text in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_gpu_stops_at_an_epoch_and_continues_exactly(tmp_path: Path, gpu: ModuleType) -> None:
    small = [
        "--smoke",
        "--epochs",
        "2",
        "--methods",
        "at-s-dense",
        "--set",
        "data.image_size=8",
        "--accelerator",
        "cpu",
    ]
    weights, statuses = {}, []
    for name, cuts in (("whole", [math.inf]), ("cut", [1, math.inf])):
        options = gpu.parse([*small, "--runs", str(tmp_path / name), "--out", str(tmp_path)])
        directory = tmp_path / name / "at-s-dense"
        config = gpu.make_config("at-s-dense", options)
        dataset = gpu.load(config)
        for epochs in cuts:

            class Counted(gpu.Budget):
                """No time left after a number of epochs."""

                def left(self, epochs: float = epochs, directory: Path = directory) -> float:
                    return math.inf if len(gpu.metrics(directory)) < epochs else -1.0

            entry = gpu.run_method("at-s-dense", config, dataset, Counted(None), options)
            statuses.append((entry["status"], entry["epochs_done"], entry["evaluation"] is not None))
        weights[name] = load_file(directory / "model.safetensors")
    # Without time left, no evaluation: here the budget keeps nothing in reserve for it.
    assert statuses == [("finished", 2, True), ("stopped", 1, False), ("finished", 2, True)]
    assert all(torch.equal(tensor, weights["cut"][name]) for name, tensor in weights["whole"].items())


def test_gpu_starts_nothing_without_time_and_refuses_other_settings(
    tmp_path: Path, gpu: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--smoke", "--no-speed", "--methods", "at-s-dense", "--accelerator", "cpu", "--out", str(tmp_path / "flat")]
    args += ["--runs", str(tmp_path / "runs"), "--minutes", "0"]
    assert gpu.main(args) == 0
    results = json.loads((tmp_path / "flat" / "results.json").read_text())
    assert [(entry["status"], entry["epochs_done"]) for entry in results["runs"]] == [("not started", 0)]
    assert results["speed"] == []
    run_dir = tmp_path / "runs" / "at-s-dense"
    run_dir.mkdir()
    gpu.make_config("at-s-dense", gpu.parse([*args, "--seed", "1"])).dump(run_dir / "config.yaml")
    assert gpu.main(args) == 2
    assert "holds a run with other settings: training.seed" in capsys.readouterr().err


def test_weights_are_split_over_files_and_read_back(tmp_path: Path, gpu: ModuleType) -> None:
    model = gpu.create_model("resnet18", num_classes=3, width=8, router="image")
    names = gpu.save_weights(model, tmp_path, "w", limit=50_000)
    assert names == [f"w-{number}-of-{len(names)}.safetensors" for number in range(1, len(names) + 1)]
    assert len(names) > 2
    found = gpu.load_weights(tmp_path / name for name in names)
    assert found.spec == model.spec
    for name, tensor in model.state_dict().items():
        expected = tensor.half().to(tensor.dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
        assert torch.equal(found.state_dict()[name], expected), name


def archive(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:xz") as file:
        for member in members:
            member.size = 1 if member.isfile() else 0
            file.addfile(member, io.BytesIO(b"x") if member.isfile() else None)
    return path


def link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "bad",
    [
        tarfile.TarInfo("../outside.jpg"),
        tarfile.TarInfo("/outside.jpg"),
        tarfile.TarInfo("train/../../x"),
        link("train/y"),
    ],
    ids=["parent", "absolute", "inner-parent", "link"],
)
def test_archive_with_a_member_outside_is_refused(tmp_path: Path, gpu: ModuleType, bad: tarfile.TarInfo) -> None:
    path = archive(tmp_path / "images.tar.xz", [tarfile.TarInfo("train/cat/0.jpg"), bad])
    with pytest.raises(ValueError, match="--archive must hold plain files and folders at relative paths") as error:
        gpu.unpack(path, tmp_path / "root")
    assert repr(bad.name) in str(error.value)
    assert [each.name for each in tmp_path.iterdir()] == ["images.tar.xz"]


def test_archive_is_unpacked_once(tmp_path: Path, gpu: ModuleType) -> None:
    names = ["train/cat/0.jpg", "test/cat/0.jpg"]
    path = archive(tmp_path / "images.tar.xz", [tarfile.TarInfo(name) for name in names])
    root = tmp_path / "data" / "images"
    gpu.unpack(path, root)
    assert sorted(str(each.relative_to(root)) for each in root.rglob("*.jpg")) == sorted(names)
    assert [each.name for each in root.parent.iterdir()] == ["images"]
    (root / names[0]).write_text("kept")
    gpu.unpack(path, root)
    assert (root / names[0]).read_text() == "kept"


def test_data_measures_decoding_and_waiting(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "samples.tar", "w") as tar:
        for number in range(4):
            made = io.BytesIO()
            Image.effect_noise((60 + number, 50), 80).save(made, "jpeg")
            member = tarfile.TarInfo(f"n0000000{number % 2}_thing_{number}.JPEG")
            member.size = len(made.getvalue())
            tar.addfile(member, io.BytesIO(made.getvalue()))
    sizes = ["--threads", "1", "--width", "8", "--batch", "4", "--image-size", "16", "--repeats", "1", "--copies", "2"]
    done = run("data.py", *sizes, "--samples", "samples.tar", "--out", "lines.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines.jsonl").read_text() == done.stdout
    lines = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["decode", "workers", "wait-digits", "wait-imagenet"]
    for name, images in (("decode", 4), ("workers", 8)):
        line = lines[name]
        assert line["setting"]["images"] == images
        for side, median in line["medians_ms"].items():
            assert line["images_per_second"][side] == pytest.approx(1000 * images / median, abs=0.1)
    # Widths 60 to 63, height 50: 61.5 * 50 pixels on average.
    assert lines["decode"]["megapixels"] == pytest.approx(61.5 * 50 / 1e6, abs=1e-4)
    for name, images in (("wait-digits", 1298), ("wait-imagenet", 8)):
        line = lines[name]
        assert line["setting"]["images"] == images
        assert 0 < line["medians_ms"]["epoch: waiting"] < line["medians_ms"]["epoch"]
        (target,) = line["targets"]
        assert target["met"] == (line["ratios"]["epoch: waiting/epoch"] <= 0.05)


def test_data_needs_samples_for_all_but_digits(tmp_path: Path) -> None:
    done = run("data.py", "--only", "decode", cwd=tmp_path)
    assert done.returncode == 2 and "--samples must name a tar file of images for decode, got None" in done.stderr

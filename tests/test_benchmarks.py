"""The benchmarks run, as real processes at tiny sizes, and report what they measured. No time is asserted."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
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
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`benchmarks/device.py` as a module, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield import_module("device")
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


def test_device_smoke_has_a_line_for_everything(tmp_path: Path) -> None:
    done = run("device.py", "--smoke", "--seed", "3", "--accelerator", "cpu", "--out", "flat", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (file,) = (tmp_path / "flat").iterdir()
    assert file.read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    phases = ["about", "steps", "compiled", "tests", "layers", "plans", "larger", "training"]
    assert [line["phase"] for line in lines if line.get("name") == "end"] == phases
    assert not [line for line in lines if line.get("error")]
    by_phase = {phase: [line for line in lines if line["phase"] == phase] for phase in phases}
    first, ceilings, _ = by_phase["about"]
    assert first["seed"] == 3 and {"versions", "hardware", "git_commit", "device"} <= set(first)
    assert min(ceilings["copy_bytes_per_s"], ceilings["bf16_flops_per_s"]) > 0
    assert by_phase["tests"][0]["finished"] and by_phase["tests"][0]["skipped"] > 0  # there is no GPU
    steps = [line for line in [*by_phase["steps"], *by_phase["compiled"]] if "ms" in line]
    names = {"at s-dense", "at masked", "advmoe dispatch", "advmoe masked", "advmoe compiled"}
    assert names <= {line["name"] for line in steps}
    for line in steps:
        low, high = line["range_ms"]
        assert 0 < low <= line["ms"] <= high and line["over_s_dense"] > 0
    agreeing = [line["terms"]["experts"]["ce"] for line in steps if line["name"].startswith("advmoe")]
    assert len(agreeing) == 3 and max(agreeing) - min(agreeing) < 0.05 * min(agreeing)
    assert {line["batch"] for line in by_phase["larger"] if "ms" in line} == {16}
    assert {line["name"] for line in by_phase["layers"]} >= {"one expert", "dispatch", "masked"}
    evaluation, epochs, _ = by_phase["training"]
    assert evaluation["ended"] is None
    assert len(epochs["epochs"]) == epochs["configuration"]["epochs"] == 1
    assert evaluation["num_examples"] == 32 and 0 <= evaluation["worst_case"] <= evaluation["clean_accuracy"] <= 1


def test_device_keeps_what_a_phase_measured_until_its_cap(tmp_path: Path, device: ModuleType) -> None:
    def endless(bench: Any) -> Iterator[dict[str, Any]]:
        yield {"name": "one"}
        while True:
            time.sleep(0.01)

    def broken(bench: Any) -> Iterator[dict[str, Any]]:
        yield from ()
        raise RuntimeError("no such kernel")

    def good(bench: Any) -> Iterator[dict[str, Any]]:
        yield {"name": "two"}

    for name, phase in {"endless": endless, "broken": broken, "good": good}.items():
        device.PHASES[name], device.CAPS[name] = phase, 0.03
    try:
        bench = device.Bench(device.parse(["--smoke", "--accelerator", "cpu"]), tmp_path / "lines.jsonl")
        assert [device.run(bench, name) for name in ("endless", "broken", "good")] == [False, False, True]
    finally:
        for name in ("endless", "broken", "good"):
            del device.PHASES[name], device.CAPS[name]
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["name"]) for line in lines] == [
        ("endless", "one"), ("endless", "end"), ("broken", "end"), ("good", "two"), ("good", "end"),
    ]  # fmt: skip
    errors = [line["error"] for line in lines if line["name"] == "end"]
    assert errors[0].startswith("OverCap: ") and errors[1] == "RuntimeError: no such kernel" and errors[2] is None


def test_device_tells_of_a_phase_that_died(tmp_path: Path, device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does whose GPU is lost: what it wrote stays, and the others go on."""
    script = tmp_path / "phase.py"
    script.write_text("import os, sys\nif sys.argv[2] == 'steps': os.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(device, "__file__", str(script))
    bench = device.Bench(device.parse(["--smoke", "--accelerator", "cpu"]), tmp_path / "lines.jsonl")
    assert [device.apart(bench, name) for name in ("about", "steps")] == [True, False]
    (line,) = map(json.loads, bench.out.read_text().splitlines())
    assert (line["phase"], line["name"], line["error"]) == ("steps", "end", "ended with exit code -9")


def test_device_packs_the_first_images_of_each_class(tmp_path: Path, device: ModuleType) -> None:
    source = tmp_path / "images.tar"
    with tarfile.open(source, "w") as file:
        for split in ("test", "train"):
            for at, each in enumerate(("cat", "dog")):
                for number in range(3):
                    color = (100 * at, 10 * number, 200 * (split == "test"))
                    buffer = io.BytesIO()
                    Image.new("RGB", (4, 4), color).save(buffer, "png")
                    member = tarfile.TarInfo(f"{split}/{each}/{number}.png")
                    member.size = len(buffer.getvalue())
                    file.addfile(member, io.BytesIO(buffer.getvalue()))
    packed = tmp_path / "new" / "images.safetensors"
    device.pack(source, packed, train=4, test=2)
    tensors = load_file(packed)
    assert tensors["train"].shape == (4, 3, 4, 4) and tensors["train_labels"].tolist() == [0, 0, 1, 1]
    assert tensors["train"][:, :, 0, 0].tolist() == [[0, 0, 0], [0, 10, 0], [100, 0, 0], [100, 10, 0]]
    assert tensors["test"][:, :, 3, 3].tolist() == [[0, 0, 200], [100, 0, 200]]
    device.pack(source, packed, train=6, test=4)
    dataset = device.packed(packed)
    assert dataset.classes == ("cat", "dog") and (len(dataset.train), len(dataset.test)) == (6, 4)
    with pytest.raises(ValueError, match="--pack must hold 4 images in train/cat, got 3"):
        device.pack(source, packed, train=8, test=2)


def test_device_reports_mistakes_in_one_line(tmp_path: Path) -> None:
    done = run("device.py", "--pack", "absent.tar", "--images", "x", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("device.py: error: ")
    assert done.stderr.count("\n") == 1 and "absent.tar" in done.stderr and list(tmp_path.iterdir()) == []
    assert "--only must name some of" in run("device.py", "--only", "speed", cwd=tmp_path).stderr


def test_error_rates_are_those_of_a_test_where_it_is_exact(tmp_path: Path) -> None:
    done = run("error_rates.py", "--trials", "400", cwd=tmp_path)
    lines = [[float(number) for number in line.split()] for line in done.stdout.splitlines()[1:]]
    # Where images differ no more alike than chance has them, the signs of five seeds are exact: 1 in 32.
    alone = [signs for difference, _, of_image, signs, _ in lines if difference == of_image == 0]
    assert len(lines) == 24 and abs(sum(alone) / len(alone) - 100 / 32) < 2
    assert all(seen > 20 for difference, *_, seen in lines if difference)


def test_the_first_step_of_the_attack_is_fp32_s(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for at in range(10):
            folder = tmp_path / "images" / part / str(at)
            folder.mkdir(parents=True)
            for copy in range(4):
                picture = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(40 * at + copy))
                Image.fromarray(picture.byte().numpy()).save(folder / f"{copy}.png")
    done = run("bf16_attack.py", "--root", "images", "--num-examples", "4", "--repeats", "1", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 4, done.stderr
    for line in lines:
        shares = line["share of fp32's KL"]
        assert shares["one step"] == 1 != shares["one step, bf16 alone"] and line["price"] > 0 and line["images"] == 4

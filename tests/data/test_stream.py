"""Images decoded from their files by other processes: the same whatever their number, ahead of time, and errors."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from advmoe.cli import main
from advmoe.config import Config
from advmoe.data import FileSet, Variation, load_dataset
from advmoe.data.stream import file_set
from advmoe.evaluation.runs import evaluate_run
from advmoe.evaluation.scoring import stream, take
from advmoe.training.run import resume, train
from advmoe.training.trainer import Trainer

PLAN = [torch.tensor([3, 0, 7]), torch.tensor([1, 2]), torch.tensor([3, 9, 8]), torch.tensor([5]), torch.tensor([4, 6])]
TINY: dict[str, Any] = {
    "model": {"name": "wrn-10-1", "width": 4, "experts_init": "shared"},
    "data": {"name": "imagenet", "image_size": 16, "val_fraction": 0.2, "workers": 0},
    "threat": {"eps": "0.05"},
    "training": {"alternation": "both", "epochs": 2, "batch_size": 6, "step_size": 0.03, "val_attack_steps": 1},
    "attack": {"steps": 2},
}
CPU: dict[str, Any] = {"accelerator": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of ten training and three validation images, of which some are grey, CMYK or turned."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 8
    for part, count in (("train", 10), ("val", 3)):
        for label, wnid in enumerate(("n01000000", "n02000000", "n03000000")):
            (root / part / wnid).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 86, (30, 20 + 3 * i, 3)) + 85 * label
                image = Image.fromarray(pixels.astype(np.uint8)).convert(("RGB", "L", "CMYK")[i % 3])
                image.save(root / part / wnid / f"{i}.JPEG", **({"exif": turned} if i % 4 == 0 else {}))
    return root


@pytest.fixture
def files(root: Path) -> FileSet:
    data = load_dataset("imagenet", root=root, image_size=16, val_fraction=0, workers=0)
    assert isinstance(data.train, FileSet)
    return data.train


def variation(purpose: int = 0) -> Variation:
    return Variation(torch.Generator(), purpose=(purpose,), flip=True)


def drawn(files: FileSet, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(files.batches(PLAN, **options))


def assert_same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for (images, labels), (others, their_labels) in zip(a, b, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, their_labels)


def test_batches_are_what_pixels_says(files: FileSet) -> None:
    batches = drawn(files)
    for index, (images, labels) in zip(PLAN, batches, strict=True):
        assert images.dtype == torch.uint8 and images.shape == (len(index), *files.shape)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images.float() / 255, files.pixels(index))
        assert torch.equal(labels, files.labels[index])
    assert torch.equal(files.subset(torch.tensor([7, 3])).pixels(slice(0, 1)), files.pixels(torch.tensor([7])))
    assert len(files.subset(torch.tensor([7, 3]))) == 2


def test_crops_are_drawn_anew_for_each_epoch_and_each_place(files: FileSet) -> None:
    first, again, other = drawn(files, variation=variation()), drawn(files, variation=variation()), variation(1)
    assert_same(first, again)
    assert not torch.equal(first[0][0], drawn(files, variation=other)[0][0])
    # Image 3 is in the first and in the third batch: AdvMoE's two levels see it in two different crops.
    assert not torch.equal(first[0][0][0], first[2][0][0])
    assert not torch.equal(first[0][0], drawn(files)[0][0])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_was_handed_out_before_is_left_out(files: FileSet, workers: int) -> None:
    whole = drawn(files, variation=variation())
    assert_same(drawn(replace(files, workers=workers), variation=variation(), start=2), whole[2:])
    assert len(whole) > 2 and drawn(files, start=len(whole)) == []


def test_neither_the_number_of_processes_nor_their_order_changes_a_pixel(files: FileSet) -> None:
    state = torch.get_rng_state()
    for workers in (1, 2):
        many = replace(files, workers=workers)
        assert_same(drawn(files, variation=variation()), drawn(many, variation=variation()))
        assert_same(drawn(files), drawn(many))
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_the_next_batch_is_begun_before_it_is_asked_for(files: FileSet, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "first.png")
    # A pipe shows when somebody opens it; what is no image is named when its batch's turn comes.
    os.mkfifo(tmp_path / "second.png")
    piped = file_set(tmp_path, [("first.png", 0), ("second.png", 1)], image_size=16, workers=1)
    batches = piped.batches([torch.tensor([0]), torch.tensor([1])])
    assert next(batches)[1].tolist() == [0]
    deadline, writer = time.monotonic() + 60, None
    while writer is None and time.monotonic() < deadline:
        try:
            writer = os.open(tmp_path / "second.png", os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO  # no reader yet
            time.sleep(0.01)
    assert writer is not None
    os.close(writer)
    with pytest.raises(ValueError, match=r"images that can be decoded, got .*second\.png"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_file_is_named_when_its_batch_comes(root: Path, tmp_path: Path, workers: int) -> None:
    whole = root / "train" / "n01000000" / "1.JPEG"
    (tmp_path / "whole.jpg").write_bytes(whole.read_bytes())
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-40])
    names = [("whole.jpg", 0), ("cut.jpg", 0), ("absent.jpg", 0)]
    files = file_set(tmp_path, names, image_size=16, workers=workers)
    batches = files.batches([torch.tensor([0]), torch.tensor([0, 1])])
    next(batches)
    with pytest.raises(ValueError) as error:
        next(batches)
    rule = "data.root must hold images that can be decoded"
    assert str(error.value).startswith(f"{rule}, got {str(tmp_path / 'cut.jpg')!r}: ") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"absent\.jpg': FileNotFoundError"):
        files.pixels(slice(2, 3))


def test_a_process_that_dies_is_named_by_its_field(files: FileSet) -> None:
    batches = replace(files, workers=1).batches(PLAN * 20)
    next(batches)
    (process,) = multiprocessing.active_children()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(
        ValueError, match=r"^data\.workers must be a number of processes that can run .*, got 1: \w+Error"
    ) as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_closing_ends_the_processes(files: FileSet) -> None:
    batches = replace(files, workers=1).batches(PLAN * 20)
    next(batches)
    assert multiprocessing.active_children()
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_caller_leaves_no_process(root: Path, tmp_path: Path) -> None:
    # A script without the guard for `__main__`, which processes that import it again would need.
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, time, torch
from advmoe.data import load_dataset
data = load_dataset("imagenet", root={str(root)!r}, image_size=16, val_fraction=0, workers=1)
batches = data.train.batches([torch.tensor([0])] * 50)
next(batches)
print(len(multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()
    # The process that decodes, and the one that it was forked from, hold the pipe too: its end is the end of all.
    assert process.stdout.read() == ""
    process.wait()
    process.stdout.close()


def test_digest_follows_names_sizes_times_classes_and_the_size_of_images(root: Path, tmp_path: Path) -> None:
    content = (root / "train" / "n01000000" / "1.JPEG").read_bytes()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(0, 5))
    first = file_set(tmp_path, [("a.jpg", 0), ("b.jpg", 1)], image_size=16, workers=0)
    digests = [first.digest(), file_set(tmp_path, [("a.jpg", 0), ("b.jpg", 1)], image_size=16, workers=2).digest()]
    assert digests[0] == digests[1]
    digests = [first.digest(), first.subset(torch.tensor([0])).digest(), replace(first, image_size=8).digest()]
    digests.append(first.subset(torch.tensor([1, 0])).digest())
    digests.append(replace(first, labels=torch.tensor([0, 0])).digest())
    os.utime(tmp_path / "b.jpg", ns=(0, 6))
    digests.append(first.digest())
    with (tmp_path / "b.jpg").open("ab") as file:
        file.write(b"x")
    os.utime(tmp_path / "b.jpg", ns=(0, 6))
    digests.append(first.digest())
    assert len(set(digests)) == len(digests)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"^data\.root must hold readable files, got FileNotFoundError.*b\.jpg"):
        first.digest()


def test_evaluation_streams_what_it_would_take(files: FileSet) -> None:
    slices = [slice(0, 4), slice(4, 8), slice(28, 32)]
    for x_and_y, index in zip(stream(files, slices, torch.device("cpu")), slices, strict=True):
        assert_same([x_and_y], [take(files, index, torch.device("cpu"))])


# Whole runs


def tiny(root: Path, **groups: dict[str, Any]) -> Config:
    merged = {name: {**TINY[name], **groups.get(name, {})} for name in TINY}
    merged["data"]["root"] = str(root)
    return Config.from_dict(merged)


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AdvMoE run of two epochs, without processes that decode."""
    return train(tiny(root), run_dir=tmp_path_factory.mktemp("runs") / "whole", **CPU)


def test_resumed_with_other_workers_ends_bit_identical(
    root: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Trainer.step, []

    def interrupted(self: Trainer, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:  # four iterations of two levels an epoch: within the second
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(root), run_dir=tmp_path / "run", **CPU)
    monkeypatch.undo()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    tiny(root, data={"workers": 1}).dump(tmp_path / "run" / "config.yaml")
    resume(tmp_path / "run", **CPU)
    ours, theirs = (load_file(run / "last" / "model.safetensors") for run in (tmp_path / "run", finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_is_the_same_by_one_process_or_two(finished: Path, tmp_path: Path) -> None:
    # The two processes are daemonic and so may have no children: they decode by themselves, whatever data.workers says.
    results = []
    overrides = {"data": {"workers": 1}}
    for workers in (1, 2):
        options = {"num_examples": 8, "batch_size": 4, "workers": workers, "allow": ("gradients",)}
        found = evaluate_run(finished, out=tmp_path / str(workers), overrides=overrides, accelerator="cpu", **options)
        with np.load(tmp_path / str(workers) / "evaluation-examples.npz") as examples:
            results.append((found["clean_accuracy"], {name: examples[name].tolist() for name in examples}))
    assert results[0] == results[1]
    assert results[0][1]["label"] == [2 if i > 5 else int(i > 2) for i in results[0][1]["index"]]


def test_the_command_line_trains_and_evaluates_files_and_names_a_bad_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cpu = ("--threads", "1", "--accelerator", "cpu", "--data.workers", "1")
    tiny(root, training={"epochs": 1}).dump("tiny.yaml")
    assert main(["train", "--config", "tiny.yaml", "--run-dir", "run", *cpu]) == 0
    allow = ("--allow", "gradients,deterministic,batch-independent")
    assert main(["evaluate", "run", "--num-examples", "6", "--workers", "1", *cpu, *allow]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["num_examples"] == 6 and found["data"] == {"name": "imagenet", "split": "test"}
    shutil.copytree(root, "bad")
    bad = Path("bad/train/n03000000/5.JPEG")
    bad.write_bytes(bad.read_bytes()[:-50])
    capsys.readouterr()
    assert main(["train", "--config", "tiny.yaml", "--run-dir", "other", "--data.root", "bad", *cpu]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "advmoe: error: " in line]
    assert len(lines) == 1 and "'bad/train/n03000000/5.JPEG'" in lines[0]

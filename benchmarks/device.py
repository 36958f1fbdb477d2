"""What a GPU makes of this: one command of at most nine minutes, a JSON line a result, the most valuable first.

    python benchmarks/device.py --pack cifar10-jpeg.tar.xz --images build/device.safetensors    # before, on any machine
    PYTHONPATH=. python benchmarks/device.py --images build/device.safetensors --out results    # where the GPU is

The first makes 10,000 + 2,000 raw images (37 MB) of an archive of class folders. The second needs Python >= 3.11 with
torch, numpy, pillow, scikit-learn, safetensors, tqdm, PyYAML, pytest and `lightning_fabric` (which `pytorch_lightning`
contains), and no network. `--smoke` runs all of it, tiny, on a CPU.

Each phase is a process of its own, as a GPU that failed once fails until the process ends, and has a cap in seconds;
what it measured until then is kept, and a phase that fails says so in its line.

`about`    versions, commit, hardware; the ceilings: bytes per second of a copy, operations per second of a product
`steps`    a training step of S-Dense, AdvMoE and AT (MoE) by each way to compute its experts: ms, kernels launched,
           the share of the time in which one ran, the losses that ways have to agree in; beside what was predicted
`compiled` the same of AdvMoE and S-Dense, compiled
`tests`    the tests of every path on a GPU, `pytest -m gpu`
`layers`   a routed convolution by each way to compute it, against one expert's convolution of all images
`plans`    what a group's size costs cuDNN: sizes that differ from call to call, and the same padded to 16s
`larger`   `steps` at batch 512
`training` the longest training of AdvMoE on the images that the time left allows, and PGD on it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import speed
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from advmoe.config import Config, ModelKind, merged
from advmoe.config.fields import Compute
from advmoe.data import Dataset, ImageSet, load_dataset
from advmoe.evaluation.accuracy import evaluate
from advmoe.models.compute import set_compute
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.routing import route
from advmoe.ops import kernels_missing
from advmoe.recipes import recipe
from advmoe.rundir import METRICS, Epochs
from advmoe.seeding import generator_for
from advmoe.threat import ThreatModel
from advmoe.training import manifest as manifests
from advmoe.training.loop import fit
from advmoe.training.preemption import Requests, Stopped
from advmoe.training.trainer import Trainer, TrainingDiverged, build_model

ROOT = Path(__file__).parents[1]
Line = dict[str, Any]
PLAIN = "at s-dense"
COMPUTES = tuple(way for way in get_args(Compute) if way != "auto")
TRAIN, TEST = 10_000, 2_000
"""Images that `--pack` takes, the first ones of each class."""
PREDICTED = {
    "advmoe dispatch": [80, 110], "advmoe masked": [40, 60], "advmoe kernel": [40, 60], "advmoe compiled": [6, 15],
    "at s-dense": [8, 12],
}  # fmt: skip
"""Milliseconds of a step at batch 128 in bf16 on an H200, worked out before any was measured: 8 to 10 us for each
launch of an eager step (`tests/cuda/test_counts.py` counts them) and 100 to 250 us for each wait of dispatch; compiled,
0.9 ms of arithmetic, memory traffic and 2 us for each of the kernels that are left.
"""


class OverCap(Exception):
    """A phase has used the time that it has."""


@dataclass
class Bench:
    """What phases share: options, the clock, and where lines go."""

    options: argparse.Namespace
    out: Path
    began: float = field(default_factory=time.monotonic)
    lines: list[Line] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return torch.device(self.options.accelerator)

    def left(self) -> float:
        """Seconds of the whole that remain."""
        return float(60 * self.options.minutes - (time.monotonic() - self.began))

    def write(self, line: Line) -> None:
        """Print a line and store it, so that it stays whatever comes after."""
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        with self.out.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def capped(seconds: float) -> Iterator[None]:
    """Inside, `OverCap` is raised once `seconds` are over."""

    def ring(_: int, __: FrameType | None) -> None:
        raise OverCap(f"stopped at its cap of {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 2.0)  # again where a library swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Images


def pack(archive: Path, images: Path, train: int = TRAIN, test: int = TEST) -> None:
    """Write raw pixels and labels of the first `train` and `test` images of an archive, alike from each class.

    Its members are `train/CLASS/FILE` and `test/CLASS/FILE`. Raises `ValueError` where there are too few.
    """
    with tarfile.open(archive) as file:
        names = sorted(member.name for member in file.getmembers() if member.isfile())
        classes = sorted({name.split("/")[1] for name in names if name.count("/") == 2})
        wanted: dict[str, list[str]] = {}
        for split, count in (("train", train), ("test", test)):
            for each in classes:
                there = [name for name in names if name.startswith(f"{split}/{each}/")][: count // len(classes)]
                if len(there) < count // len(classes):
                    raise ValueError(
                        f"--pack must hold {count // len(classes)} images in {split}/{each}, got {len(there)}"
                    )
                wanted.setdefault(split, []).extend(there)
        every, pixels = {name for part in wanted.values() for name in part}, dict[str, Tensor]()
        for member in file.getmembers():  # in their order, as going back in a compressed archive reads it anew
            if member.name in every and (stream := file.extractfile(member)) is not None:
                picture = Image.open(BytesIO(stream.read())).convert("RGB")
                pixels[member.name] = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
                    picture.height, picture.width, 3
                )
    tensors = {}
    for split, part in wanted.items():
        tensors[split] = torch.stack([pixels[name] for name in part]).permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_labels"] = torch.tensor([classes.index(name.split("/")[1]) for name in part])
    images.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, images, metadata={"classes": json.dumps(classes)})


def packed(images: Path) -> Dataset:
    """The images of `pack`, a twentieth of the training images for validation."""
    with safe_open(images, "pt") as file:
        part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        classes = tuple(json.loads(file.metadata()["classes"]))
    order = torch.randperm(len(part["train"]), generator=generator_for(0, "validation"))
    train, labels = part["train"][order], part["train_labels"][order]
    cut, values = len(train) // 20, part["train"].float().div(255).transpose(0, 1).flatten(1)
    return Dataset(
        "packed", ImageSet(train[cut:], labels[cut:]), ImageSet(train[:cut], labels[:cut]),
        ImageSet(part["test"], part["test_labels"]), classes, flip=True,
        mean=tuple(values.mean(1).tolist()), std=tuple(values.std(1).tolist()),
    )  # fmt: skip


# Phases


def about(bench: Bench) -> Iterator[Line]:
    """Versions and hardware, then what the device can do at most."""
    described = manifests.describe(
        name="device", seed=bench.options.seed, device=bench.device, devices=1, command=sys.argv
    )
    keys = ("command", "seed", "versions", "platform", "cpu", "device", "git_commit", "started")
    yield {key: described[key] for key in keys} | {"hardware": speed.hardware(bench.options.accelerator)}
    size = 2**16 if bench.options.smoke else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), bench)
    n = 64 if bench.options.smoke else 8192
    a, b = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
    product = median_ms(lambda: a @ b, bench)
    yield {
        "name": "ceilings", "copy_bytes_per_s": 2 * size / copy * 1000, "bf16_flops_per_s": 2 * n**3 / product * 1000,
    }  # fmt: skip


def tests(bench: Bench) -> Iterator[Line]:
    """The suite's tests of paths on a GPU, in a process of their own."""
    where = "tests/cuda/test_operations.py" if bench.options.smoke else "tests/cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rf", where]
    if find_spec("xdist") is not None and not bench.options.smoke:
        command += ["-n", "8", "--dist", "worksteal"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
            timeout=max(1.0, CAPS["tests"] - 5),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        yield {"finished": False, "tail": text[-2000:]}
        return
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", done.stdout)}
    failed = re.findall(r"^FAILED (\S+.*)$", done.stdout, re.M)
    tail = "" if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]
    yield {"finished": True, "exit_code": done.returncode, **counts, "failures": failed, "tail": tail}


def steps(bench: Bench) -> Iterator[Line]:
    """Training steps as PyTorch runs them, operator by operator."""
    yield from timed(bench, 8 if bench.options.smoke else 128, eager(bench))


def larger(bench: Bench) -> Iterator[Line]:
    """The same of a larger batch."""
    yield from timed(bench, 16 if bench.options.smoke else 512, eager(bench))


def eager(bench: Bench) -> dict[str, Any]:
    """Kinds of step: of models, methods and ways to compute experts; our own kernels last, as they compile longest."""
    made = sorted(ways(bench), key=("masked", "dispatch", "kernel").index)
    return {
        f"{method} {way}": ("moe", method, {"compute": way})
        for way, method in [*((way, "advmoe") for way in made), *((way, "at") for way in made)]
    }  # fmt: skip


def compiled(bench: Bench) -> Iterator[Line]:
    """Training steps compiled, beside S-Dense's as it is."""
    sides = {
        "advmoe compiled": ("moe", "advmoe", {"compute": "masked", "compile": True}),
        "at s-dense compiled": ("s-dense", "at", {"compile": True}),
    }  # fmt: skip
    if bench.options.smoke:  # minutes of a C++ compiler, else
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    yield from timed(bench, 8 if bench.options.smoke else 128, sides)


def timed(bench: Bench, batch: int, sides: dict[str, Any]) -> Iterator[Line]:
    """A line of S-Dense and one a side, each timed in turn with S-Dense, as soon as it is; the error of one that fails.

    `terms` are the means of the losses over all steps, in which ways to compute the same model agree: they begin with
    the same weights, and have the same batches and random draws.
    """
    small = {"width": 8, "image_size": 16, "repeats": 2, "settle": 2} if bench.options.smoke else {"repeats": 10}
    setting = speed.Setting(batch=batch, precision="bf16-mixed", device=bench.options.accelerator, **small)
    starts = {kind: speed.starting_model(setting, kind) for kind in {"s-dense", *(kind for kind, *_ in sides.values())}}
    plain: speed.Stepper | None = None
    for name, (kind, method, training) in {PLAIN: ("s-dense", "at", {}), **sides}.items():
        began = time.monotonic()
        try:
            stepper = make_stepper(setting, kind, method, training, starts[kind])
            for _ in range(3):  # compiles, and chooses algorithms
                stepper.step()
            ready, terms = time.monotonic() - began, stepper.trainer.means.report(stepper.trainer.fabric)
            turns = {PLAIN: plain.step} if plain is not None else {}
            laps = speed.interleaved({**turns, name: stepper.step}, setting, warm_up=2)
            ran = launches(stepper.step, bench)
        except OverCap:
            raise
        except Exception as error:  # one side's end must not take the others' results along
            yield {"name": name, "batch": batch, "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        plain, ms = plain or stepper, statistics.median(laps[name])
        yield {
            "name": name, "batch": batch, "precision": setting.precision, "width": setting.width, "ms": round(ms, 3),
            "range_ms": [round(min(laps[name]), 3), round(max(laps[name]), 3)], "ready_s": round(ready, 1),
            "over_s_dense": round(ms / statistics.median(laps[PLAIN]), 3) if PLAIN in laps else None,
            "predicted_ms": PREDICTED.get(name) if batch == 128 else None, **ran, "terms": terms,
        }  # fmt: skip


def make_stepper(
    setting: speed.Setting, kind: ModelKind, method: str, training: dict[str, Any], start: Any
) -> speed.Stepper:
    """As the speed benchmark's, with other fields of `training` set."""
    dataset = speed.random_dataset(setting)
    config = speed.make_config(setting, kind, method, setting.precision)
    config = replace(config, training=replace(config.training, **training))
    fabric = Fabric(accelerator=setting.device, devices=1, precision=setting.precision)
    fabric.launch()
    model = build_model(config, dataset)
    model.load_state_dict(start.state_dict())
    return speed.Stepper(Trainer(config, model, dataset, fabric), setting)


def launches(side: Callable[[], Any], bench: Bench) -> Line:
    """Kernels that one call launches, and the share of its time in which one ran; of a GPU alone."""
    if bench.device.type != "cuda":
        return {"kernels": None, "busy": None}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = speed.now(bench.options.accelerator)
        side()
        seconds = speed.now(bench.options.accelerator) - start
    ran = [event for event in profile.events() or [] if str(event.device_type).endswith("CUDA")]
    kernels = [event for event in ran if not event.name.startswith("Mem")]
    return {"kernels": len(kernels), "busy": round(sum(e.time_range.elapsed_us() for e in ran) / 1e6 / seconds, 3)}


def plans(bench: Bench) -> Iterator[Line]:
    """A convolution of groups, whose sizes change as those of a dispatch do."""
    channels, side, count = (8, 8, 6) if bench.options.smoke else (32, 32, 60)
    generator = torch.Generator().manual_seed(bench.options.seed)
    sizes = torch.randint(44, 84, (count,), generator=generator).tolist()
    weight = torch.randn(channels, channels, 3, 3, device=bench.device).bfloat16()
    weight = weight.contiguous(memory_format=torch.channels_last)
    for search in (False, True) if bench.device.type == "cuda" else (False,):
        torch.backends.cudnn.benchmark = search
        for name, used in (("as they come", sizes), ("padded to 16s", [-(-size // 16) * 16 for size in sizes])):
            groups = [torch.randn(size, channels, side, side, device=bench.device).bfloat16() for size in used]
            groups = [each.contiguous(memory_format=torch.channels_last) for each in groups]
            rounds = []
            for _ in range(2):
                start = speed.now(bench.options.accelerator)
                for each in groups:
                    F.conv2d(each, weight, padding=1)
                rounds.append(1000 * (speed.now(bench.options.accelerator) - start) / count)
            first, again = rounds
            yield {"name": name, "search": search, "sizes": len(set(used)), "first_ms": first, "again_ms": again}
    torch.backends.cudnn.benchmark = False


def layers(bench: Bench) -> Iterator[Line]:
    """The routed convolutions of ResNet-18, forward and backward, by each way to compute them."""
    batch = 4 if bench.options.smoke else 128
    for channels, side in ((8, 8),) if bench.options.smoke else ((32, 32), (64, 16), (128, 8), (256, 4)):
        torch.manual_seed(bench.options.seed)
        layer = MoEConv2d(channels, channels, 3, 1, 1, bank_rows=2 * channels, num_experts=2, layer=0)
        layer = layer.to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(batch, channels, side, side, device=bench.device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        one = layer.of_expert(0, layer.bank).detach().requires_grad_()

        def routed(layer: MoEConv2d = layer, x: Tensor = x) -> None:
            with route(), torch.autocast(bench.device.type, torch.bfloat16):
                layer(x).float().square().mean().backward()

        def plain(x: Tensor = x, one: Tensor = one) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                F.conv2d(x, one, padding=1).float().square().mean().backward()

        yield {"name": "one expert", "channels": channels, "side": side, "ms": median_ms(plain, bench)}
        for way in ways(bench):
            set_compute(layer, way, bench.device)
            yield {"name": way, "channels": channels, "side": side, "ms": median_ms(routed, bench)}


def training(bench: Bench) -> Iterator[Line]:
    """AdvMoE for as many epochs as fit, then clean accuracy and PGD."""
    options = bench.options
    if options.smoke:
        dataset = load_dataset("digits", image_size=8, val_fraction=0.1, train_examples=64, seed=options.seed)
    elif options.images is None:
        raise ValueError("--images must name the file that --pack makes, for training to have images")
    else:
        dataset = packed(options.images)
    way = quickest(bench.lines)
    changes = {"precision": "bf16-mixed", "seed": options.seed, **way, "epochs": 1}
    config = Config.from_dict(merged(recipe("cifar10-resnet18-advmoe"), {"training": changes}))
    if options.smoke:
        small = {"model": {"width": 8}, "training": {"batch_size": 16, "val_attack_steps": 1}}
        config = Config.from_dict(merged(config.to_dict(), small))
    iterations = -(-len(dataset.train) // config.training.batch_size)
    step = [line["ms"] for line in bench.lines if line.get("name") == way_name(way) and line.get("batch") == 128]
    seconds = 1.3 * iterations * (step[0] if step else 100) / 1000 + 5  # with validation and checkpoint
    epochs = 1 if options.smoke else max(1, min(100, int((bench.left() - 60) / seconds)))
    config = replace(config, training=replace(config.training, epochs=epochs))
    fabric = Fabric(accelerator=options.accelerator, devices=1, precision=config.training.precision)
    fabric.launch()
    model = build_model(config, dataset)
    with tempfile.TemporaryDirectory() as folder:
        described = manifests.describe(name="advmoe", seed=options.seed, device=bench.device, devices=1, command=[])
        trainer = Trainer(config, model, dataset, fabric)
        requests, ended = Requests(deadline=time.monotonic() + bench.left() - 45), None
        with redirect_stdout(sys.stderr):  # lines alone go to standard output
            try:
                fit(trainer, Path(folder), described, requests=requests)
            except (Stopped, TrainingDiverged) as error:  # what is there is measured all the same
                ended = str(error)
        told = ("epoch", "train", "val", "seconds", "images_per_second")
        lines = Epochs.read(Path(folder) / METRICS).lines
        epochs_told = [{key: line[key] for key in told} for line in lines]
    test = dataset.test.subset(torch.arange(32)) if options.smoke else dataset.test
    threat = ThreatModel(config.threat.norm, float(config.threat.eps))
    found = evaluate(
        trainer.model, test, threat=threat, steps=2 if options.smoke else 50, batch_size=500, device=bench.device,
        allow=("batch-independent", "deterministic"),  # their records say how it was
    )  # fmt: skip
    keep = ("clean_accuracy", "robust_accuracy", "worst_case", "num_examples", "checks")
    yield {"name": "evaluation", "ended": ended, **{key: found[key] for key in keep}}
    yield {"name": "epochs", "configuration": config.to_dict()["training"], "epochs": epochs_told}


def quickest(lines: list[Line]) -> Line:
    """The fields of the quickest AdvMoE step that was measured at batch 128; masked where none was."""
    times = {line["name"]: line["ms"] for line in lines if line.get("batch") == 128 and "ms" in line}
    found = {tuple(way.items()): times[way_name(way)] for way in WAYS if way_name(way) in times}
    return dict(min(found, key=found.__getitem__)) if found else {"compute": "masked"}


def way_name(way: Line) -> str:
    """What `steps` calls AdvMoE with these fields."""
    return f"advmoe {'compiled' if way.get('compile') else way['compute']}"


def ways(bench: Bench) -> list[str]:
    """The ways to compute experts that there are on this device."""
    return [way for way in COMPUTES if way != "kernel" or kernels_missing(bench.device) is None]


WAYS = [{"compute": way} for way in COMPUTES] + [{"compute": "masked", "compile": True}]


def median_ms(call: Callable[[], Any], bench: Bench, repeats: int = 20) -> float:
    """Median milliseconds of a call, after three that warm up."""
    laps = []
    for attempt in range(3 + (2 if bench.options.smoke else repeats)):
        start = speed.now(bench.options.accelerator)
        call()
        if attempt >= 3:
            laps.append(1000 * (speed.now(bench.options.accelerator) - start))
    return round(statistics.median(laps), 4)


PHASES: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "about": about, "steps": steps, "compiled": compiled, "tests": tests, "layers": layers, "plans": plans,
    "larger": larger, "training": training,
}  # fmt: skip
CAPS = {
    "about": 25, "steps": 60, "compiled": 160, "tests": 75, "layers": 30, "plans": 15, "larger": 25, "training": 540,
}  # fmt: skip
"""Seconds of each phase; training has all that is left."""


def cap(bench: Bench, name: str) -> float:
    """Seconds that a phase has."""
    return min(CAPS[name] * (10 if bench.options.smoke else 1), bench.left())


def run(bench: Bench, name: str) -> bool:
    """A phase, within its cap and what is left; False where it failed."""
    began, error = time.monotonic(), None
    try:
        with capped(cap(bench, name)):
            for line in PHASES[name](bench):
                bench.write({"phase": name, **line})
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:1000]
    bench.write({"phase": name, "name": "end", "seconds": round(time.monotonic() - began, 1), "error": error})
    return error is None


def apart(bench: Bench, name: str) -> bool:
    """`run` in a process of its own; one that dies, or waits for a GPU beyond its cap, has its end told here."""
    options = bench.options
    words = ["--only", name, "--into", str(bench.out), "--minutes", str(bench.left() / 60), "--seed", str(options.seed)]
    words += ["--accelerator", options.accelerator, *(["--smoke"] if options.smoke else [])]
    words += ["--images", str(options.images)] if options.images is not None else []
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, __file__, *words], timeout=max(1.0, cap(bench, name)) + 15, check=False
        ).returncode
        error = f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        code, error = None, "ended 15 s beyond its cap"
    if code not in (0, 1):
        seconds = round(time.monotonic() - began, 1)
        bench.write({"phase": name, "name": "end", "seconds": seconds, "error": error})
    return code == 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    add("--images", type=Path, help="file of raw images: what --pack writes, and training reads")
    add("--pack", type=Path, metavar="ARCHIVE", help="make --images of this archive, and stop")
    add("--out", type=Path, default=Path("results"), help="folder that gets device.jsonl (default: results)")
    add("--only", default=",".join(PHASES), help="phases, separated by commas (default: all)")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="tiny sizes")
    add("--into", type=Path, help=argparse.SUPPRESS)  # the file of lines, of a process for one phase
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.only.split(",")) - set(PHASES)):
        parser.error(f"--only must name some of {', '.join(PHASES)}, got {', '.join(unknown)}")
    if options.pack is not None and options.images is None:
        parser.error("--images must name the file to write when --pack is given")
    if options.smoke and options.into is None:  # however slow the machine
        options.minutes = max(options.minutes, 60)
    if options.accelerator == "auto":
        options.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        if options.pack is not None:
            pack(options.pack, options.images)
            return 0
        if options.images is not None:
            packed(options.images)
        if options.into is None:
            options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, tarfile.TarError) as error:
        speed.log(f"device.py: error: {error}")
        return 2
    if options.into is not None:
        bench = Bench(options, options.into)
        bench.lines += [json.loads(line) for line in options.into.read_text().splitlines()]
        return 0 if run(bench, options.only) else 1
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    bench = Bench(options, options.out / f"device-{stamp}.jsonl")
    bench.out.touch()
    return 0 if all([apart(bench, name) for name in options.only.split(",")]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How fast image files become batches, and how long training waits for them: one JSON line a result.

    python benchmarks/data.py --samples imagenet-samples.tar --out benchmarks/results/data.jsonl
    python benchmarks/data.py --only wait-digits

`decode`         the files of `--samples` to crops, in this process: the random ones of training, the central ones of
                 evaluation; images per second and core
`workers`        the same files several times over, in batches, by one process and by two; their start is part of it
`wait-digits`    an epoch of the recipe digits-advmoe, whose images are in memory, and what of it is spent waiting for
                 batches (drawing them, augmentation, and the generator around them)
`wait-imagenet`  the same for AdvMoE on the streamed files of `--samples`, with a ResNet-18 of `--width` channels

Lines and timing are those of `speed.py`. `--samples` is a tar file of `<wnid>_<name>.JPEG`; it is laid out as ImageNet
in a temporary folder, every image linked `--copies` times. Where it is not given, only `wait-digits` is measured.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning_fabric import Fabric
from speed import Line, Setting, Side, interleaved, log, make_config, now, result, write
from torch import Tensor
from tqdm import tqdm

from advmoe.config import Config
from advmoe.data import Dataset, FileSet, Images, Variation, load_dataset
from advmoe.recipes import recipe
from advmoe.training.trainer import Trainer, build_model


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What is measured at which size, and on which files."""

    width: int = 8
    batch: int = 25
    image_size: int = 224
    repeats: int = 5
    workers: int = 2
    copies: int = 8
    root: Path | None = None
    """Where the samples were laid out."""


def lay_out(samples: Path, root: Path, copies: int) -> None:
    """Write the images of a tar file as `root/train/<wnid>/*` and `root/val/<wnid>/*`, `copies` links to each."""
    with tarfile.open(samples) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            stream = tar.extractfile(member)
            if stream is None or "_" not in name:
                continue
            folders = [root / part / name.split("_")[0] for part in ("train", "val")]
            first, *others = [folder / f"{copy}-{name}" for folder in folders for copy in range(copies)]
            for path in (first, *others):
                path.parent.mkdir(parents=True, exist_ok=True)
            first.write_bytes(stream.read())
            for other in others:
                os.link(first, other)


def load(options: Options) -> Dataset:
    """The samples, every copy of them an image of its own."""
    assert options.root is not None
    return load_dataset(
        "imagenet", root=options.root, image_size=options.image_size, val_fraction=0, workers=options.workers
    )


def images_per_second(line: Line, images: int) -> dict[str, float]:
    """Images decoded in a second, by side."""
    return {side: round(1000 * images / median, 1) for side, median in line["medians_ms"].items()}


def changes(options: Options, images: int) -> dict[str, Any]:
    """What of `speed.py`'s settings means nothing where no model runs, and how many images were read."""
    return {"model": None, "width": None, "precision": None, "images": images}


def measure_decode(options: Options) -> Iterator[Line]:
    """Files to crops, by this process alone."""
    files = load(options).train
    images = len(files) // options.copies
    assert isinstance(files, FileSet)
    chosen = replace(files, workers=0).subset(torch.arange(0, len(files), options.copies))
    options = replace(options, batch=images, threads=1)
    plan, variation = [torch.arange(images)], Variation(torch.Generator(), ("benchmark",), flip=True)
    sides = {"training": _drain(chosen, plan, variation), "evaluation": _drain(chosen, plan, None)}
    laps = interleaved(sides, options)
    what = "image files to one uint8 batch in this process, on one core: random crops and flips, or central crops"
    line = result("decode", what, laps, {}, options, changed=changes(options, images))
    yield line | {"images_per_second": images_per_second(line, images), "megapixels": _megapixels(chosen)}


def measure_workers(options: Options) -> Iterator[Line]:
    """Files to batches of random crops, by one process and by two."""
    files = load(options).train
    assert isinstance(files, FileSet)
    plan, variation = torch.arange(len(files)).split(options.batch), Variation(torch.Generator(), ("benchmark",), True)
    sides = {f"{n} workers": _drain(replace(files, workers=n), plan, variation) for n in (1, 2)}
    laps = interleaved(sides, options)
    line = result(
        "workers",
        f"{len(files)} image files to batches of {options.batch} random crops by two processes over one, started anew "
        "each time by a process that had imported all that they need",
        laps,
        {"1 workers/2 workers": ("1 workers", "2 workers")},
        options,
        changed=changes(options, len(files)),
    )
    yield line | {"images_per_second": images_per_second(line, len(files))}


def _drain(files: FileSet, plan: Iterable[Tensor], variation: Variation | None) -> Side:
    def side() -> None:
        for _ in files.batches(plan, variation):
            pass

    return side


def _megapixels(files: FileSet) -> float:
    """Mean size of the images in their files: what decoding time depends on."""
    from PIL import Image

    sizes = [Image.open(files.root / os.fsdecode(path)).size for path in files.paths]
    return round(sum(width * height for width, height in sizes) / len(sizes) / 1e6, 4)


@dataclass
class Waited:
    """A set whose batches are timed: the milliseconds that whoever asks for one waits for it."""

    images: Images
    device: str
    milliseconds: float = 0.0

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, plan: Iterable[Tensor], variation: Variation | None, start: int = 0
    ) -> Generator[tuple[Tensor, Tensor]]:
        drawn = self.images.batches(plan, variation, start)
        while True:
            began = now(self.device)
            batch = next(drawn, None)
            self.milliseconds += 1000 * (now(self.device) - began)
            if batch is None:
                return
            yield batch


def epochs(config: Config, dataset: Dataset, device: str) -> Side:
    """A side that trains for an epoch and returns how long it waited for data."""
    fabric = Fabric(accelerator=device.split(":")[0], devices=1, precision=config.training.precision)
    fabric.launch()
    trainer = Trainer(config, build_model(config, dataset), dataset, fabric)
    trainer.train_set = waited = Waited(trainer.train_set, device)

    def side() -> Mapping[str, float]:
        waited.milliseconds = 0.0
        trainer.train_epoch(0, tqdm(disable=True))
        return {"waiting": waited.milliseconds}

    return side


def wait_line(name: str, what: str, config: Config, dataset: Dataset, options: Options) -> Line:
    """The line of what an epoch of `config` spends waiting."""
    laps = interleaved({"epoch": epochs(config, dataset, options.device)}, options)
    options = replace(
        options, width=config.model.width or 64, batch=config.training.batch_size, image_size=dataset.image_size,
        precision=config.training.precision,
    )  # fmt: skip
    return result(
        name,
        f"{what}: the share of an epoch of AdvMoE (each level on its own batches, with its attacks) that the training "
        "loop waits for a batch, the first one of the epoch included",
        laps,
        {"epoch: waiting/epoch": ("epoch: waiting", "epoch")},
        options,
        at_most={"epoch: waiting/epoch": 0.05},
        changed={"images": len(dataset.train), "augment": config.data.augment},
    )


def measure_wait_digits(options: Options) -> Iterator[Line]:
    """The CPU demo recipe, images in memory."""
    config = Config.from_dict(recipe("digits-advmoe"))
    data = config.data
    dataset = load_dataset(data.name, image_size=data.image_size, val_fraction=data.val_fraction)
    yield wait_line("wait-digits", "recipe digits-advmoe, images in memory", config, dataset, options)


def measure_wait_imagenet(options: Options) -> Iterator[Line]:
    """A small model on streamed files."""
    config = make_config(options, "moe", "advmoe", options.precision)
    line = wait_line(
        "wait-imagenet", f"image files, decoded by {options.workers} processes", config, load(options), options
    )
    line["setting"]["workers"] = options.workers
    yield line


RESULTS = {
    "decode": measure_decode,
    "workers": measure_workers,
    "wait-digits": measure_wait_digits,
    "wait-imagenet": measure_wait_imagenet,
}
"""Results by the name that `--only` takes."""


def main() -> None:
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("threads", "width", "batch", "image-size", "repeats", "workers", "copies"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name.replace("-", "_")))
    parser.add_argument("--samples", type=Path, help="tar file of ImageNet images")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="where models run")
    parser.add_argument("--only", help="results, separated by commas (default: all that can be measured)")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    given = vars(parser.parse_args())
    only, out, samples = given.pop("only"), given.pop("out"), given.pop("samples")
    names = only.split(",") if only else [name for name in RESULTS if samples or name == "wait-digits"]
    options = Options(device=given.pop("accelerator"), **given)
    if unknown := sorted(set(names) - set(RESULTS)):
        parser.error(f"--only must name some of {', '.join(RESULTS)}, got {', '.join(unknown)}")
    if samples is None and (needing := [name for name in names if name != "wait-digits"]):
        parser.error(f"--samples must name a tar file of images for {needing[0]}, got None")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if samples is not None:
            lay_out(samples, Path(folder), options.copies)
            options = replace(options, root=Path(folder))
        for name in names:
            log(f"{name}: {options.device}, {options.threads} threads")
            for line in RESULTS[name](options):
                write(line, out)


if __name__ == "__main__":
    main()

"""Train the models of docs/results/methods.md, five methods on one image folder, on CPU cores; print their table under
PGD-50.

    python benchmarks/table.py --root data/cifar10-jpeg

Runs go to `--runs`, one directory a row, `--jobs` at a time with one thread each; finished ones are kept, interrupted
ones continued. Times per image are measured last, with nothing else running, all models in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS = {
    "AdvMoE (embedding router, random codes, soft attack)": "advmoe-embedding-random",
    "AdvMoE (layer routers, TRADES)": "advmoe",
    "AdvMoE (image router, mod codes)": "advmoe-image-mod",
    "AT (MoE)": "at-moe",
    "AT (S-Dense)": "at-s-dense",
}
"""Table rows and their methods, the longest first so that the cores finish together."""


def call(arguments: list[str], log: Path) -> None:
    with log.open("a") as file:
        subprocess.run([sys.executable, "-m", "advmoe", *arguments], stdout=file, stderr=file, check=True)


def run_row(method: str, options: argparse.Namespace) -> None:
    """Train (or continue) and evaluate one row."""
    run = Path(options.runs) / method
    run.parent.mkdir(parents=True, exist_ok=True)
    log, threads = run.with_suffix(".log"), ["--threads", "1", "--accelerator", "cpu"]
    shared_init = [] if method == "at-s-dense" else ["--model.experts_init", "shared"]
    settings = {
        "data.name": "folder", "data.root": options.root, "model.width": options.width, "training.epochs":
        options.epochs, "training.batch_size": options.batch_size, "training.lr": options.lr, "training.seed":
        options.seed, "training.precision": options.precision,
    }  # fmt: skip
    if (run / "manifest.json").exists():
        if json.loads((run / "manifest.json").read_text())["finished"] is None:
            call(["train", "--resume", str(run), *threads], log)
    else:
        overrides = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        recipe = f"cifar10-resnet18-{method}"
        call(["train", "--config", recipe, "--run-dir", str(run), *overrides, *shared_init, *threads], log)
    if not (run / "evaluation.json").exists():
        images = [] if options.num_examples is None else ["--num-examples", str(options.num_examples)]
        call(["evaluate", str(run), "--attacks", "pgd-50", *images, "--workers", "1", *threads], log)


def times(runs: dict[str, Path], threads: int, batch: int = 128, repeats: int = 9) -> dict[str, float]:
    """Median milliseconds per image of each model, interleaved so that a busy moment hits all alike."""
    import torch

    from advmoe.evaluation.cost import example_input
    from advmoe.models.runs import load_run

    torch.set_num_threads(threads)
    models = {name: load_run(path).to(memory_format=torch.channels_last) for name, path in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for attempt in range(repeats + 1):
            for name, model in models.items():
                x = example_input(model, batch)
                start = time.perf_counter()
                model(x)
                if attempt:
                    taken[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) / batch for name, values in taken.items()}


def describe_load(run: Path) -> str:
    """Two cells of the last epoch: the mean over layers of the busiest expert's share, and the dead experts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layers: list[dict[str, Any]] = lines[-1]["layers"]
    if not layers:
        return "- | -"
    busiest = statistics.mean(max(layer["load"]) for layer in layers)
    return f"{busiest:.2f} | {sum(len(layer['dead_experts']) for layer in layers)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="image folder: train/<class>/*, test/<class>/*")
    parser.add_argument("--runs", default="runs/table")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="of training")
    parser.add_argument("--num-examples", type=int, help="test images (default: all)")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    started = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda method: run_row(method, options), ROWS.values()))
    print(f"trained and evaluated in {(time.perf_counter() - started) / 60:.0f} minutes\n", file=sys.stderr)
    runs = {name: Path(options.runs) / method for name, method in reversed(ROWS.items())}
    milliseconds = times(runs, options.jobs)
    print("| model | SA % | RA PGD-50 % | MMACs | ms/image | busiest expert's load | dead experts |")
    print("|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        result = json.loads((run / "evaluation.json").read_text())
        clean, robust = (
            f"{100 * each:.1f}" for each in (result["clean_accuracy"], result["robust_accuracy"]["pgd-50"])
        )
        cost = f"{1000 * result['cost']['gmacs']:.1f} | {milliseconds[name]:.2f}"
        print(f"| {name} | {clean} | {robust} | {cost} | {describe_load(run)} |")


if __name__ == "__main__":
    main()

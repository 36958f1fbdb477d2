"""What the training attack of two steps reaches in bf16, and what its first step in fp32 costs, on models of the zoo.

    python benchmarks/bf16_attack.py --root data/cifar10-jpeg

Prints a JSON line a model: the KL that is reached, as a share of fp32's, after one step and two, as training has it
(clean logits and first step in fp32) and in bf16 alone; then the price, the CPU time of the attack over that in bf16
alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from speed import write
from torch import Tensor

import advmoe
from advmoe import ThreatModel
from advmoe.attacks import kl_loss, trades_attack
from advmoe.training import manifest

MODELS = "at-s-dense", "at-moe", "advmoe", "advmoe-embedding-random"
THREAT = ThreatModel("linf", 8 / 255)


def attacked(model: torch.nn.Module, x: Tensor, steps: int, seed: int) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return trades_attack(model, x, threat=THREAT, steps=steps, step_size=5 / 255, generator=noise)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def alone() -> AbstractContextManager[object]:
    """Inside, the attack has no steps in fp32."""
    return patch("advmoe.attacks.pgd._fp32", lambda device: nullcontext())


def share(model: torch.nn.Module, x: Tensor, steps: int, way: AbstractContextManager[object]) -> float:
    """The KL reached in bf16 over that reached in fp32, both measured in fp32; mean over two draws of the noise."""
    with torch.no_grad():
        loss = kl_loss(model(x))

    def reached(x_adv: Tensor) -> float:
        with torch.no_grad():
            return loss(model(x_adv)).item()

    with way, bf16():
        ours = [attacked(model, x, steps, seed) for seed in (0, 1)]
    full = [attacked(model, x, steps, seed) for seed in (0, 1)]
    return sum(map(reached, ours)) / sum(map(reached, full))


def price(model: torch.nn.Module, x: Tensor, repeats: int) -> float:
    """CPU time of the attack of two steps as it is, over that in bf16 alone: each in turn, medians."""
    taken: dict[str, list[float]] = {"as it is": [], "alone": []}
    for attempt in range(repeats + 1):
        for name, way in (("as it is", nullcontext()), ("alone", alone())):
            begun = time.process_time()
            with way, bf16():
                attacked(model, x, 2, 0)
            if attempt:
                taken[name].append(time.process_time() - begun)
    return statistics.median(taken["as it is"]) / statistics.median(taken["alone"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="CIFAR-10 as an image folder")
    parser.add_argument("--num-examples", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = advmoe.load_dataset("folder", root=options.root, image_size=32).test.pixels(slice(options.num_examples))
    described = manifest.describe(name="bf16_attack", seed=0, device=x.device, devices=1, command=None)
    made_on = {key: described[key] for key in ("cpu", "git_commit")} | {"torch": described["versions"]["torch"]}
    for name in MODELS:
        model = advmoe.load(f"zoo:{name}").eval().requires_grad_(False)
        shares = {
            f"{'one step' if steps == 1 else 'two steps'}{words}": round(share(model, x, steps, way), 3)
            for steps in (1, 2)
            for words, way in ((", bf16 alone", alone()), ("", nullcontext()))
        }
        line = {"model": name, "share of fp32's KL": shares, "price": round(price(model, x, options.repeats), 2)}
        write(line | {"images": len(x)} | made_on, options.out)


if __name__ == "__main__":
    main()

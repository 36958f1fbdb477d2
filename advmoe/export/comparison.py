"""A written graph beside the model that it was made of: whether both compute the same, and how fast each is.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.export.graph import ExportedGraph, ExportFailed
from advmoe.moe import Routing, route
from advmoe.progress import tracked

TOLERANCE = 1e-4
"""How far a logit may lie from PyTorch's, times the largest logit where that is above 1."""

TIE = 1e-5
"""Scores of two experts this close are a tie: two libraries' rounding moves fp32 scores by about 1e-6."""


def compared(model: nn.Module, graph: ExportedGraph, images: Tensor, batch: int = 1) -> dict[str, Any]:
    """How `graph` differs from `model` on `images`, `batch` at once (and, of several, the first 1 and 3 as well).

    A router whose best scores lie within `TIE` may choose otherwise in another library. Such ties are listed, and the
    image's logits compared with PyTorch's on the pathway that `graph` took.

    Raises `ExportFailed` where a pathway differs otherwise, or a logit by more than `TOLERANCE`.
    """
    largest, pathways, ties = 0.0, set(), []
    parts = [*zip(images.split(batch), range(0, len(images), batch), strict=True)]
    parts += [(images[:number], 0) for number in (1, 3) if number < batch]
    for x, first in tracked(parts, "compare"):
        with route() as routing:
            expected = model(x)
        logits, *rest = graph(x)
        if routing.choices:
            (taken,) = rest
            parted = [{**each, "image": first + each["image"]} for each in _parted(routing, taken)]
            if parted:
                ties += [each for each in parted if each not in ties]
                with route(forced=taken):
                    expected = model(x)
            pathways |= {tuple(each) for each in taken.flatten(1).tolist()}
        largest = max(largest, _difference(logits, expected, first))
    return {
        "images": len(images), "pathways": len(pathways), "largest_difference": largest, "allowed": TOLERANCE,
        "ties": ties,
    }  # fmt: skip


def _parted(routing: Routing, taken: Tensor) -> list[dict[str, Any]]:
    """Where PyTorch's pathways and `taken` first part, by image, and how close the two experts' scores are there."""
    ties: dict[int, dict[str, Any]] = {}
    for column, layer in enumerate(sorted(routing.choices)):
        ours, theirs, scores = routing.choices[layer], taken[:, column], routing.scores[layer]
        gaps = (scores.gather(-1, ours[..., None]) - scores.gather(-1, theirs[..., None])).flatten(1).amax(1)
        for image in (ours != theirs).flatten(1 if ours.dim() > 1 else 0).nonzero()[:, 0].tolist():
            ties.setdefault(image, {"image": image, "layer": layer, "gap": float(gaps[image])})
    for each in ties.values():
        if not each["gap"] <= TIE:
            raise ExportFailed(
                f"the graph must choose PyTorch's experts, got another in layer {each['layer']}, where the scores are "
                f"{each['gap']:.2g} apart"
            )
    return list(ties.values())


def _difference(logits: Tensor, expected: Tensor, first: int) -> float:
    apart = (logits - expected).abs().amax(1)
    allowed = TOLERANCE * expected.abs().amax(1).clamp(min=1)
    for image in (~(apart <= allowed)).nonzero()[:, 0].tolist():  # NaN is not within it either
        raise ExportFailed(
            f"logits must be PyTorch's to {allowed[image]:.2g}, got {apart[image]:.2g} apart on image {first + image}"
        )
    return float(apart.max())


def timed(model: nn.Module, graph: ExportedGraph, images: Tensor, rounds: int = 10, repeats: int = 4) -> dict[str, Any]:
    """Milliseconds per image of `model` in PyTorch and of `graph`, one image at a time: medians of
    `rounds` * `repeats`.

    The two take turns, and the first pass of a turn does not count: the other's threads may still be spinning.
    """
    times: dict[str, list[float]] = {"pytorch": [], "exported": []}
    for turn in tracked(range(rounds), "time", unit="round"):
        x = images[turn % len(images)][None].contiguous(memory_format=torch.channels_last)
        for name, call in (("pytorch", model), ("exported", graph)):
            for attempt in range(1 + repeats):
                start = time.perf_counter()
                call(x)
                if attempt:
                    times[name].append(time.perf_counter() - start)
    ours, theirs = (1000 * statistics.median(each) for each in times.values())
    return {
        "pytorch_ms": round(ours, 4), "exported_ms": round(theirs, 4), "speedup": round(ours / theirs, 3), "batch": 1,
        "passes": rounds * repeats, "threads": torch.get_num_threads(),
    }  # fmt: skip

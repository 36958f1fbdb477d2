"""A few test images of a run, attacked, to be looked at: pixels, predictions and pathways before and after.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `K` classes. Pixels and eps are in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict
from advmoe.data import Images
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import make_job, positive
from advmoe.evaluation.scoring import measuring, take
from advmoe.evaluation.subject import UnderAttack, subject
from advmoe.files import write_arrays
from advmoe.moe.routing import route
from advmoe.pool import threads_set
from advmoe.rundir import DIGEST, GALLERY
from advmoe.seeding import generator_for

_MOST = 256
"""Images of a gallery."""
_CANDIDATES = 128
"""Images that are looked at, at least, to find those of the gallery."""


def gallery_run(
    target: str | Path,
    *,
    number: int = 8,
    source: str | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
    accelerator: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
) -> Path:
    """Attack some test images of a run by PGD, as configured, and keep what one needs to show them: `gallery.npz`.

    The images are drawn by the seed from those that the model classifies right without an attack, one of each class in
    turn; from those it does not where there are too few. So they show what the attack does, and nothing of accuracy.

    Args: as of `Options`; number: of images. threads: CPU threads, None for PyTorch's number.

    The file's arrays: `index` (N,) positions in the test set, `labels`, `clean`, `adversarial` (N, C, H, W) float16,
    `clean_prediction` and `adversarial_prediction` (N,), their softmax probabilities `clean_confidence` and
    `adversarial_confidence` (N,), `clean_pathway` and `adversarial_pathway` (N, L), (N, L, T) where tokens are routed
    one by one, (N, 0) for a plain model, `num_experts`, `classes` (K,) names, `attack`, `norm`, `eps`, and
    `model_sha256`, the model's digest. Returns where it is. Raises `ValueError` for whatever cannot be
    used.
    """
    given = subject(target, source=source, overrides=overrides, accelerator=accelerator, seed=seed)
    device = given.device
    predict = given.load(device)
    with threads_set(threads):
        index = _drawn(predict, given.data, _few(number), given.seed, device)
        images = given.data.subset(index)
        job, (name,) = make_job(
            predict, images, device, given.threat, given.config.attack, ["pgd"], len(index), given.seed
        )
        ((x, x_adv, y),) = UnderAttack(device, predict, job, (name,)).images(name)
        seen = {"clean": _seen(predict, x, device), "adversarial": _seen(predict, x_adv, device)}
    arrays: dict[str, Any] = {
        "index": given.index[index].numpy(),
        "labels": y.cpu().numpy(),
        "clean": x.cpu().half().contiguous().numpy(),
        "adversarial": x_adv.cpu().half().contiguous().numpy(),
        "classes": np.array(given.classes, dtype=np.str_),
        "num_experts": np.array(seen["clean"].num_experts),
        "attack": np.array(name),
        "norm": np.array(given.threat.norm),
        "eps": np.array(given.threat.eps),
        DIGEST: np.array(given.digest or ""),
    }
    for kind, each in seen.items():
        arrays[f"{kind}_prediction"] = each.prediction.numpy()
        arrays[f"{kind}_confidence"] = each.confidence.numpy()
        arrays[f"{kind}_pathway"] = each.pathway.numpy()
    given.home.mkdir(parents=True, exist_ok=True)
    write_arrays(given.home / GALLERY, arrays)
    return given.home / GALLERY


def _few(number: int) -> int:
    if positive("number", number) > _MOST:
        raise InputError(f"number must be <= {_MOST} (a page shows them all), got {number}")
    return number


def _drawn(predict: Predict, data: Images, number: int, seed: int, device: torch.device) -> Tensor:
    """Positions of `number` images at most, drawn from `_CANDIDATES` or more of `data`."""
    shuffled = torch.randperm(len(data), generator=generator_for(seed, "gallery"))[: max(_CANDIDATES, 8 * number)]
    x, y = take(data.subset(shuffled), slice(0, len(shuffled)), device)
    wrong = _seen(predict, x, device).prediction != y.cpu()
    turns: Counter[tuple[bool, int]] = Counter()
    queue = []
    for position, failed, label in zip(shuffled.tolist(), wrong.tolist(), y.tolist(), strict=True):
        turns[failed, label] += 1
        queue.append((failed, turns[failed, label], label, position))
    return torch.tensor([position for *_, position in sorted(queue)[:number]])


class _Seen(NamedTuple):
    """What a classifier makes of images, on the CPU."""

    prediction: Tensor
    """(N,) classes."""
    confidence: Tensor
    """(N,) softmax probability of the predicted class."""
    pathway: Tensor
    """(N, L), (N, L, T), or (N, 0) for a plain model."""
    num_experts: int
    """0 for a plain model."""


def _seen(predict: Predict, x: Tensor, device: torch.device) -> _Seen:
    """What a classifier makes of pixels (N, C, H, W), under hard routing."""
    with measuring(predict, device), torch.no_grad(), route() as routing:
        confidence, prediction = predict(x).float().softmax(1).max(1)
    pathway = routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long)
    experts = max((scores.shape[-1] for scores in routing.scores.values()), default=0)
    return _Seen(prediction.cpu(), confidence.cpu(), pathway.cpu(), experts)

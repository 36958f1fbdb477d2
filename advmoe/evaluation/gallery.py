"""A few test images of a run, attacked, to be looked at: pixels, predictions and pathways before and after.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `K` classes. Pixels and eps are in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks.pgd import Predict
from advmoe.data import Images
from advmoe.errors import InputError
from advmoe.evaluation.accuracy import positive
from advmoe.evaluation.outcomes import make_job
from advmoe.evaluation.scoring import measuring, take
from advmoe.evaluation.subject import Options, UnderAttack, open_subject, options_of, require_pgd
from advmoe.files import write_arrays
from advmoe.moe.routing import route
from advmoe.pool import threads_set
from advmoe.rundir import DIGEST, GALLERY
from advmoe.seeding import generator_for

_MOST = 256
"""Images of a gallery."""
_CANDIDATES = 128
"""Images that are looked at, at least, to find those of the gallery."""


def gallery_run(target: str | Path, options: Options | None = None, *, number: int = 8, **keywords: Any) -> Path:
    """Attack some test images of a run by PGD, and write `gallery.npz`, from which they can be shown.

    The seed draws the images from those that the model classifies right without an attack, one of each class in turn.
    Where these are too few, wrong ones follow. So the images show what the attack does, and nothing of accuracy.

    Args:
        options, keywords: see `Options`; of attacks one of PGD's, as in `suite`, by default that of the configuration.
            Images are attacked all at once, and no checks are made: `batch_size` and `allow` have no effect.
        number: of images.

    The file's arrays: `index` (N,) positions in the test set, `labels`, `clean`, `adversarial` (N, C, H, W) float16,
    `clean_prediction` and `adversarial_prediction` (N,), their softmax probabilities `clean_confidence` and
    `adversarial_confidence` (N,), `clean_pathway` and `adversarial_pathway` (N, L), (N, L, T) where tokens are routed
    one by one, (N, 0) for a plain model, `num_experts`, `classes` (K,) names, `attack`, `norm`, `eps`, and
    `model_sha256`, the model's digest. Returns its path. Raises `ValueError` for whatever cannot be used.
    """
    subject = open_subject(target, options := options_of(options, keywords))
    device = subject.device
    predict = subject.load(device)
    with threads_set(options.threads):
        index = _sampled(predict, subject.data, _few(number), subject.seed, device)
        measurement = replace(subject.measurement(["pgd"]), batch_size=len(index))
        job, names = make_job(predict, subject.data.subset(index), measurement, device)
        require_pgd("show", names, single=True)
        ((x, x_adv, y),) = UnderAttack(device, predict, job, names).images(names[0])
        answers = {"clean": _answers(predict, x, device), "adversarial": _answers(predict, x_adv, device)}
    arrays: dict[str, Any] = {
        "index": subject.index[index].numpy(),
        "labels": y.cpu().numpy(),
        "clean": x.cpu().half().contiguous().numpy(),
        "adversarial": x_adv.cpu().half().contiguous().numpy(),
        "classes": np.array(subject.classes, dtype=np.str_),
        "num_experts": np.array(answers["clean"].num_experts),
        "attack": np.array(names[0]),
        "norm": np.array(subject.threat.norm),
        "eps": np.array(subject.threat.eps),
        DIGEST: np.array(subject.digest or ""),
    }
    for kind, each in answers.items():
        arrays[f"{kind}_prediction"] = each.prediction.numpy()
        arrays[f"{kind}_confidence"] = each.confidence.numpy()
        arrays[f"{kind}_pathway"] = each.pathway.numpy()
    path = subject.home / GALLERY
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays)
    return path


def _few(number: int) -> int:
    if positive("number", number) > _MOST:
        raise InputError(f"number must be <= {_MOST} (a page shows them all), got {number}")
    return number


def _sampled(predict: Predict, data: Images, number: int, seed: int, device: torch.device) -> Tensor:
    """Positions in `data` of at most `number` images, drawn from `_CANDIDATES` or more."""
    shuffled = torch.randperm(len(data), generator=generator_for(seed, "gallery"))[: max(_CANDIDATES, 8 * number)]
    x, y = take(data.subset(shuffled), slice(0, len(shuffled)), device)
    wrong = _answers(predict, x, device).prediction != y.cpu()
    turns: Counter[tuple[bool, int]] = Counter()
    queue = []
    for position, failed, label in zip(shuffled.tolist(), wrong.tolist(), y.tolist(), strict=True):
        turns[failed, label] += 1
        queue.append((failed, turns[failed, label], label, position))
    return torch.tensor([position for *_, position in sorted(queue)[:number]])


class _Answers(NamedTuple):
    """The answers of a classifier to images, on the CPU."""

    prediction: Tensor
    """(N,) classes."""
    confidence: Tensor
    """(N,) softmax probability of the predicted class."""
    pathway: Tensor
    """(N, L), (N, L, T), or (N, 0) for a plain model."""
    num_experts: int
    """0 for a plain model."""


def _answers(predict: Predict, x: Tensor, device: torch.device) -> _Answers:
    """Classify pixels (N, C, H, W) under hard routing."""
    with measuring(predict, device), torch.no_grad(), route() as routing:
        confidence, prediction = predict(x).float().softmax(1).max(1)
    pathway = routing.pathway() if routing.choices else torch.empty(len(x), 0, dtype=torch.long)
    experts = max((scores.shape[-1] for scores in routing.scores.values()), default=0)
    return _Answers(prediction.cpu(), confidence.cpu(), pathway.cpu(), experts)

"""What an evaluation's numbers depend on: an interrupted one continues only where all of it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.data import FileSet
from advmoe.evaluation.checks import CHECKED, Check
from advmoe.evaluation.harness import Job
from advmoe.evaluation.scoring import EvaluationData, measuring, take
from advmoe.models.state import digest
from advmoe.ops import kernels_used


def fingerprint(
    predict: Predict, job: Job, names: Sequence[str], device: torch.device, checks: Sequence[Check]
) -> dict[str, Any]:
    """All that the numbers of the attacks `names` depend on, but for the code; ready for JSON."""
    model = digest(predict) if isinstance(predict, nn.Module) else None
    steady = job.setting.eot is None and all(each.passed for each in checks if each.name == "deterministic")
    if model is None and steady:  # without weights to compare, what it makes of the first images
        with measuring(predict, device), torch.no_grad():
            model = _digest(predict(take(job.data, slice(0, CHECKED), device)[0]).argmax(1))
    return {
        "attacks": list(names),
        "threat": asdict(job.setting.threat),
        "batch_size": job.batch_size,
        "seed": job.seed,
        "attack": job.setting.described,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels_used() if device.type == "cpu" else None,
        "data": _data_digest(job.data),
        "model": model,
    }


def _data_digest(data: EvaluationData) -> str:
    """A digest of the examples; of those in files, of what would tell that a file has changed."""
    if isinstance(data, FileSet):
        return data.digest()
    return _digest(*(data if isinstance(data, tuple) else (data.images, data.labels)))


def _digest(*tensors: Tensor) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]

"""How numbers are taken: by the model as deployed, in eval mode and fp32, on images projected into the threat model.

Axes: `N` examples, `B` batch, `C` channels, `H W` size, `K` classes, `L` MoE layers. Pixels are in [0, 1].
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.attacks.base import Attack
from advmoe.attacks.pgd import Predict
from advmoe.attacks.routed import Pass
from advmoe.data import FileSet, Images, ImageSet
from advmoe.errors import InputError, of_machine
from advmoe.evaluation.randomised import draws_of, mean_of
from advmoe.models.compute import computing
from advmoe.models.modes import frozen
from advmoe.moe.routing import route
from advmoe.precision import full_fp32
from advmoe.seeding import seed_for
from advmoe.text import one_line, show
from advmoe.threat import ThreatModel

EvaluationData = Images | tuple[Tensor, Tensor]
"""Images with labels: an `ImageSet` or `FileSet`, or pixels (N, C, H, W) in [0, 1] and classes (N,)."""


def in_memory(data: EvaluationData | Iterable[tuple[Tensor, Tensor]]) -> EvaluationData:
    """`data`, or the batches (pixels (N, C, H, W), classes (N,)) of an iterable, as one. Raises `InputError` for
    batches of no or of several image shapes.
    """
    if isinstance(data, ImageSet | FileSet):
        return data
    if isinstance(data, tuple):
        pixels, classes = _pair(data)
        return torch.as_tensor(pixels), torch.as_tensor(classes)
    if not isinstance(data, Iterable):
        raise InputError(f"data must be (pixels (N, C, H, W), classes (N,)) or batches of such, got {show(data)}")
    batches = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in map(_pair, data)]
    shapes = {tuple(x.shape[1:]) for x, _ in batches}
    if len(shapes) != 1:
        got = "no batch" if not shapes else f"images of {', '.join(map(str, sorted(shapes)))}"
        raise InputError(f"data must be batches of images of one shape, got {got}")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _pair(batch: Any) -> Any:
    """A batch that is one. Raises `InputError` for anything else, a single image and its class among them."""
    sound = isinstance(batch, tuple | list) and len(batch) == 2 and not any(isinstance(each, tuple) for each in batch)
    if not sound or not all(np.ndim(each) for each in batch):
        raise InputError("data must be (pixels (N, C, H, W), classes (N,)) or batches of such, got something else")
    return batch


@contextmanager
def measuring(predict: Predict, device: torch.device) -> Iterator[None]:
    """Inside: eval mode, frozen parameters, hard routing, full fp32, and experts computed in the way that suits
    `device` (`compute_on`). Restores what was set before.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with full_fp32(), frozen(predict), route(), autocast, computing(predict, "auto", device):
        yield


@contextmanager
def answering(x: Tensor) -> Iterator[None]:
    """Inside, what a classifier raises on images `x` becomes a one-line `ValueError`; lack of memory stays itself."""
    try:
        yield
    except Exception as error:
        if of_machine(error):
            raise
        got = one_line(error)
        raise InputError(f"model must take images {tuple(x.shape)} without an error, got {got}") from error


def take(data: EvaluationData, index: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """The chosen examples on `device`: channels-last pixels (B, C, H, W) and classes (B,)."""
    if isinstance(data, tuple):
        x, y = data[0][index], data[1][index]
    else:
        x, y = data.pixels(index), data.labels[index]
    return x.to(device).contiguous(memory_format=torch.channels_last), y.to(device, torch.long)


def device_of(predict: Predict) -> torch.device:
    """Where a module's parameters and buffers are, by the first of them; the CPU for any other callable."""
    tensors = chain(predict.parameters(), predict.buffers()) if isinstance(predict, nn.Module) else iter(())
    return next((each.device for each in tensors), torch.device("cpu"))


def stream(data: EvaluationData, slices: Sequence[slice], device: torch.device) -> Generator[tuple[Tensor, Tensor]]:
    """The examples of each slice in turn, as `take` gives them; those in files are decoded ahead."""
    if not isinstance(data, FileSet):
        yield from (take(data, index, device) for index in slices)
        return
    everything = torch.arange(len(data))
    with closing(data.to(device).batches([everything[index] for index in slices])) as batches:
        for images, y in batches:
            yield images.to(torch.float32).div_(255).contiguous(memory_format=torch.channels_last), y


def size(data: EvaluationData) -> int:
    """The number of examples. Raises `ValueError` for none, or where images and labels differ in number."""
    images, labels = (len(data[0]), len(data[1])) if isinstance(data, tuple) else (len(data), len(data))
    if images == 0 or images != labels:
        raise InputError(
            f"data must hold at least 1 example, and a class for each, got {images} images, {labels} labels"
        )
    return images


def is_routed(predict: Predict, data: EvaluationData, device: torch.device) -> bool:
    """Whether MoE layers of ours run inside `predict`, module or any other callable: seen on the first example.

    Raises `ValueError` where `predict` does not take it.
    """
    size(data)
    x, _ = take(data, slice(0, 1), device)
    with measuring(predict, device), torch.no_grad(), answering(x), route() as routing:
        predict(x)
        return bool(routing.choices)


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Whether each row's largest logit is its class's. A row with NaN or infinity has none, whatever `argmax` says;
    minus infinity is a class that the model rules out.
    """
    return (logits.argmax(1) == y) & ~(logits.isnan() | logits.isposinf()).any(1)


@dataclass
class Counted:
    """A classifier that counts the images it is asked about: a gradient pass counts as both."""

    predict: Predict
    forward: int = 0
    gradient: int = 0
    gradient_passes: int = 0
    """Over whichever images: those that withstand an attack are in all of its passes."""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, K) of pixels (N, C, H, W)."""
        self.forward += len(x)
        if torch.is_grad_enabled() and x.requires_grad:
            self.gradient += len(x)
            self.gradient_passes += 1
        return self.predict(x)


@dataclass
class OpenRouting:
    """A routed model with its routing laid open, as `attacks.routed` wants it. Of a randomised one scores are averaged
    too, and the pathway is that of the last draw.
    """

    predict: Predict

    def __call__(self, x: Tensor, *, temperature: float | None = None, forced: Tensor | None = None) -> Pass:
        """Run images `x` (N, C, H, W): hard, or mixed by softmax(scores / temperature), or along `forced` (N, L)."""
        passes = [self._pass(draw, x, temperature, forced) for draw in draws_of(self.predict)]
        if len(passes) == 1:
            return passes[0]
        scores = tuple(torch.stack(each).mean(0) for each in zip(*(each.scores for each in passes), strict=True))
        return Pass(mean_of([each.logits for each in passes]), scores, passes[-1].pathway)

    @staticmethod
    def _pass(predict: Predict, x: Tensor, temperature: float | None, forced: Tensor | None) -> Pass:
        mode = route("hard", forced=forced) if temperature is None else route("soft", temperature=temperature)
        with mode as routing:
            logits = predict(x)
        scores = tuple(routing.scores[layer] for layer in sorted(routing.scores))
        return Pass(logits, scores, routing.pathway())


@dataclass
class Outcome:
    """What one attack did to a batch."""

    robust: Tensor
    """Whether each example is still classified correctly, (N,); those wrong without an attack are not."""
    predicted: Tensor
    """The class predicted for the adversarial image, (N,)."""
    x_adv: Tensor
    """The adversarial images, (N, C, H, W); clean where an example was not attacked."""
    parts: list[dict[str, int | str]] = field(default_factory=list)
    """Per part, its name, how many examples it attacked and how many it broke."""
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_attack(
    attack: Attack,
    predict: Predict,
    x: Tensor,
    y: Tensor,
    *,
    threat: ThreatModel,
    purpose: tuple[int | str, ...],
) -> Outcome:
    """Attack `x` (N, C, H, W) of classes `y`, and score what the attack returns by `predict`, whatever it claims.

    Every adversarial image is projected into the threat model first; pixels that are not finite become the clean
    image's. Only examples that are right without an attack, and that no earlier part has broken, are attacked. The
    attack's seed follows from `purpose`.
    """
    started = time.perf_counter()
    with torch.no_grad():
        logits = predict(x)
    outcome = Outcome(correct(logits, y), logits.argmax(1), x.clone(), flags=list(attack.flags))
    for part in attack.parts:
        left = outcome.robust.nonzero()[:, 0]
        broken = 0
        if len(left):
            proposal = part.run(x[left], y[left], seed_for(*purpose, attack.name, part.name))
            x_adv = torch.where(proposal.x_adv.isfinite(), proposal.x_adv.detach().to(x.dtype), x[left])
            x_adv = threat.project(x_adv, x[left]).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                logits = predict(x_adv)
            robust = correct(logits, y[left])
            outcome.x_adv[left], outcome.predicted[left], outcome.robust[left] = x_adv, logits.argmax(1), robust
            broken = int((~robust).sum())
            outcome.flags += [flag for flag in proposal.flags if flag not in outcome.flags]
        outcome.parts.append({"name": part.name, "attempted": len(left), "broken": broken})
    outcome.seconds = time.perf_counter() - started
    return outcome

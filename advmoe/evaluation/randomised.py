"""Randomised models, whose answer to the same images differs from pass to pass: averaged over draws.

Axes: `N` batch, `C` channels, `H W` size, `K` classes. Pixels are in [0, 1].

What is deployed is then the mean of the draws' probabilities, and its gradient is the mean of the draws' gradients:
expectation over transformation (Athalye et al., ICML 2018). Attacks and scores draw anew in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks.pgd import Predict
from advmoe.seeding import seed_for


def mean_of(logits: Sequence[Tensor]) -> Tensor:
    """The log of the mean of several draws' probabilities, (N, K), from their logits, (N, K) each."""
    each = [F.log_softmax(draw.to(torch.promote_types(draw.dtype, torch.float32)), 1) for draw in logits]
    return torch.stack(each).logsumexp(0) - math.log(len(each))


@dataclass(frozen=True)
class Averaged:
    """A randomised classifier that answers by the mean over `draws`."""

    predict: Predict
    draws: int

    def __call__(self, x: Tensor) -> Tensor:
        """`mean_of` the draws for pixels (N, C, H, W): log-probabilities, (N, K), as good as logits."""
        return mean_of([self.predict(x) for _ in range(self.draws)])


def draws_of(predict: Predict) -> list[Predict]:
    """The classifier once for each of its draws."""
    return [predict.predict] * predict.draws if isinstance(predict, Averaged) else [predict]


@contextmanager
def averaged(predict: Predict, eot: int | None, *purpose: int | str) -> Iterator[Predict]:
    """Yields `predict` itself or, with `eot`, its mean over so many draws, which inside follow from `purpose`.

    They are PyTorch's own: of its default generators, whose state is restored.
    """
    if eot is None:
        yield predict
        return
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed_for(*purpose, "draws"))
        yield Averaged(predict, eot)


@dataclass(frozen=True)
class Repeatable:
    """A randomised classifier averaged over draws that are the same in every pass: what can be checked before an
    attack.
    """

    predict: Predict
    draws: int

    def __call__(self, x: Tensor) -> Tensor:
        """As `Averaged`."""
        with averaged(self.predict, self.draws, "check") as predict:
            return predict(x)

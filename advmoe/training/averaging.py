"""An exponential moving average of a model's weights over its training.

Source: Polyak & Juditsky, 1992; for adversarial training Rebuffi et al., NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def floats(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, tied ones once, without their gradients."""
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


class WeightAverage:
    """The average of `model`'s parameters, and of its batch norms' statistics, which would not fit other weights.

    After the n-th update (from 0) the average weighs what it was by min(decay, (1 + n) / (10 + n)), so that it soon
    forgets the weights that the run began with. What does not change keeps its bits.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.clone() for name, tensor in floats(model).items()}

    def update(self, model: nn.Module, number: int) -> None:
        """Take in the weights that `model` has after iteration `number` (from 0) of its run."""
        decay = min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(list(self.state.values()), list(floats(model).values()), 1 - decay)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state` that was saved."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    def buffers(self, model: nn.Module) -> list[Tensor]:
        """The averaged buffers of `model`."""
        return [self.state[name] for name, _ in model.named_buffers() if name in self.state]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The average in the place of `model`'s weights inside, and these in the average's."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for name, current in floats(model).items():
            weights = current.clone()
            current.copy_(self.state[name])
            self.state[name].copy_(weights)

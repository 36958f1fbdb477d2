"""Routers in eval mode, and the probabilities of their choices.

Axes: `N` batch, `C` channels, `E` experts.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advmoe.ops.raw.build import built
from advmoe.ops.raw.tensors import address, room, threads_for


def chosen_probability(scores: Tensor, choice: Tensor) -> Tensor:
    """The softmax probability of each sample's `choice` (N,), 0 to E-1, by fp32 `scores` (N, E) that `suits`: (N,)."""
    n, experts = scores.shape
    probability = room(n)
    built().functions["gate"](scores.data_ptr(), choice.data_ptr(), n, experts, probability.data_ptr())
    return probability


def chosen_probability_backward(scores: Tensor, choice: Tensor, grad: Tensor) -> Tensor:
    """The gradient for `scores` (N, E) of `chosen_probability`, by that of its result (N,)."""
    n, experts = scores.shape
    out = torch.empty_like(scores)
    built().functions["ungate"](scores.data_ptr(), choice.data_ptr(), grad.data_ptr(), n, experts, out.data_ptr())
    return out


_ROUTER = ("mean", "variance", "norm_weight", "norm_bias", "weight", "bias", "last_weight", "last_bias")


class _Router(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "hidden", "experts")),
        *((name, ctypes.c_void_p) for name in _ROUTER),
        ("eps", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Scorer:
    """A batch norm in eval mode, a linear layer, ReLU and a linear layer, none of which learns: pooled features (N, C)
    -> scores (N, E). All parameters are fp32, on the CPU and contiguous.
    """

    norm: nn.BatchNorm1d
    hidden: nn.Linear
    last: nn.Linear

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that it computes with."""
        norm, hidden, last = self.norm, self.hidden, self.last
        learnable = norm.weight, norm.bias, hidden.weight, hidden.bias, last.weight, last.bias
        return norm.running_mean, norm.running_var, *learnable

    def _router(self) -> _Router:
        norm, hidden, last, each = self.norm, self.hidden, self.last, self.tensors()
        sizes = hidden.in_features, hidden.out_features, last.out_features
        return _Router(*sizes, *map(address, each), norm.eps)

    def scores(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The scores (N, E), and what the gradient needs, of `pooled` (N, C), which `suits`."""
        n = len(pooled)
        hidden = room(n, self.hidden.out_features)
        scores = room(n, self.last.out_features)
        run, router = built().functions["score"], self._router()
        run(ctypes.addressof(router), pooled.data_ptr(), n, hidden.data_ptr(), scores.data_ptr(), threads_for(n))
        return scores, hidden

    def backward(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """The gradient for the pooled features (N, C), by that of the scores (N, E)."""
        n = len(grad)
        pooled = room(n, self.hidden.in_features)
        run, router = built().functions["unscore"], self._router()
        run(ctypes.addressof(router), hidden.data_ptr(), grad.data_ptr(), n, pooled.data_ptr(), threads_for(n))
        return pooled

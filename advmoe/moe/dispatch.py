"""Which samples go to which expert.

Axes: `N` batch, `E` experts, `n_e` samples of expert e.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Which samples go to which expert: `members[i]` (n_e,) are the positions in the batch of expert `experts[i]`'s.

    Experts without a sample are left out; where one expert has them all, nothing is moved and `members` is empty.
    """

    experts: tuple[int, ...]
    members: tuple[Tensor, ...]
    beside: tuple[int, ...] = ()
    """Other numbers that came from the device in the same transfer."""

    @staticmethod
    def of(choice: Tensor, num_experts: int, beside: Tensor | None = None) -> Plan:
        """Group the samples of `choice`, (N,) expert indices, by expert; order within a group is kept.

        An accelerator is waited for once; whole numbers `beside` (M,) come in the same transfer.
        """
        if len(choice) == 1 and beside is None:
            return Plan((int(choice.item()),), ())
        if beside is None:
            beside = choice[:0]
        if on_host(choice):
            chosen, others = choice.numpy(), tuple(beside.tolist())
            members = {e: where for e in range(num_experts) if len(where := np.flatnonzero(chosen == e))}
            if len(members) < 2:
                return Plan((next(iter(members), 0),), (), others)
            return Plan(tuple(members), tuple(map(torch.from_numpy, members.values())), others)
        # One wait for the device; `bincount` would add two.
        per_expert = (choice[:, None] == torch.arange(num_experts, device=choice.device)).sum(0)
        numbers: list[int] = torch.cat([per_expert, beside.to(choice.device)]).tolist()
        counts, others = numbers[:num_experts], tuple(numbers[num_experts:])
        used = tuple(e for e, n in enumerate(counts) if n) or (0,)
        if len(used) == 1:
            return Plan(used, (), others)
        order = choice.argsort(stable=True)
        return Plan(used, order.split([counts[e] for e in used]), others)


def on_host(x: Tensor) -> bool:
    """Whether the values of `x` are there to be looked at; else a look waits for a device."""
    return x.device.type == "cpu"

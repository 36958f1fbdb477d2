"""A module's state as weight files take it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def savable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` on the CPU, contiguous, each in memory of its own: tied ones under each of their names."""
    found, taken = dict[str, Tensor](), set[int]()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if place in taken else plain
        taken.add(place)
    return found

"""Kinds of networks by name: what is made of a backbone."""

from __future__ import annotations

from dataclasses import dataclass

from advmoe.tables.table import Table


@dataclass(frozen=True)
class Kind:
    """What is made of a backbone, whose layers have the channels of Dense."""

    label: str
    """What tables and pages call it."""
    routed: bool = False
    """Whether its layers are MoE layers, each with experts and a choice among them."""
    narrow: bool = False
    """Whether its layers (of a routed one, a pathway's) have `model.scale` times the channels of Dense."""
    masked: bool = False
    """Whether learnt masks keep `model.scale` of the channels of Dense; no backbone of tokens has such masks."""


KINDS: Table[Kind] = Table(
    "model.kind",
    {
        "moe": Kind("MoE", routed=True, narrow=True),
        "dense": Kind("Dense"),
        "s-dense": Kind("S-Dense", narrow=True),
        "sparse": Kind("Sparse", masked=True),
    },
)

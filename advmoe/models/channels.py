"""Which channels of a network must stay or be dropped together.

Layers whose outputs are added up (all that write to a residual stream, its projection shortcuts included) share their
channels; concatenated feature maps keep their own. Channels that belong together are a *group*, and a tensor's channels
are those of one group or of several, one after another.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch import Tensor, fx, nn

_READERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Axis:
    """The channels along one axis of a tensor; of no group where all stay (the image's, the logits')."""

    groups: tuple[int, ...]
    """Whose channels they are, in order."""
    repeat: int = 1
    """Entries of each channel: the pixels of a feature map that was flattened."""


@dataclass(frozen=True)
class Layout:
    """The groups of a network, and where their channels are."""

    sizes: tuple[int, ...]
    """Channels of each group."""
    outputs: Mapping[str, Axis]
    """The output channels of each convolution, linear layer and batch norm, by its name."""
    inputs: Mapping[str, Axis]
    """The input channels of each convolution and linear layer, by its name."""

    def slices(self, surviving: list[Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Per layer, the (rows, columns) of its tensors that survive, None for all; `surviving` are each group's
        channels.
        """

        def index(axis: Axis) -> Tensor | None:
            if not axis.groups:
                return None
            starts = [sum(self.sizes[g] for g in axis.groups[:i]) for i in range(len(axis.groups))]
            channels = torch.cat([surviving[g] + start for g, start in zip(axis.groups, starts, strict=True)])
            entries = torch.arange(axis.repeat, device=channels.device)
            return (channels[:, None] * axis.repeat + entries).flatten()

        return {
            name: (index(axis), index(self.inputs[name]) if name in self.inputs else None)
            for name, axis in self.outputs.items()
        }


class _Tracer(fx.Tracer):
    """Looks into blocks, not into layers: subclasses of PyTorch's are layers too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_READERS, nn.BatchNorm2d, nn.ReLU)) or super().is_leaf_module(m, module_qualified_name)


def channel_layout(network: nn.Module) -> Layout:
    """The groups of a network of convolutions, batch norms, linear layers, sums and concatenations, by its graph."""
    union, groups = _Union(), dict[fx.Node, tuple[int, ...]]()
    outputs, inputs = dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
    for node in _Tracer().trace(network).nodes:
        sources = [groups[source] for source in node.all_input_nodes]
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, _READERS):
            inputs[node.target] = sources[0]
            size = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            outputs[node.target] = groups[node] = (union.new(size),)
        elif isinstance(module, nn.BatchNorm2d):
            outputs[node.target] = groups[node] = sources[0]
        elif node.target is torch.cat:
            groups[node] = tuple(chain(*(groups[part] for part in cast(tuple[fx.Node, ...], node.args[0]))))
        else:
            groups[node] = sources[0] if sources else ()
            for other in sources[1:]:
                union.join(groups[node], other)
    (logits,) = groups[node]  # of the last one, the graph's output
    return _numbered(network, union, logits, outputs, inputs)


class _Union:
    """Groups that turn out to be one (union-find)."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.sizes: list[int] = []

    def new(self, size: int) -> int:
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        return self.parents[-1]

    def root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def join(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        """Make one of the groups that are added to one another."""
        for a, b in zip(ours, theirs, strict=True):
            assert self.sizes[a] == self.sizes[b], "what is added has the same channels"
            self.parents[self.root(b)] = self.root(a)


def _numbered(
    network: nn.Module,
    union: _Union,
    logits: int,
    outputs: Mapping[str, tuple[int, ...]],
    inputs: Mapping[str, tuple[int, ...]],
) -> Layout:
    """The layout, its groups numbered in the order of the graph, the logits' left out."""
    roots = [root for root in dict.fromkeys(map(union.root, range(len(union.parents)))) if root != union.root(logits)]
    number = {root: index for index, root in enumerate(roots)}
    sizes = tuple(union.sizes[root] for root in roots)

    def axis(groups: tuple[int, ...], length: int) -> Axis:
        known = tuple(number[root] for root in map(union.root, groups) if root in number)
        return Axis(known, length // sum(sizes[g] for g in known)) if known else Axis(())

    weights = {name: cast(Tensor, network.get_submodule(name).weight) for name in outputs}
    return Layout(
        sizes,
        {name: axis(groups, len(weights[name])) for name, groups in outputs.items()},
        {name: axis(groups, weights[name].shape[1]) for name, groups in inputs.items()},
    )

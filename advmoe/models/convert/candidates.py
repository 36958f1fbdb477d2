"""Which layers of a network can become MoE layers, and why each of the others cannot.

Axes: `N` batch, `C` channels, `H W` size.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from advmoe.errors import InputError
from advmoe.models.convert.probe import logits_of
from advmoe.moe.described import asks_no_values
from advmoe.ops import listened
from advmoe.text import few


@dataclass
class Candidate:
    """A layer that might be converted."""

    name: str
    module: nn.Conv2d | nn.Linear
    reason: str | None
    """Why it stays plain, if so."""
    turn: int
    """Its place among the layers, in the order of the pathway."""


def candidates(
    module: nn.Module, skip: tuple[str, ...], linear: tuple[str, ...], *, depthwise: bool
) -> list[Candidate]:
    """Every convolution and every linear layer asked for, in the order of `named_modules`."""
    names, owners = _occurrences(module)
    there = {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
    _require_matches("linear", linear, [name for name, each in there.items() if isinstance(each, nn.Linear)])
    wanted = {name: each for name, each in there.items() if isinstance(each, nn.Conv2d) or _matching(name, linear)}
    _require_matches("skip", skip, list(wanted))
    layers: list[Candidate] = []
    for name, layer in wanted.items():
        reason = "named in skip" if _matching(name, skip) else _obstacle(name, layer, names, owners)
        if reason is None and isinstance(layer, nn.Conv2d) and 1 < layer.in_channels == layer.groups:
            reason = None if depthwise else "depthwise"
        layers.append(Candidate(name, layer, reason, len(layers)))
    return layers


def _occurrences(module: nn.Module) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """The names of each module, and of the modules that own each parameter, by identity."""
    names, owners = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
    for name, each in module.named_modules(remove_duplicate=False):
        if id(each) not in names:
            for parameter in each.parameters(recurse=False):
                owners[id(parameter)].append(name)
        names[id(each)].append(name)
    return names, owners


def _obstacle(
    name: str, layer: nn.Conv2d | nn.Linear, names: dict[int, list[str]], owners: dict[int, list[str]]
) -> str | None:
    """Why this layer cannot be replaced by copies of itself, if so."""
    if any(is_lazy(each) for each in chain(layer.parameters(), layer.buffers())):
        return "its shape is not known before it has run (give an example)"
    if is_parametrized(layer):
        return "parametrised"
    others = [other for other in names[id(layer)] if other != name]
    others += [other for parameter in layer.parameters() for other in owners[id(parameter)] if other != name]
    if others:
        return f"shared with {others[0]}"
    if "forward" in vars(layer):
        return "its forward was replaced"
    if any(map(listened, layer.modules())):
        return "it has hooks"
    inside = chain.from_iterable(child.parameters() for child in layer.children())
    if next(chain(inside, layer.buffers()), None) is not None:
        return f"a {type(layer).__name__} with buffers, or parameters of modules inside"
    rows = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    if layer._parameters.get("weight") is None or {each.shape[:1] for each in layer.parameters()} != {(rows,)}:
        return f"a {type(layer).__name__} whose parameters are not one row per output"
    return None


def _matching(name: str, patterns: Sequence[str]) -> list[str]:
    """The patterns that name this layer, or a module that it lies in."""
    words = name.split(".")
    above = [".".join(words[: i + 1]) for i in range(len(words))]
    return [pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in above)]


def _require_matches(argument: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matching(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            there = f"did you mean {near[0]}?" if near else f"there are {few(names) or 'none'}"
            kind = "Linear layers" if argument == "linear" else "layers to convert"
            raise InputError(f"{argument} must name {kind} of the network ({there}), got {pattern!r}")


def watch(layers: list[Candidate], model: nn.Module, example: Tensor) -> None:
    """Run `model` on `example` (N, C, H, W), and note of each layer its turn and the reason to leave it plain: what it
    runs on, or that others read its parameters.
    """
    ran = set[str]()

    def hook(each: Candidate, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        axes = 4 if isinstance(each.module, nn.Conv2d) else None
        if not isinstance(x, Tensor) or x.dim() != (axes or max(2, x.dim())) or len(x) != len(example):
            shape = tuple(x.shape) if isinstance(x, Tensor) else "no tensor"
            each.reason = f"it does not run on one row per image (of {len(example)}, on {shape})"
        if each.name not in ran:
            each.turn = len(ran)
        ran.add(each.name)

    watched = [each for each in layers if each.reason is None]
    reads = _Reads(watched)
    handles = [
        each.module.register_forward_hook(lambda _, args, output, each=each: hook(each, args)) for each in watched
    ]
    for each in watched:
        handles.append(each.module.register_forward_pre_hook(lambda module, _: reads.running.add(id(module))))
        handles.append(each.module.register_forward_hook(lambda module, *_: reads.running.discard(id(module))))
    try:
        with reads:
            logits_of(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for each in watched:
        if each.name not in ran:
            each.reason = each.reason or "it does not run"


class _Reads(TorchFunctionMode):
    """Notes each layer whose parameters are computed with while it does not run itself."""

    def __init__(self, layers: list[Candidate]) -> None:
        super().__init__()
        self.owners = {
            id(parameter): (name, each) for each in layers for name, parameter in each.module.named_parameters()
        }
        self.running = set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Have PyTorch do it, and note what it is done to."""
        kwargs = kwargs or {}
        if not asks_no_values(func, args):
            for value in _flat((*args, *kwargs.values())):
                name, layer = self.owners.get(id(value), ("", None))
                if layer is not None and id(layer.module) not in self.running:
                    layer.reason = layer.reason or f"the network reads its {name}"
        return func(*args, **kwargs)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value

"""Boxes: what activations can be for any image of a set, as a lower and an upper bound of each number.

A network's own code runs on them, one function of PyTorch after another, by the rule of each; one without a rule is
refused. Linear maps go by centre and radius (Gowal et al., ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.moe.described import KNOWN


class Unbounded(Exception):
    """No bounds can be computed; the text says of what none are known."""


class Box:
    """The tensors between `low` and `high`, which share no memory. Functions and methods that have a rule take a box in
    the place of a tensor, and make one; shape, type and place can be asked for.

    Raises `Unbounded` for any other function, which includes asking for values.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Box:
        """By the function's rule."""
        return through(func, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in KNOWN:
            return getattr(self.low, name)
        method = getattr(Tensor, name, None)
        if not callable(method):
            raise Unbounded(f"a tensor's {name}")
        return partial(through, method, self)

    def __len__(self) -> int:
        return len(self.low)

    def __bool__(self) -> bool:
        raise Unbounded("a tensor's truth")  # a network would go on by the answer

    def __add__(self, other: object) -> Box:
        return through(Tensor.add, self, other)

    def __radd__(self, other: object) -> Box:
        return through(Tensor.add, self, other)

    def __iadd__(self, other: object) -> Box:
        return self._become(self + other)

    def __sub__(self, other: object) -> Box:
        return through(Tensor.sub, self, other)

    def __mul__(self, other: object) -> Box:
        return through(Tensor.mul, self, other)

    def __rmul__(self, other: object) -> Box:
        return through(Tensor.mul, self, other)

    def __truediv__(self, other: object) -> Box:
        return through(Tensor.div, self, other)

    def __getitem__(self, index: object) -> Box:
        return through(Tensor.__getitem__, self, index)

    def __eq__(self, other: object) -> bool:
        raise Unbounded("a comparison")

    __hash__ = object.__hash__

    def _become(self, other: Box) -> Box:
        """Overwritten, and with it all that shares its memory, as in the network."""
        self.low.copy_(other.low)
        self.high.copy_(other.high)
        return self


def through(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Box:
    """What `function` makes of boxes among its arguments, by its rule. Raises `Unbounded` where it has none."""
    rule = _RULES.get(function)
    if rule is None or settings.get("training"):
        raise Unbounded(str(getattr(function, "__name__", function)))
    inplace = settings.pop("inplace", False)
    box = rule(function, *arguments, **settings)
    return arguments[0]._become(box) if inplace else box


def _at(end: str, value: Any) -> Any:
    """An argument with the boxes in it replaced by one `end` of theirs."""
    if isinstance(value, list | tuple):
        return tuple(_at(end, each) for each in value)
    return getattr(value, end) if isinstance(value, Box) else value


def _rising(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Box:
    """Of a function that falls in no entry of any box: the low end's and the high end's value."""
    low, high = (function(*_at(end, arguments), **settings) for end in ("low", "high"))
    return Box(low, high)


def _alone(function: Callable[..., Any], x: Any, *others: Any) -> Box:
    """`x`, the one argument that is a box."""
    if not isinstance(x, Box) or any(isinstance(each, Box) for each in others):
        raise Unbounded(f"{function.__name__} of two activations")
    return x


def _added(function: Callable[..., Any], x: Any, y: Any) -> Box:
    return _rising(function, x, y)


def _scaled(function: Callable[..., Any], x: Any, *others: Any, **settings: Any) -> Box:
    """Of a function that takes each entry by itself, and either rises or falls in it."""
    x = _alone(function, x, *others, *settings.values())
    ends = [function(end, *others, **settings) for end in (x.low, x.high)]
    return Box(torch.minimum(*ends), torch.maximum(*ends))


def _linear(
    function: Callable[..., Any], x: Any, weight: Tensor, bias: Tensor | None = None, *others: Any, **settings: Any
) -> Box:
    """The centre's image, and the radius under the weights' sizes."""
    x = _alone(function, x, weight, bias)
    centre = function((x.low + x.high) / 2, weight, bias, *others, **settings)
    radius = function((x.high - x.low) / 2, weight.abs(), None, *others, **settings)
    return Box(centre - radius, centre + radius)


_LOWEST: dict[Callable[..., Any], float] = {F.gelu: -0.75179152469356446, F.silu: -1.27846454276107380}
"""Where these are least: they fall before and rise after."""


def _dipping(function: Callable[..., Any], x: Any, *, approximate: str = "none") -> Box:
    """Of a function with one dip: its least value where the dip is inside."""
    if approximate != "none":
        raise Unbounded(f"{function.__name__} by {approximate}")
    box, dip = _scaled(function, x), _LOWEST[function]
    least = function(torch.full_like(box.low, dip))
    return Box(torch.where((x.low < dip) & (x.high > dip), least, box.low), box.high)


_Rule = Callable[..., Box]
_RULES: dict[Callable[..., Any], _Rule] = {
    Tensor.add: _added, torch.add: _added,
    **dict.fromkeys((Tensor.sub, Tensor.mul, Tensor.div, F.batch_norm), _scaled),
    **dict.fromkeys((F.linear, F.conv2d), _linear),
    **dict.fromkeys(_LOWEST, _dipping),
    **dict.fromkeys(
        (
            F.relu, torch.relu, Tensor.relu, F.hardtanh, torch.sigmoid, torch.tanh, F.max_pool2d, torch.max_pool2d,
            F.avg_pool2d, F.adaptive_avg_pool2d, Tensor.mean, Tensor.sum, torch.cat, F.pad, F.dropout,
            torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, Tensor.permute, Tensor.transpose,
            Tensor.contiguous, Tensor.__getitem__,
        ),
        _rising,
    ),
}  # fmt: skip

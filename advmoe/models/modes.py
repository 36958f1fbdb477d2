"""Train and eval modes, and which parameters learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advmoe.models.folding import folding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, also for a module whose parameters have no shape yet. Restores every part's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: object) -> Iterator[None]:
    """Eval mode and no parameter gradients inside: what an attack on the current model needs. Restores both, for every
    module and parameter as it was.

    Anything that is no module (a plain callable) is left alone. Batch norms are folded into the convolutions ahead of
    them (`folding`), anew after every change of either but through `.data`: faster, and other in the last bits than
    `model.eval()` alone.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes, wanted = [m.training for m in modules], [p.requires_grad for p in parameters]
    for module in modules:
        module.training = False
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with folding():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, needs in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(needs)


class Undrawn(TorchFunctionMode):
    """Inside, modules are built without drawing their weights, which are to come from elsewhere. They are 0: some
    initialisations draw again what is out of range.
    """

    _DRAWS = (
        Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
    )  # fmt: skip

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._DRAWS:
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            with torch.no_grad():
                return tensor.zero_()
        return func(*args, **(kwargs or {}))

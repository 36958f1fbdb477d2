"""A layer of somebody else's as an MoE layer, computed by its own `forward`.

Axes: `N` batch, `R` rows of one expert, `E` experts.
"""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn
from torch.func import functional_call

from advmoe.errors import InputError
from advmoe.moe.described import Described
from advmoe.moe.layer import MoELayer
from advmoe.moe.routers import LayerRouter, MakeRouter


class MoEWrapped(MoELayer):
    """A layer of which every sample computes one expert, each expert being a copy of the layer's parameters.

    For subclasses whose `forward` does more than the class that they derive from (a convolution that standardises its
    weights, or pads by the image's size): that code runs with the chosen expert's parameters.

    Args:
        inner: the layer, taken over. Its parameters must all have R rows, and it no buffers; modules inside it (one
            that pads, say) must have neither.
        c_in: channels or features that it takes. The rest is as of `MoEConv2d`.
    """

    def __init__(
        self, inner: nn.Module, c_in: int, *, num_experts: int, layer: int, make_router: MakeRouter | None = LayerRouter
    ) -> None:
        own = dict(inner.named_parameters(recurse=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        rows = {shape[:1] for shape in shapes.values()}
        if len(rows) != 1 or () in rows:
            raise InputError(f"inner must have parameters, all with as many rows, got {shapes}")
        inside = chain.from_iterable(child.parameters() for child in inner.children())
        if next(chain(inside, inner.buffers()), None) is not None:
            rule = "inner must have no buffers, and no parameters but its own"
            raise InputError(f"{rule}, got a {type(inner).__name__}")
        (((count),),) = rows
        router = make_router(c_in, num_experts) if make_router else None
        super().__init__(
            bank_rows=num_experts * count, expert_rows=count, num_experts=num_experts, layer=layer, router=router
        )
        self.names = tuple(own)
        for name, parameter in own.items():
            copies = parameter.detach().repeat(num_experts, *[1] * (parameter.dim() - 1))
            self.register_parameter(f"bank_{name}", nn.Parameter(copies, requires_grad=parameter.requires_grad))
        # In a tuple, as its own parameters are not the model's: only its code and its settings count.
        self.inner = (inner.to("meta"),)

    def banks(self) -> tuple[Tensor, ...]:
        """The layer's parameters, E times as many rows of each."""
        return tuple(getattr(self, f"bank_{name}") for name in self.names)

    def compute(self, x: Tensor, *weights: Tensor) -> Tensor:
        """What the layer makes of `x` (N, ...) with one expert's parameters (R, ...)."""
        (inner,) = self.inner
        if inner.training is not self.training:
            inner.train(self.training)
        y: Tensor = functional_call(inner, dict(zip(self.names, weights, strict=True)), (x,))
        return y

    @property
    def weight(self) -> Described:
        """Type, place and shape of one expert's weight (R, ...)."""
        bank = self._parameters["bank_weight"]
        assert bank is not None
        return Described(bank, self.expert_rows, f"the weight of {self.title}")

    @property
    def bias(self) -> Described | None:
        """Type, place and shape of one expert's bias (R,), if there is one."""
        bank = self._parameters.get("bank_bias")
        return None if bank is None else Described(bank, self.expert_rows, f"the bias of {self.title}")

    def extra_repr(self) -> str:
        """The layer and its use, for `print(model)`."""
        return f"{self.inner[0]}, experts={self.num_experts}, layer={self.layer}"

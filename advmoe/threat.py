"""The threat model: which perturbations an attacker may make, and the geometry that attacks need.

Axes: `N` batch, `C` channels, `H W` size. Pixels and `eps` are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advmoe.errors import InputError

_TINY = 1e-12


def _wide(delta: Tensor) -> Tensor:
    """`delta` in fp32 or better: in half precision squares underflow, and so does `_TINY`."""
    return delta.to(torch.promote_types(delta.dtype, torch.float32))


def _norms(delta: Tensor) -> Tensor:
    """The l2 norm of each sample's perturbation, (N, 1, 1, 1), which is `_wide`."""
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms.clamp_min(_TINY).view(-1, *[1] * (delta.dim() - 1))


def _is_number(eps: object) -> bool:
    return not isinstance(eps, str | bytes | bool) and hasattr(eps, "__float__")


def _is_radius(eps: float, norm: str) -> bool:
    return bool(eps >= 0 and math.isfinite(eps) and (norm != "linf" or eps <= 1))


@dataclass(frozen=True)
class ThreatModel:
    """A ball of radius `eps` in `norm` around each image, cut with the pixel range [0, 1].

    Raises `ValueError` for an unknown norm or a negative radius.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise InputError(f"threat.norm must be linf or l2, got {self.norm!r}")
        if not _is_number(self.eps):
            raise InputError(f"threat.eps must be a number, got {self.eps!r}")
        if not _is_radius(self.eps, self.norm):
            raise InputError(f"threat.eps must be >= 0 and, in linf, <= 1, got {self.eps!r}")
        given: object = self.eps
        if not isinstance(given, int | float):  # a fraction, say
            object.__setattr__(self, "eps", float(self.eps))

    @staticmethod
    def ascending(norm: Literal["linf", "l2"], epsilons: Iterable[float]) -> list[ThreatModel]:
        """One for each radius of `epsilons`, from small to large; at least one."""
        if not isinstance(epsilons, Iterable) or isinstance(epsilons, str | bytes) or not (listed := list(epsilons)):
            raise InputError(f"epsilons must list at least one radius, got {epsilons!r}")
        for eps in listed:
            if not _is_number(eps) or not _is_radius(eps, norm):
                raise InputError(f"epsilons must be numbers >= 0 and, in linf, <= 1, got {eps!r}")
        return [ThreatModel(norm, eps) for eps in sorted(set(map(float, listed)))]

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv`, (N, C, H, W), brought into the ball and the pixel range, for the clean images `x` of the same shape.

        In linf this is the nearest allowed image. In l2 it is an allowed one: the ball is applied before the pixel
        range and, as `x` lies in the range, clipping only shortens the perturbation. In half precision the ball of linf
        is smaller by what rounding may add to a pixel.
        """
        dtype = torch.promote_types(x_adv.dtype, x.dtype)
        if self.norm == "linf":
            eps = self.eps
            if torch.finfo(dtype).bits < 32:  # of numbers below 1, half of the last digit
                x_adv, x, eps = _wide(x_adv), _wide(x), max(0.0, eps - torch.finfo(dtype).eps / 4)
            return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1).to(dtype)
        clean = _wide(x)
        delta = _wide(x_adv) - clean
        return (clean + delta * (self.eps / _norms(delta)).clamp_max(1)).clamp(0, 1).to(dtype)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A uniform draw from the ball around each image of `x`, projected; shape (N, C, H, W)."""
        if self.norm == "linf":
            return self.project(x + self.eps * (2 * rand_like(x, generator) - 1), x)
        clean = _wide(x)
        direction = randn_like(clean, generator)
        dimensions = x.shape[1:].numel()
        radius = rand_like(clean[:, :1, :1, :1], generator) ** (1 / dimensions)
        return self.project(clean + self.eps * radius * direction / _norms(direction), clean).to(x.dtype)

    def steepest_step(self, gradient: Tensor) -> Tensor:
        """The unit-norm direction of steepest ascent for `gradient`, (N, C, H, W); zero where the gradient is."""
        if self.norm == "linf":
            return gradient.sign()
        # Scaled first: the squares of a confident model's gradients underflow, and the attack would stand still.
        wide = _wide(gradient)
        largest = wide.abs().flatten(1).amax(1).clamp_min(torch.finfo(wide.dtype).tiny)
        wide = wide / largest.view(-1, *[1] * (wide.dim() - 1))
        return (wide / _norms(wide)).to(gradient.dtype)


def rand_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform draws in [0, 1) shaped like `x`, drawn where `generator` lives so that CPU and CUDA runs agree."""
    device = generator.device if generator is not None else x.device
    return torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal draws shaped like `x`, drawn where `generator` lives."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)

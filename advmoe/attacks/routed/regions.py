"""Regions of the images that take one pathway, where choices are the sides of hyperplanes: what an attacker can reach.

Axes: `N` batch, `C` channels, `H W` size, `D` = C H W, `B` bits, `L` MoE layers. Pixels and `eps` are in [0, 1].

Bit b of image x is w_b . x > t_b. A perturbation within eps in linf that keeps pixels in [0, 1] changes the bit if and
only if |w . x - t| <= sum_i |w_i| min(eps, room_i), room_i being the way from x_i to the end of the pixel range on the
side that brings the bit nearer to its threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.pgd import LOSSES, Loss, ascend
from advmoe.attacks.routed.ascent import FirstFooling
from advmoe.attacks.routed.target import Halfspaces, RoutedTarget
from advmoe.threat import ThreatModel

_ROUNDS = 50
"""Of projections onto several bits and the ball in turn, until a point of the region is found."""
_HALVINGS = 30


def distances(space: Halfspaces, x: Tensor) -> Tensor:
    """w . x - t of each bit in fp64, (N, B), for pixels `x` (N, C, H, W)."""
    return x.double().flatten(1) @ space.weights.flatten(1).T - space.thresholds


def radii(space: Halfspaces, x: Tensor, norm: Literal["linf", "l2"], *, proved: bool = False) -> Tensor:
    """The norm of the smallest perturbation of `x` (N, C, H, W), kept in [0, 1], that brings each bit to its threshold,
    (N, B); infinite where none does.

    proved: a little less, by what rounding can move the model's own score, so that the model keeps the bit within it.
    """
    away = distances(space, x)
    need = (away.abs() - space.slack).clamp_min(0) if proved else away.abs()
    flat, columns = x.double().flatten(1), []
    for bit, weight in enumerate(space.weights.flatten(1)):
        room = torch.where((weight > 0) == (away[:, bit, None] > 0), flat, 1 - flat)
        size = weight.abs()
        if norm == "linf":
            columns.append(_level(size.expand_as(room), room, need[:, bit]))
        else:
            level = _level(size.square().expand_as(room), room / size.clamp_min(1e-30), need[:, bit])
            moved = torch.minimum(level[:, None].nan_to_num(posinf=0) * size, room)
            columns.append(moved.norm(dim=1).where(level.isfinite(), level))
    return torch.stack(columns, 1)


def _level(rate: Tensor, full: Tensor, need: Tensor) -> Tensor:
    """The least h with sum_i rate_i min(h, full_i) = `need`, (N,); infinite where there is none. rate, full: (N, D)."""
    full, order = full.sort(1)
    rate = rate.gather(1, order)
    filled = (rate * full).cumsum(1)
    rest = rate.flip(1).cumsum(1).flip(1)
    before = filled - rate * full
    enough = before + full * rest >= need[:, None]
    first = enough.int().argmax(1, keepdim=True)
    level = (need[:, None] - before.gather(1, first)) / rest.gather(1, first).clamp_min(1e-30)
    return level[:, 0].clamp_min(0).where(enough.any(1), torch.inf)


def reachable(space: Halfspaces, x: Tensor, threat: ThreatModel) -> Iterator[tuple[tuple[bool, ...], Tensor]]:
    """Which bits are flipped, and of which images (N,) an attacker may flip just these: every combination once.

    Each bit of the combination can be flipped alone. Of one bit that is exact, and of several in linf that look at
    other pixels; else images may be named that no perturbation brings there, never the reverse.
    """
    movable = radii(space, x, threat.norm, proved=True) <= threat.eps
    for flipped in product((False, True), repeat=movable.shape[1]):
        chosen = torch.tensor(flipped, device=x.device)
        yield flipped, (movable | ~chosen).all(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Region(ThreatModel):
    """The threat model cut with the half-spaces of one pathway for each image of a batch."""

    space: Halfspaces
    sides: Tensor
    """The bits that the region's images have, (N, B)."""
    inside: Tensor
    """A point of each image's region, (N, C, H, W); where none was found, the nearest thing to one."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv` brought into the region of the clean images `x`, (N, C, H, W). In linf and of one bit it is the point
        of the region nearest to the ball's own projection, else one on the way from there to `inside`.
        """
        moved = self.pushed(super().project(x_adv, x), x)
        outside = (~self.holds(moved, x)).nonzero()[:, 0]
        if len(outside) == 0:
            return moved
        part, end, start = self.of(outside), moved[outside], self.inside[outside]
        share = torch.zeros(len(outside), 1, 1, 1, dtype=x.dtype, device=x.device)
        for halving in range(1, _HALVINGS):
            further = share + 0.5**halving
            share = torch.where(
                part.holds(start + further * (end - start), x[outside])[:, None, None, None], further, share
            )
        moved[outside] = start + share * (end - start)
        return moved

    def of(self, index: Tensor) -> Region:
        """The regions of the images at `index`."""
        return Region(self.norm, self.eps, space=self.space, sides=self.sides[index], inside=self.inside[index])

    def short(self, z: Tensor) -> Tensor:
        """By how much each bit's score falls short of its side, (N, B), with room for rounding; negative inside."""
        signs = torch.where(self.sides, 1.0, -1.0)
        return 2 * self.space.slack - signs * distances(self.space, z)

    def holds(self, z: Tensor, x: Tensor) -> Tensor:
        """Whether images `z` lie in the regions of `x`, (N,)."""
        within = self.short(z) <= self.space.slack
        if self.norm == "l2":
            within = within & ((z - x).flatten(1).norm(dim=1, keepdim=True) <= self.eps * (1 + 1e-6))
        return within.all(1)

    def pushed(self, z: Tensor, x: Tensor) -> Tensor:
        """`z` moved across each hyperplane in turn, as little as that takes (in l2), within the pixel range and, in
        linf, the ball.
        """
        low, high = torch.zeros_like(x), torch.ones_like(x)
        if self.norm == "linf":
            low, high = (x - self.eps).clamp_min(0), (x + self.eps).clamp_max(1)
        for bit, weight in enumerate(self.space.weights):
            need = self.short(z)[:, bit]
            index = (need > 0).nonzero()[:, 0]
            if len(index) == 0:
                continue
            upwards = (weight > 0) == self.sides[index, bit][:, None, None, None]
            room = torch.where(upwards, high[index] - z[index], z[index] - low[index]).double().flatten(1)
            size = weight.abs().flatten()
            level = _level(size.square().expand_as(room), room / size.clamp_min(1e-30), need[index])
            most = torch.minimum(level[:, None].nan_to_num(posinf=1e30) * size, room).view(len(index), *x.shape[1:])
            change = torch.where(upwards, most, -most).to(z.dtype)
            z = z.clone()
            z[index] = torch.minimum(torch.maximum(z[index] + change, low[index]), high[index])
        return z


def region(space: Halfspaces, x: Tensor, sides: Tensor, threat: ThreatModel) -> Region:
    """The regions of the bits `sides` (N, B) within `threat` of images `x` (N, C, H, W), a point of each found."""
    made = Region(threat.norm, threat.eps, space=space, sides=sides, inside=x)
    z = x
    for _ in range(_ROUNDS):
        z = made.pushed(z, x)
        if threat.norm == "l2":
            z = threat.project(z, x)
        if bool(made.holds(z, x).all()):
            break
    return Region(threat.norm, threat.eps, space=space, sides=sides, inside=z)


def inside_regions(
    target: RoutedTarget, x: Tensor, y: Tensor, sizes: Sequence[float], generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Attack every pathway that an attacker can reach, inside its own region, by steps of these `sizes`: on the margin,
    then on cross-entropy.

    Inside a region the pathway is fixed, so that the routing hides nothing from the gradient. Returns the images
    (N, C, H, W) and whether each fools `target.predict`, (N,).
    """
    space, threat = target.halfspaces, target.threat
    assert space is not None
    result, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    own = distances(space, x) > 0
    for flipped, able in reachable(space, x, threat):
        sides = own ^ torch.tensor(flipped, device=x.device)
        for loss in ("margin", "ce"):
            left = (able & ~fooled).nonzero()[:, 0]
            if len(left):
                within = region(space, x[left], sides[left], threat)
                first = FirstFooling(target, y[left], within.random_start(x[left], generator))
                _climb(target, x[left], within, first, LOSSES[loss], sizes)
                result[left], fooled[left] = first.x_adv, first.fooled
    return result, fooled


def _climb(
    target: RoutedTarget, x: Tensor, within: Region, first: FirstFooling, loss: Loss, sizes: Sequence[float]
) -> None:
    """Ascend `loss` along one pathway inside its region, from where `first` starts; it sees every iterate."""
    forced, y = within.sides[:, within.space.layers].long(), first.labels
    ascended = loss.at(target.predict, x, y)
    promising: Tensor | None = None

    def objective(x_adv: Tensor) -> Tensor:
        nonlocal promising
        logits = target.model(x_adv, forced=forced).logits
        promising = logits.argmax(1) != y
        return ascended(logits)

    start = first.x_adv
    first.look(
        ascend(objective, x, start, threat=within, step_sizes=sizes, visit=lambda _, z: first.look(z, promising))
    )

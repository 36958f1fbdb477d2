"""Regions of the images that take one pathway, where choices are the sides of hyperplanes: what an attacker can reach.

Axes: `N` batch, `C` channels, `H W` size, `D` = C H W, `B` bits, `L` MoE layers. Pixels and `eps` are in [0, 1].

Bit b of image x is w_b . x > t_b. A perturbation within eps in linf that keeps pixels in [0, 1] unsets the bit if and
only if |w . x - t| <= sum_i |w_i| min(eps, room_i), room_i being the way from x_i to the end of the pixel range on the
side that brings the bit nearer to its threshold; to set it, it must come further than to the threshold (<).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal

import torch
from torch import Tensor

from advmoe.attacks.pgd import LOSSES, Loss, ascend
from advmoe.attacks.routed.ascent import FirstFooling
from advmoe.attacks.routed.target import Halfspaces, RoutedTarget
from advmoe.threat import ThreatModel

_HALVINGS = 30


def distances(space: Halfspaces, x: Tensor) -> Tensor:
    """w . x - t of each bit in fp64, (N, B), for pixels `x` (N, C, H, W)."""
    return x.double().flatten(1) @ space.weights.flatten(1).T - space.thresholds


def radii(
    space: Halfspaces, x: Tensor, norm: Literal["linf", "l2"], *, own: Tensor | None = None, rounding: int = 0
) -> Tensor:
    """The norm of the smallest perturbation of `x` (N, C, H, W), kept in [0, 1], that brings each bit to its threshold,
    (N, B), or beyond it by however little to set it; infinite where none does.

    Args:
        own: the bits that images have, (N, B); by default as fp64 has them.
        rounding: -1 takes off what rounding can move the model's own score, so that the model keeps the bit within the
            radius; 1 adds it, so that the model changes the bit there.
    """
    away = distances(space, x)
    own = away > 0 if own is None else own
    need = torch.where(own, away, -away) + rounding * space.slack
    flat, columns = x.double().flatten(1), []
    for bit, (weight, least) in enumerate(zip(space.weights.flatten(1), need.clamp_min(0).unbind(1), strict=True)):
        room = torch.where((weight > 0) == own[:, bit, None], flat, 1 - flat)
        size = weight.abs()
        if norm == "linf":
            level = _level(size.expand_as(room), room, least)
        else:
            spread = _level(size.square().expand_as(room), room / size.clamp_min(1e-30), least)
            moved = torch.minimum(spread[:, None].nan_to_num(posinf=0) * size, room)
            level = moved.norm(dim=1).where(spread.isfinite(), spread)
        if rounding == 0:  # a bit is set beyond its threshold, not at it
            level = level.where(own[:, bit] | ((size * room).sum(1) > least), torch.inf)
        columns.append(level)
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
    """Which bits are flipped, and of which images (N,) an attacker can flip just these: every combination once,
    none of them first. What rounding may do is held possible.
    """
    own = distances(space, x) > 0
    movable = radii(space, x, threat.norm, rounding=-1) <= threat.eps
    for flipped in product((False, True), repeat=movable.shape[1]):
        chosen = torch.tensor(flipped, device=x.device)
        able = (movable | ~chosen).all(1)
        if any(flipped) and len(flipped) > 1:  # each for itself, but together?
            index = able.nonzero()[:, 0]
            able[index] = deepest(space, x[index], own[index] ^ chosen, threat)[1] >= 0
        yield flipped, able


def deepest(space: Halfspaces, x: Tensor, sides: Tensor, threat: ThreatModel) -> tuple[Tensor, Tensor]:
    """Of all images within `threat` of `x` (N, C, H, W) those deepest in the half-spaces of `sides` (N, B), of one bit
    or two, (N, C, H, W), and how deep that is, (N,): the least of the bits' distances from what rounding leaves of
    their thresholds, in units of ||w||_1. Negative where there is no image on these sides.

    By duality, the lesser of two distances is largest where some weighted mean of both is, and where a mean is largest
    is known (`_furthest`). The more weight a bit has, the larger its distance there: halving finds the weight at which
    both distances are the same.
    """
    size = space.weights.flatten(1).abs().sum(1).clamp_min(1e-30)
    signs = torch.where(sides, 1.0, -1.0).double() / size
    rows = (signs[:, :, None] * space.weights.flatten(1)).unbind(1)

    def depths(z: Tensor) -> Tensor:
        return signs * (z @ space.weights.flatten(1).T - space.thresholds) + space.slack / size

    most = [_furthest(row, x, threat) for row in rows]
    if len(rows) == 1:
        best = most[0]
    else:
        to_first, to_second = most
        low, high = x.new_zeros(len(x), 1, dtype=torch.float64), x.new_ones(len(x), 1, dtype=torch.float64)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            z = _furthest(middle * rows[0] + (1 - middle) * rows[1], x, threat)
            first, second = depths(z).split(1, 1)
            high, low = torch.where(first >= second, middle, high), torch.where(first >= second, low, middle)
            to_first, to_second = torch.where(first >= second, z, to_first), torch.where(first >= second, to_second, z)
        ahead, behind = (depths(z)[:, :1] - depths(z)[:, 1:] for z in (to_first, to_second))
        share = (-behind / (ahead - behind).clamp_min(1e-30)).clamp(0, 1)
        best = to_second + share * (to_first - to_second)
    return best.to(x.dtype).view_as(x), depths(best).amin(1)


def _furthest(direction: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """The image within `threat` of each of `x` that lies furthest in a direction (N, D), in fp64, (N, D)."""
    flat = x.double().flatten(1)
    if threat.norm == "linf":
        low, high = ((each.clamp(0, 1)).double().flatten(1) for each in (x - threat.eps, x + threat.eps))
        return torch.where(direction > 0, high, torch.where(direction < 0, low, flat))
    size, room = direction.abs(), torch.where(direction > 0, 1 - flat, flat)
    full = (room / size.clamp_min(1e-30)).square()
    level = _level(size.square(), full, torch.full_like(flat[:, 0], threat.eps**2)).sqrt()
    return flat + direction.sign() * torch.minimum(level[:, None].nan_to_num(posinf=1e30) * size, room)


@dataclass(frozen=True, eq=False, kw_only=True)
class Region(ThreatModel):
    """The threat model cut with the half-spaces of one pathway for each image of a batch."""

    space: Halfspaces
    sides: Tensor
    """The bits that the region's images have, (N, B)."""
    inside: Tensor
    """The deepest point of each image's region, (N, C, H, W)."""

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
    """The regions of the bits `sides` (N, B) within `threat` of images `x` (N, C, H, W)."""
    inside, _ = deepest(space, x, sides, threat)
    return Region(threat.norm, threat.eps, space=space, sides=sides, inside=inside)


def inside_regions(
    target: RoutedTarget,
    x: Tensor,
    y: Tensor,
    sizes: Sequence[float],
    *,
    flipped: bool,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Attack images inside the region of their own pathway, or (`flipped`) inside that of every other one that an
    attacker can reach, by steps of these `sizes`: on the margin, then on cross-entropy.

    Inside a region the pathway is fixed, so that the routing hides nothing from the gradient. Returns the images
    (N, C, H, W) and whether each fools `target.predict`, (N,).
    """
    space, threat = target.halfspaces, target.threat
    assert space is not None
    result, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    own = distances(space, x) > 0
    pathways = reachable(space, x, threat)  # the own one first
    for bits, able in islice(pathways, 1, None) if flipped else islice(pathways, 1):
        sides = own ^ torch.tensor(bits, device=x.device)
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

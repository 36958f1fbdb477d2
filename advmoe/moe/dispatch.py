"""Send each sample to its expert and put the results back in order, at one row copy each way.

Axes: `N` batch, `E` experts, `n_e` samples of expert e. A sample is one contiguous row of memory in either memory
format, so a permutation of the batch is a row copy; plain `x[index]` on channels-last tensors is up to three times
slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.ops import raw


@dataclass(frozen=True)
class Plan:
    """Which samples go to which expert: `members[i]` (n_e,) are the batch positions of expert `experts[i]`.

    Experts without a sample are left out; where one expert has them all, nothing is moved and `members` is empty.
    """

    experts: tuple[int, ...]
    members: tuple[Tensor, ...]
    beside: tuple[int, ...] = ()
    """Other numbers of the device that came along."""

    @staticmethod
    def of(choice: Tensor, num_experts: int, beside: Tensor | None = None) -> Plan:
        """Group the samples of `choice`, (N,) expert indices, by expert; order within a group is kept.

        An accelerator is waited for once; whole numbers `beside` (M,) come in the same transfer.
        """
        if len(choice) == 1 and beside is None:
            return Plan((int(choice.item()),), ())
        if beside is None:
            beside = choice[:0]
        if on_host(choice):
            chosen, others = choice.numpy(), tuple(beside.tolist())
            places = {e: found for e in range(num_experts) if len(found := np.flatnonzero(chosen == e))}
            if len(places) < 2:
                return Plan((next(iter(places), 0),), (), others)
            return Plan(tuple(places), tuple(map(torch.from_numpy, places.values())), others)
        # One wait for the device; `bincount` would add two.
        counted = (choice[:, None] == torch.arange(num_experts, device=choice.device)).sum(0)
        numbers: list[int] = torch.cat([counted, beside.to(choice.device)]).tolist()
        counts, others = numbers[:num_experts], tuple(numbers[num_experts:])
        used = tuple(e for e, n in enumerate(counts) if n) or (0,)
        if len(used) == 1:
            return Plan(used, (), others)
        order = choice.argsort(stable=True)
        return Plan(used, order.split([counts[e] for e in used]), others)


def on_host(x: Tensor) -> bool:
    """Whether the values of `x` are there to be looked at; else a look waits for a device."""
    return x.device.type == "cpu"


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """View `x` (N, ...) as one contiguous row per sample, and whether it is channels-last."""
    channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    length = x.shape[1:].numel()  # not -1, which a batch without samples leaves open
    if channels_last:
        return x.permute(0, 2, 3, 1).view(len(x), length), True
    return x.contiguous().view(len(x), length), False


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _unrows(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    if channels_last:
        _, c, h, w = shape
        return rows.view(len(rows), h, w, c).permute(0, 3, 1, 2)
    return rows.view(len(rows), *shape[1:])


def _wide(*rows: Tensor) -> tuple[Tensor, ...]:
    """The same memory in units of 16 bytes where it has whole ones: `index_copy_` moves number by number, bf16 up to
    six times slower so.
    """
    units = [
        each.shape[1] * each.element_size() % 16 or each.storage_offset() * each.element_size() % 16 for each in rows
    ]
    return rows if any(units) else tuple(each.view(torch.complex128) for each in rows)


def split_rows(x: Tensor, members: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The samples of `x` (N, ...) at each of the places `members` (n_e,), without a gradient."""
    rows, channels_last = _rows(x)
    return tuple(_unrows(rows.index_select(0, index), x.shape, channels_last) for index in members)


def _scatter(parts: tuple[Tensor, ...], members: tuple[Tensor, ...]) -> Tensor:
    first, channels_last = _rows(parts[0])
    rows = [first]
    for part in parts[1:]:
        each, last = _rows(part)
        rows.append(each if last == channels_last else _rows(_laid_out(part, channels_last))[0])
    # No view of other memory: autograd then lets what follows change it in place.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        sum(map(len, rows)), *parts[0].shape[1:], dtype=first.dtype, device=first.device, memory_format=layout
    )
    target, *wide = _wide(_rows(out)[0], *rows)
    for each, index in zip(wide, members, strict=True):
        target.index_copy_(0, index, each)
    return out


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Each sample's inner product of `a` and `b` (N, ...), (N,)."""
    if raw.suits(a, b):
        return raw.products(a, b)
    (rows, last), (others, same) = _rows(a), _rows(b)
    if last != same:
        others, _ = _rows(_laid_out(b, last))
    # The sum keeps fp32 inside; asked for an fp32 result, PyTorch would first copy a bf16 product whole.
    return (rows * others).sum(1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *members: Tensor) -> tuple[Tensor, ...]:
        ctx.members = members
        return split_rows(x, members)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grads, ctx.members), *[None] * len(ctx.members)


class _GatedSplit(torch.autograd.Function):
    """`straight_through` and `split`, whose backward passes over the gradient are one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, *members: Tensor) -> tuple[Tensor, ...]:
        ctx.members, ctx.gate_dtype = members, gate.dtype
        ctx.save_for_backward(x)
        return split_rows(x, members)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if raw.suits(x, *grads):
            grad, products = raw.unsplit(raw.Parts(grads, ctx.members), x)
        else:
            grad = _scatter(grads, ctx.members)
            products = _row_products(grad, x)
        return grad, products.to(ctx.gate_dtype), *[None] * len(ctx.members)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, members: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        ctx.members = members
        return _scatter(parts, members)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *split_rows(grad, ctx.members)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        ctx.gate_dtype = gate.dtype
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        return grad, _row_products(grad, y).to(ctx.gate_dtype)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, choice: Tensor) -> Tensor:
        ctx.save_for_backward(scores, choice)
        return raw.chosen_probability(scores, choice)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, choice = ctx.saved_tensors
        return raw.chosen_probability_backward(scores, choice, grad.contiguous()), None


class _Convolution(torch.autograd.Function):
    """A convolution by fixed filters, of which each sample uses its expert's, and `straight_through` ahead of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, choice: Tensor, filters: raw.Packed) -> Tensor:
        ctx.filters, ctx.gate_dtype = filters, None if gate is None else gate.dtype
        ctx.save_for_backward(x, choice, filters.filters)  # the last so that a change of these does not go unnoticed
        return filters.convolve(x, choice)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, choice, _ = ctx.saved_tensors
        gated = ctx.gate_dtype is not None
        x, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, grad))
        dx, products = ctx.filters.backward(grad, x, choice, products=gated)
        return dx, products.to(ctx.gate_dtype) if products is not None else None, None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, every: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(every, weights)
        return raw.mixed(every, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        every, weights = ctx.saved_tensors
        every, grad = (each.contiguous(memory_format=torch.channels_last) for each in (every, grad))
        return raw.unmixed(grad, every, weights)


def mix(every: Tensor, weights: Tensor) -> Tensor:
    """The sum over experts of `weights` (N, E) times what each made, `every` (N, E, ...): (N, ...)."""
    if every.dim() == 5 and weights.dtype == torch.float32:
        together = every.flatten(1, 2)
        if raw.mixes(together, every.shape[1]):
            y: Tensor = _Mix.apply(together, weights.contiguous())  # type: ignore[no-untyped-call]
            return y
    return (every * weights.to(every.dtype).view(*weights.shape, *[1] * (every.dim() - 2))).sum(1)


def split(x: Tensor, plan: Plan, gate: Tensor | None = None) -> tuple[Tensor, ...]:
    """The samples of each expert of `plan`, (n_e, ...) each, from `x` (N, ...), `straight_through` the `gate` (N,) if
    there is one.
    """
    if len(plan.experts) == 1:
        return (x if gate is None else straight_through(x, gate),)
    if gate is None:
        parts: tuple[Tensor, ...] = _Split.apply(x, *plan.members)  # type: ignore[no-untyped-call]
    else:
        parts = _GatedSplit.apply(x, gate, *plan.members)  # type: ignore[no-untyped-call]
    return parts


def merge(parts: tuple[Tensor, ...], plan: Plan) -> Tensor:
    """The inverse of `split`: (N, ...) in the batch's own order from the experts' outputs."""
    if len(plan.experts) == 1:
        return parts[0]
    merged: Tensor = _Merge.apply(plan.members, *parts)  # type: ignore[no-untyped-call]
    return merged


def chosen_probability(scores: Tensor, choice: Tensor) -> Tensor:
    """What softmax over `scores` (N, E) gives each sample's `choice` (N,): (N,)."""
    if scores.dtype == torch.float32 and raw.suits(scores):
        probability: Tensor = _Chosen.apply(scores, choice.long().contiguous())  # type: ignore[no-untyped-call]
        return probability
    return scores.softmax(1).gather(1, choice[:, None])[:, 0]


def straight_through(y: Tensor, gate: Tensor) -> Tensor:
    """`y` (N, ...) unchanged; backward gives `gate` (N,) the gradient <dL/dy, y>, as y * (1 + gate - stop_grad(gate))
    would.
    """
    gated: Tensor = _Gate.apply(y, gate)  # type: ignore[no-untyped-call]
    return gated


def convolution(x: Tensor, gate: Tensor | None, choice: Tensor, filters: raw.Packed) -> Tensor:
    """`x` (N, C_in, H, W), `straight_through` the `gate` (N,) if there is one, by the filters of the expert in `choice`
    (N,): (N, C_out, H', W'). Moves no sample; `x` is one that kernels take.
    """
    if not torch.is_grad_enabled():
        return filters.convolve(x, choice.long().contiguous())
    y: Tensor = _Convolution.apply(x, gate, choice.long().contiguous(), filters)  # type: ignore[no-untyped-call]
    return y


def fixed_convolution(x: Tensor, filters: raw.Packed) -> Tensor:
    """`x` (N, C_in, H, W) by the only expert's filters."""
    return convolution(x, None, torch.zeros(len(x), dtype=torch.long, device=x.device), filters)

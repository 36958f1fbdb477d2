"""What a level of `tables.methods` runs on, and which parameters it moves.

Axes: `B` batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TypeGuard

import torch
from torch import Tensor, nn

from advmoe.errors import InputError, require_whole
from advmoe.models import split_parameters
from advmoe.models.sparse import scores_of
from advmoe.moe.routers import routers_of
from advmoe.tables import Level, Part
from advmoe.training.schedule import batches

Iteration = list[tuple[Tensor, tuple[Level, ...]]]
"""The batches of an iteration in turn, as indices (B,) of images, each with the levels that run on it."""


def epoch_plan(levels: Sequence[Level], num_images: int, batch_size: int, *, seed: int, epoch: int) -> list[Iteration]:
    """The iterations of an epoch, each a list of its batches in turn: indices (B,) of training images, and the levels
    that run on them.

    Args:
        levels: of the method (`levels`). Levels on one batch share it and the attack on it.
        num_images: of the training set; an epoch leaves its incomplete last batch out.
        batch_size: B, or `num_images` where that is less.
        seed: of the run. epoch: from 0. The order of the images follows from both.

    In an epoch each batch number sees every image at most once, and the batches of an iteration share none wherever
    the set holds enough. A level with `every` K runs in each K-th iteration, counted from the run's start. Raises
    `ValueError` for no levels, images, or batch.
    """
    for name, number in (("num_images", num_images), ("batch_size", batch_size)):
        require_whole(name, number, 1)
    require_whole("epoch", epoch, 0)
    if not levels:
        raise InputError("levels must be one at least, got none")
    plan = batches(num_images, batch_size, seed=seed, epoch=epoch, levels=1 + max(level.batch for level in levels))
    iterations = []
    for iteration, indices in enumerate(plan, epoch * len(plan)):
        due = [level for level in levels if iteration % level.every == level.turn]
        iterations.append([(indices[batch], tuple(on)) for batch, on in groupby(due, key=lambda level: level.batch)])
    return iterations


def parts_of(model: nn.Module) -> dict[Part, list[nn.Parameter]]:
    """The parameters of each part but `all`; together all, none twice."""
    psi, phi = split_parameters(model)
    scores = scores_of(model)
    known = {id(score) for score in scores}
    return {"experts": [p for p in psi if id(p) not in known], "routers": phi, "scores": scores}


def is_batch_norm(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """Whether `module` normalises by batches, of whatever kind."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def untouched(model: nn.Module, part: Part) -> list[nn.Module]:
    """The modules whose parameters stay fixed while `part` learns."""
    routers = {id(module) for router in routers_of(model) for module in router.modules()}
    of = {"all": (), "experts": (True,), "routers": (False,), "scores": (True, False)}[part]
    return [module for module in model.modules() if (id(module) in routers) in of]


@contextmanager
def learning(model: nn.Module, part: Part, *, record: bool = True, follow: bool | None = None) -> Iterator[None]:
    """Train mode in which one part learns and the rest stays fixed bit for bit, buffers included. Restores everything.

    Args:
        model: any network; its routers are found by their type.
        part: `routers` (phi), `experts` (psi: experts, norms, stem, classifier), `scores` (a sparse model's channels')
            or `all`.
        record: whether the part's own buffers move; without it none does.
        follow: whether those of what stays fixed move too (`training.frozen_norms`); by default while `scores` learn.

    Inside, take gradients; the optimiser may step inside or after. Fixed batch norms go on normalising by the batch,
    without recording it. Running statistics lag behind fast early weights: by them the routers' step saw a broken
    backbone (digits, 2 epochs: cross-entropy 5.0 against 1.6). While `scores` learn, weights are fixed but statistics
    move unless told otherwise: the dense network's do not fit what its masks let through, and attacks and measurements
    go by them.

    Raises `ValueError` for a part that the model does not have. Source: AdvMoE (Zhang et al., ICCV 2023), Algorithm 1,
    which updates one part with the other fixed; what holds of buffers is ours.
    """
    parts = parts_of(model)
    known = ["all", *(name for name, parameters in parts.items() if parameters)]
    if part not in known:
        raise InputError(f"part must be one of {', '.join(known)} of this model, got {part!r}")
    modules = list(model.modules())
    norms = [module for module in modules if is_batch_norm(module)]
    follows = part == "scores" if follow is None else follow
    fixed_modules = modules if not record else [] if follows else untouched(model, part)
    fixed = {id(module) for module in fixed_modules}
    # What moves its buffers in its own way (instance norms, spectral norms) gets them back.
    moving = (module for module in fixed_modules if not is_batch_norm(module))
    others = [buffer for module in moving for buffer in module.buffers(recurse=False)]
    values = [buffer.clone() for buffer in others]
    modes = [module.training for module in modules]
    wanted = [(p, p.requires_grad) for parameters in parts.values() for p in parameters]
    recording = [norm.track_running_stats for norm in norms]
    still = {id(p) for other, parameters in parts.items() if part not in ("all", other) for p in parameters}
    for parameter, needs in wanted:  # what the user's own network has frozen stays so
        parameter.requires_grad_(needs and id(parameter) not in still)
    model.train()
    for norm in norms:
        norm.track_running_stats = id(norm) not in fixed
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, needs in wanted:
            parameter.requires_grad_(needs)
        for norm, records in zip(norms, recording, strict=True):
            norm.track_running_stats = records
        with torch.no_grad():
            for buffer, value in zip(others, values, strict=True):
                buffer.copy_(value)

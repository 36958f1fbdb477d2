"""Held perturbations: where they go and come from, through crops and flips."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from advmoe.data import ImageSet
from advmoe.data.augment import View
from advmoe.data.stream import file_set
from advmoe.training.perturbations import Perturbations

ALONE: Any = SimpleNamespace(global_rank=0, world_size=1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def some(n=10, side=8):
    images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    return Perturbations(ImageSet(images, torch.zeros(n, dtype=torch.int64)), ALONE)


def test_nothing_is_held_at_first_then_what_was_kept():
    perturbations, index = some(), torch.tensor([7, 2, 4])
    assert not perturbations.take(index, None).any()
    delta = 0.1 * torch.rand(3, 3, 8, 8, generator=seeded(0)) - 0.05
    perturbations.keep(index, None, delta)
    # float16: half of the last of 11 bits.
    assert ((perturbations.take(index, None) - delta).abs() <= delta.abs() * 2**-11).all()
    assert torch.equal(perturbations.take(index.flip(0), None), perturbations.take(index, None).flip(0))
    assert not perturbations.take(torch.tensor([0, 1, 3, 5, 6, 8, 9]), None).any()
    assert perturbations.stored.dtype == torch.float16 and perturbations.take(index, None).dtype == torch.float32


def test_crops_and_flips_are_followed():
    perturbations, index = some(), torch.arange(10)
    first = View.draw(perturbations.stored, generator=seeded(1), padding=1, flip=True)
    second = View.draw(perturbations.stored, generator=seeded(2), padding=1, flip=True)
    # What an image's own pixels hold, at positions that tell them apart; seen through one view, kept, seen by another.
    whole = torch.arange(1, 193, dtype=torch.float32).view(1, 3, 8, 8).expand(10, 3, 8, 8) / 512
    perturbations.keep(index, first, first.of(whole))
    missing = first.back(first.of(torch.ones_like(whole)), torch.zeros_like(whole)) == 0
    assert torch.equal(perturbations.take(index, None), whole.masked_fill(missing, 0))
    assert torch.equal(perturbations.take(index, second), second.of(whole.masked_fill(missing, 0)))
    assert perturbations.take(index, second).is_contiguous(memory_format=torch.channels_last)
    # A later visit fills in the rest and leaves alone what it does not show.
    perturbations.keep(index, second, second.of(whole))
    assert torch.equal(perturbations.take(index, None)[~missing], whole[~missing])


def test_a_share_is_kept_with_what_others_have(monkeypatch):
    # Two processes, one after the other: each adds zeros for what the other has.
    perturbations, index = some(), torch.tensor([3, 1, 8, 6])
    deltas = 0.01 * torch.arange(1, 5).view(4, 1, 1, 1).expand(4, 3, 8, 8).float()
    parts = []
    monkeypatch.setattr("advmoe.training.perturbations.total", lambda fabric, tensor: parts.append(tensor) or tensor)
    for rank in (0, 1):
        process = Perturbations(ImageSet(torch.zeros(10, 3, 8, 8).byte(), torch.zeros(10).long()), perturbations.fabric)
        process.mine = slice(rank, None, 2)
        process.keep(index, None, deltas[rank::2])
        assert torch.equal(process.take(index, None), deltas[rank::2].half().float())
    assert torch.equal(sum(parts).float(), deltas.half().float())


def test_images_in_files_are_refused(tmp_path):
    files = file_set(tmp_path, [("a.png", 0)], image_size=8, workers=0)
    with pytest.raises(ValueError) as error:
        Perturbations(files, ALONE)
    rule = "images held in memory when training.alternation is warm-start"
    assert str(error.value) == f"data.name must be of {rule}, got a FileSet"

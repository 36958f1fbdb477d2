"""Augmentation: every output is a shift and flip of its input, and all of them occur."""

import pytest
import torch
from torch import Tensor

from advmoe.data.augment import View


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(images: Tensor, *, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    return View.draw(images, generator=generator, padding=padding, flip=flip).of(images)


def shifts(image: Tensor, padding: int, flip: bool) -> list[Tensor]:
    """Every image (C, H, W) that a shift by up to `padding`, and a flip, make of one; written out with loops."""
    _, height, width = image.shape
    made = []
    for source in [image, image.flip(-1)] if flip else [image]:
        for down in range(-padding, padding + 1):
            for right in range(-padding, padding + 1):
                out = torch.zeros_like(image)
                for y in range(height):
                    for x in range(width):
                        if 0 <= y + down < height and 0 <= x + right < width:
                            out[:, y, x] = source[:, y + down, x + right]
                made.append(out)
    return made


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_outputs_are_exactly_the_shifts_and_flips(padding: int, flip: bool) -> None:
    # 1..30 over 2 channels of 3 rows of 5: all values differ, so that all 50 possible results differ.
    image = torch.arange(1, 31, dtype=torch.uint8).view(2, 3, 5)
    possible = torch.stack(shifts(image, padding, flip))
    assert len(possible) == (2 * padding + 1) ** 2 * (2 if flip else 1)
    out = augment(image.expand(2000, 2, 3, 5).contiguous(), generator=seeded(), padding=padding, flip=flip)
    matches = (out[:, None] == possible[None]).flatten(2).all(dim=2)
    assert (matches.sum(dim=1) == 1).all()
    # 2000 draws over at most 50 results: each is expected 40 times or more; 10 is five deviations below.
    assert matches.sum(dim=0).min() >= 10


def test_images_do_not_mix() -> None:
    images = torch.arange(1, 101, dtype=torch.float32)[:, None, None, None].expand(100, 3, 4, 4).contiguous()
    out = augment(images, generator=seeded(), padding=2, flip=True)
    assert ((out == images) | (out == 0)).all()
    assert out.amax(dim=(1, 2, 3)).tolist() == list(range(1, 101))


def test_same_seed_same_crops_for_every_type_and_layout() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    first = augment(images, generator=seeded(5), padding=2, flip=True)
    assert first.dtype == torch.uint8
    assert first.is_contiguous()
    assert torch.equal(first, augment(images, generator=seeded(5), padding=2, flip=True))
    assert not torch.equal(first, augment(images, generator=seeded(6), padding=2, flip=True))
    as_float = augment(images.float() / 255, generator=seeded(5), padding=2, flip=True)
    assert torch.equal(as_float, first.float() / 255)
    last = augment(images.contiguous(memory_format=torch.channels_last), generator=seeded(5), padding=2, flip=True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, first)


def test_generator_advances() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    generator = seeded(1)
    first = augment(images, generator=generator, padding=1, flip=False)
    assert not torch.equal(first, augment(images, generator=generator, padding=1, flip=False))


def test_input_is_left_alone() -> None:
    images = torch.rand(4, 1, 4, 4, generator=seeded())
    before = images.clone()
    out = augment(images, generator=seeded(), padding=0, flip=False)
    assert torch.equal(out, before)
    out.zero_()
    assert torch.equal(images, before)


def test_empty_batch() -> None:
    assert augment(torch.empty(0, 3, 4, 4), generator=seeded(), padding=1, flip=True).shape == (0, 3, 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cpu_generator_gives_the_same_crops_on_cuda() -> None:
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    on_cpu = augment(images, generator=seeded(5), padding=2, flip=True)
    on_cuda = augment(images.cuda(), generator=seeded(5), padding=2, flip=True)
    assert on_cuda.is_cuda
    assert torch.equal(on_cuda.cpu(), on_cpu)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_back_undoes_of_where_pixels_are_shown(layout: torch.memory_format) -> None:
    images = torch.rand(40, 3, 8, 8, generator=seeded()).contiguous(memory_format=layout) + 1
    view = View.draw(images, generator=seeded(1), padding=2, flip=True)
    varied = view.of(images)
    assert torch.equal(view.back(varied, images), images)
    # Pixels that the view shows come from it; those that it does not show keep what they had.
    returned = view.back(varied, torch.zeros_like(images))
    shown = view.of(torch.ones_like(images))
    assert torch.equal(view.of(returned), varied)
    assert ((returned == images) | (returned == 0)).all()
    assert (returned != 0).sum() == shown.sum() < shown.numel()
    assert torch.equal(view.back(-varied, images).abs(), images)

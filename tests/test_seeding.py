"""Random numbers follow from what they are for, alone."""

import hashlib

import numpy as np
import pytest
import torch

from advmoe.errors import InputError
from advmoe.seeding import drawing_for, generator_for, seed_for


def test_a_seed_is_a_hash_of_its_purpose():
    digest = hashlib.sha256(b"(0, 'epoch', 3)").digest()
    assert seed_for(0, "epoch", 3) == int.from_bytes(digest[:8], "big") // 2 < 2**63


@pytest.mark.parametrize("other", [(1, "epoch", 3), (0, "epoch", 4), (0, "epochs", 3), (0, "epoch", "3"), (0, "epoch")])
def test_other_purposes_have_other_seeds(other):
    assert seed_for(*other) != seed_for(0, "epoch", 3)


def test_the_same_purpose_draws_the_same_numbers():
    first, again, other = (torch.rand(4, generator=generator_for(*each)) for each in ((0, "a"), (0, "a"), (0, "b")))
    assert torch.equal(first, again) and not torch.equal(first, other)
    before = torch.get_rng_state()
    generator_for(0)
    assert torch.equal(torch.get_rng_state(), before)  # PyTorch's own generator is left alone


def test_what_layers_draw_follows_from_its_purpose():
    def drawn(*purpose):
        with drawing_for(*purpose, device=torch.device("cpu")):
            return torch.rand(4)

    before = torch.get_rng_state()
    assert torch.equal(drawn(0, "layers", 1), torch.rand(4, generator=generator_for(0, "layers", 1)))
    assert not torch.equal(drawn(0, "layers", 1), drawn(0, "layers", 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_number_of_any_type_seeds_alike():
    assert seed_for(np.int64(3), "a") == seed_for(3, "a") == seed_for(torch.tensor(3), "a") != seed_for("3", "a")
    for wrong in (0.5, None, [1]):
        with pytest.raises(InputError, match=r"^a seed must be a whole number, got "):
            seed_for(wrong)

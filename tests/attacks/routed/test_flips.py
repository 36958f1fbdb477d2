"""The attack on choices alone: it finds what is near, and never what is out of reach."""

import torch
from planted import LINF, Toy, against_zero

from advmoe.attacks.routed.flips import changed_choices


def test_choices_within_reach_are_changed_and_others_are_not():
    # Two layers: the first is far from another choice, the second as far as the pixel says.
    def scores(z):
        value = z[:, 0, 0, 0]
        return torch.stack([against_zero(0 * value - 5), against_zero(value - 0.5)], 1)

    toy = Toy(lambda z: against_zero(z[:, 0, 0, 0]), scores)
    x = torch.tensor([0.49, 0.46, 0.51, 0.54]).view(4, 1, 1, 1)  # 8/255 is 0.031
    found = changed_choices(toy, x, threat=LINF, sizes=[4 / 255] * 10, generator=torch.Generator().manual_seed(0))
    assert found.tolist() == [True, False, True, False]

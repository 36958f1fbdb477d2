"""The attack on choices alone: it finds what is near, and never what is out of reach."""

import torch
from planted import LINF, Toy, against_zero

from advmoe.attacks.routed import Pass
from advmoe.attacks.routed.flips import changed_choices


class Apart(Toy):
    """With a layer of one expert before those of two."""

    def __call__(self, x, **options):
        output = super().__call__(x, **options)
        lone = torch.zeros(len(x), 1, dtype=torch.long)
        return Pass(output.logits, (torch.ones(len(x), 1), *output.scores), torch.cat([lone, output.pathway], 1))


def test_a_layer_of_one_expert_draws_no_attack():
    toy = Apart(lambda z: against_zero(z[:, 0, 0, 0]), lambda z: against_zero(z[:, :1, 0, 0] - 0.5))
    x = torch.tensor([0.49, 0.46, 0.51, 0.54]).view(4, 1, 1, 1)  # 8/255 is 0.031
    found = changed_choices(toy, x, threat=LINF, sizes=[4 / 255] * 10, generator=torch.Generator().manual_seed(0))
    assert found.tolist() == [True, False, True, False]


def test_choices_within_reach_are_changed_and_others_are_not():
    # Two layers: the first is far from another choice, the second as far as the pixel says.
    def scores(z):
        value = z[:, 0, 0, 0]
        return torch.stack([against_zero(0 * value - 5), against_zero(value - 0.5)], 1)

    toy = Toy(lambda z: against_zero(z[:, 0, 0, 0]), scores)
    x = torch.tensor([0.49, 0.46, 0.51, 0.54]).view(4, 1, 1, 1)  # 8/255 is 0.031
    found = changed_choices(toy, x, threat=LINF, sizes=[4 / 255] * 10, generator=torch.Generator().manual_seed(0))
    assert found.tolist() == [True, False, True, False]

"""Names of a family, which hold numbers, are known by their letters: a mistyped one keeps its own numbers."""

import pytest

from advmoe.errors import InputError
from advmoe.evaluation.suite import ATTACKS
from advmoe.tables import BACKBONES


@pytest.mark.parametrize(
    ("table", "name", "meant"),
    [
        (ATTACKS, "pdg-20", "pgd-20"), (ATTACKS, "pgd-7-margn-soft", "pgd-7-margin-soft"), (ATTACKS, "pg", "pgd"),
        (ATTACKS, "autoatack", "autoattack"), (ATTACKS, "rotued", "routed"), (BACKBONES, "wrm-28-10", "wrn-28-10"),
        (BACKBONES, "resnet81", "resnet18"),
    ],
)  # fmt: skip
def test_the_nearest_is_named(table, name, meant):
    with pytest.raises(InputError, match=f"got '{name}' \\(did you mean {meant}\\?\\)$"):
        table.find(name)


def test_none_is_near_what_is_far():
    assert ATTACKS.near("xyzzy") == ATTACKS.near(3) == ""

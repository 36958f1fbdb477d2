"""How sure a counted share is."""

from __future__ import annotations

import math

from advmoe.errors import InputError

_Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95% score interval (low, high) of a share, as fractions: `successes` of `n` examples (Wilson, 1927).

    Unlike p +- 1.96 sqrt(p (1 - p) / n), it stays in [0, 1] and keeps a width at 0 and at `n` successes.
    Raises `ValueError` for no examples, or a count outside 0 ... n.
    """
    if n < 1:
        raise InputError(f"n must be >= 1, got {n!r}")
    if not 0 <= successes <= n:
        raise InputError(f"successes must lie in 0 ... {n}, got {successes!r}")
    share, square = successes / n, _Z95**2
    centre = share + square / (2 * n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    low, high = ((centre + side * half) / (1 + square / n) for side in (-1, 1))
    return (0.0 if successes == 0 else low, 1.0 if successes == n else high)

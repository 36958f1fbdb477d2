"""Means, and tests of whether one method is better than another.

A test's p-value is one-sided: the chance, were the two alike, of a difference at least as large in the direction asked
about. For the sign-flip tests, which are exact, two that are alike have differences symmetric about 0; with a margin
they are taken to be symmetric about their centre, which is what is tested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import InputError

MOST_SEEDS = 20
"""More than these `sign_flip` does not take."""


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), which is None for one value. Raises `ValueError` for none."""
    if not values:
        raise InputError("values must hold at least one number, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Exact paired permutation test over seeds: how likely random signs make the sum of `differences` as large.

    With n differences the least p-value is 2^-n: 3 seeds cannot reach 0.05, 5 can. Raises `ValueError` for none, and
    for more than `MOST_SEEDS`.
    """
    if not 1 <= len(differences) <= MOST_SEEDS:
        raise InputError(f"differences must be 1 to {MOST_SEEDS} numbers, got {len(differences)}")
    sums = np.zeros(1)
    for each in differences:
        sums = np.concatenate([sums + each, sums - each])
    slack = 1e-12 * (1 + math.fsum(map(abs, differences)))  # sums that are equal but for rounding count as reached
    return float((sums >= math.fsum(differences) - slack).mean())


def image_test(differences: Sequence[int]) -> float:
    """Exact sign-flip test over images: how likely random signs make the sum of `differences` at least as large.

    Args:
        differences: per image, on how many seeds the one method was right less on how many the other was. An image's
            seeds share a sign, as their outcomes are not independent. For one seed this is McNemar's exact test.

    It speaks about the models that were trained, on other images of the kind; not about training them again.
    """
    sizes = [abs(int(each)) for each in differences if each]
    if not sizes:
        return 1.0
    chances = np.ones(1)  # of each sum, from -total to total in steps of 2, total the sizes so far
    for size in sizes:
        grown = np.zeros(len(chances) + size)
        grown[: len(chances)] += 0.5 * chances
        grown[size:] += 0.5 * chances
        chances = grown
    first = (int(sum(differences)) + sum(sizes)) // 2
    return float(min(1.0, chances[first:].sum()))


def crossed_test(differences: NDArray[np.float64], margin: float = 0.0) -> float:
    """How likely chance makes the mean of `differences`, (S, N) of seeds and images, as far above -`margin`: a t test,
    for which both the seeds and the images are drawn from many, 2 of each at least (1.0 of fewer images).

    It speaks of training again and of other images at once. The variance of the mean is the seeds' and the images' less
    what both contain, and is no less than either; degrees of freedom are Satterthwaite's. Seeds' means are taken to be
    about normal: a collapse too rare to be among these seeds is not seen. With a margin, images of a mean at the margin
    differ at least as often as that, whatever these few do.
    Source: Satterthwaite, Biometrics Bulletin 1946.
    """
    from scipy.special import stdtr  # a dependency of scikit-learn

    seeds, images = differences.shape
    if images < 2:
        return 1.0
    mean, of_seeds, of_images = differences.mean(), differences.mean(1), differences.mean(0)
    rest = differences - of_seeds[:, None] - of_images + mean
    by_seed = of_seeds.var(ddof=1) / seeds
    by_image = max(of_images.var(ddof=1), abs(margin) * (1 - abs(margin))) / images
    both = (rest**2).sum() / ((seeds - 1) * (images - 1) * seeds * images)
    variance = float(max(by_seed + by_image - both, by_seed, by_image))
    if variance <= (1e-12 * np.abs(differences).max()) ** 2:  # all alike: nothing to take a spread from
        return max(sign_flip(of_seeds.tolist()), float(0.5**images))
    freedom = variance**2 / (
        by_seed**2 / (seeds - 1) + by_image**2 / (images - 1) + both**2 / ((seeds - 1) * (images - 1))
    )
    return float(stdtr(freedom, -(mean + margin) / np.sqrt(variance)))


def bonferroni(p_values: Sequence[float]) -> float:
    """The p-value of the least of several, for having looked at all of them."""
    return min(1.0, len(p_values) * min(p_values))

"""How often the tests of docs/decisions/statistics.md err where nothing differs, and see a difference: print both.

    python benchmarks/error_rates.py

Differences of two methods are drawn for five seeds on 200 images that all seeds share: a part of the seed, a part of
the image, the same with all seeds, and a part of both. Standard deviations are as of the stored studies. It takes a
minute of one core.
"""

from __future__ import annotations

import argparse

import numpy as np

from advmoe.studies.significance import crossed_test, sign_flip

SEEDS, IMAGES, LEVEL = 5, 200, 0.05
OF_SEED, OF_IMAGE, OF_BOTH = (0.0, 0.01, 0.02, 0.035), (0.0, 0.1, 0.25), 0.28
"""Standard deviations: of a seed's mean, of what an image's difference has with every seed, and of the rest."""


def rates(difference: float, of_seed: float, of_image: float, trials: int) -> tuple[float, float]:
    """Of so many trials, in how many in a hundred the signs of the seeds, and the test over seeds and images, find a
    `difference` above 0.
    """
    draw, found = np.random.default_rng(0), np.zeros(2)
    for _ in range(trials):
        seeds, images = draw.normal(0, of_seed, (SEEDS, 1)), draw.normal(0, of_image, (1, IMAGES))
        drawn = difference + seeds + images + draw.normal(0, OF_BOTH, (SEEDS, IMAGES))
        found += sign_flip(list(drawn.mean(1))) < LEVEL, crossed_test(drawn) < LEVEL
    signs, both = 100 * found / trials
    return float(signs), float(both)


def main() -> None:
    """Print a line for each combination."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=4000)
    options = parser.parse_args()
    print("difference  of a seed  of an image  signs of seeds  seeds and images")
    for difference in (0.0, 0.03):
        for of_seed in OF_SEED:
            for of_image in OF_IMAGE:
                signs, both = rates(difference, of_seed, of_image, options.trials)
                print(f"{difference:10g}  {of_seed:9g}  {of_image:11g}  {signs:14.1f}  {both:16.1f}")


if __name__ == "__main__":
    main()

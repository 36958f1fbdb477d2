"""Claims of the paper, judged on results: each holds, does not hold, or is undecided at this size.

A claim is a conjunction of comparisons "this is more than that". Each is tested on runs that share seeds and test
images, so in pairs, and twice:

- over seeds and images, both drawn from many: whether training again would come out alike, on other images too. This
  is the claim's verdict. A number of each seed that is no share of images is tested by the exact sign-flip test over
  seeds. Fewer than 5 seeds cannot decide;
- over the images of the given seeds, where outcomes of images are known. This speaks about these trained models alone,
  on other images of the kind, and stands under a name of its own: `these_models`.

A claim holds where all its comparisons are significant at 5% (their largest p-value is the claim's), does not hold
where the opposite of any is (the least p-value times their number), and is undecided otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.studies.results import ImageGains, ImageOutcomes
from advmoe.studies.significance import bonferroni, crossed_test, image_test, sign_flip

LEVEL = 0.05
ENOUGH_SEEDS = 5
"""Seeds with which the exact test over them can reach 5%; with fewer no test decides."""
MARGIN = 0.01
"""One point of accuracy: the most that counts as losing nothing (non-inferiority), and the least that is a point more.
"""
SOURCE = "Zhang et al., ICCV 2023, sec. 4"


@dataclass(frozen=True)
class Comparison:
    """That `more` exceeds `less`: is right more often, or has the larger number."""

    more: str
    less: str
    of_more: ImageOutcomes | ImageGains | Mapping[int, float]
    """By seed: outcomes of images, or a number."""
    of_less: ImageOutcomes | ImageGains | Mapping[int, float]
    margin: float = field(default=0.0, kw_only=True)
    """How much `more` may be below `less` (a test of non-inferiority); negative: how much it must be above. Over
    images there is no test then.
    """
    among: int = field(default=1, kw_only=True)
    """Of how many comparisons this is one, any of which would make the statement true: so often the p-value for it
    counts.
    """
    unit: str = field(default="", kw_only=True)
    """Of numbers that are no share of images."""

    @property
    def name(self) -> str:
        """As in a verdict's `numbers`."""
        if self.margin == 0:
            return f"{self.less} < {self.more}"
        points = f"{100 * abs(self.margin):g} point{'s' * (abs(self.margin) != MARGIN)}"
        return f"{self.less} {'-' if self.margin > 0 else '+'} {points} < {self.more}"


def compare(comparison: Comparison) -> dict[str, Any]:
    """The numbers of one comparison: means, differences per seed, p-values both ways (see the module); none where the
    two have no image in common of a seed.
    """
    both = comparison.of_more.keys() & comparison.of_less.keys()
    seeds = sorted(seed for seed in both if _finite(comparison.of_more[seed]) and _finite(comparison.of_less[seed]))
    result: dict[str, Any] = {
        "more": comparison.more, "less": comparison.less, "seeds": seeds,
        **({"margin": comparison.margin} if comparison.margin else {}),
        **({"among": comparison.among} if comparison.among > 1 else {}),
        **({"unit": comparison.unit} if comparison.unit else {}),
    }  # fmt: skip
    if not seeds:
        return {**result, "test": "none: no seed has both"}
    by_image = [_per_image(comparison.of_more[seed], comparison.of_less[seed]) for seed in seeds]
    if any(each is not None and not each for each in by_image):
        return {**result, "test": "none: no image in common"}
    images = [each for each in by_image if each is not None]
    sides = [_means(comparison.of_more[seed], comparison.of_less[seed]) for seed in seeds]
    differences = [more - less for more, less in sides]
    result |= {
        "mean_more": sum(more for more, _ in sides) / len(seeds),
        "mean_less": sum(less for _, less in sides) / len(seeds),
        "differences": {str(seed): each for seed, each in zip(seeds, differences, strict=True)},
        **_both_ways("p_seeds", sign_flip, np.array(differences) + comparison.margin),
    }
    if images:
        result["images"] = len(set().union(*images))
        if len(seeds) >= ENOUGH_SEEDS:
            table, margin = _matrix(images), comparison.margin
            result |= {"p_crossed": crossed_test(table, margin), "p_crossed_opposite": crossed_test(-table, -margin)}
        if not comparison.margin:
            result |= _both_ways("p_images", image_test, np.array(_summed(images)))
    return {**result, "test": _tested(result)}


_Side = Mapping[int, int] | float


def _finite(side: _Side) -> bool:
    return len(side) > 0 if isinstance(side, Mapping) else math.isfinite(side)


def _per_image(more: _Side, less: _Side) -> dict[int, int] | None:
    """By image that both have, whether the one is right less whether the other is; None of numbers."""
    if not isinstance(more, Mapping) or not isinstance(less, Mapping):
        return None
    return {image: int(more[image]) - int(less[image]) for image in sorted(more.keys() & less.keys())}


def _means(more: _Side, less: _Side) -> list[float]:
    """Of both, over the images that both have; of images and a number, over all."""
    if isinstance(more, Mapping) and isinstance(less, Mapping):
        common = more.keys() & less.keys()
        return [sum(side[image] for image in common) / len(common) for side in (more, less)]
    return [sum(each.values()) / len(each) if isinstance(each, Mapping) else float(each) for each in (more, less)]


def _summed(seeds: Sequence[Mapping[int, int]]) -> list[int]:
    """By image, the sum over the seeds that have it."""
    return [sum(seed.get(image, 0) for seed in seeds) for image in sorted(set().union(*seeds))]


def _matrix(seeds: Sequence[Mapping[int, int]]) -> NDArray[np.float64]:
    """Differences by seed and image, (S, N), whose rows have the seeds' means. Where seeds have other images, each
    counts by how far it moves its seed's mean, and one that the seed has not by nothing.
    """
    images = sorted(set().union(*seeds))
    rows = []
    for seed in seeds:
        mean, weight = sum(seed.values()) / len(seed), len(images) / len(seed)
        rows.append([mean + weight * (seed[image] - mean) if image in seed else mean for image in images])
    return np.array(rows)


def _both_ways(name: str, test: Callable[[Any], float], differences: NDArray[Any]) -> dict[str, float]:
    """The p-values of `test` that differences are above 0, and below."""
    return {name: test(differences), f"{name}_opposite": test(-differences)}


def _tested(numbers: Mapping[str, Any]) -> str:
    """In words, the test that decides a comparison of known numbers."""
    seeds = len(numbers["seeds"])
    if "p_crossed" in numbers:
        among = f", for the claim times {numbers['among']}, so many were looked at" if "among" in numbers else ""
        return f"t test over {seeds} seeds and {numbers['images']} images, crossed{among}"
    few = "" if seeds >= ENOUGH_SEEDS else f": {ENOUGH_SEEDS} or more can decide"
    return f"exact sign-flip test over {seeds} seed{'s' * (seeds > 1)}{few}"


def _p_value(numbers: Mapping[str, Any], over: str, opposite: str = "") -> float:
    """That of a comparison `over` trained models or the images of these; of opposites, against the claim."""
    names = ["p_images"] if over == "images" else ["p_crossed", "p_seeds"]
    found = next((float(numbers[name + opposite]) for name in names if name in numbers), 1.0)
    return found if opposite else min(1.0, found * int(numbers.get("among", 1)))


def _judged(numbers: Sequence[Mapping[str, Any]], over: str) -> dict[str, Any]:
    """Verdict and p-value of comparisons all of which must hold, over trained `models` or `images` of these."""
    holds = max(_p_value(each, over) for each in numbers)
    fails = bonferroni([_p_value(each, over, "_opposite") for each in numbers])
    judgement, p_value = "undecided", holds
    if holds < LEVEL:
        judgement = "holds"
    elif fails < LEVEL:
        judgement, p_value = "does not hold", fails
    known = "p_images" if over == "images" else "p_seeds"
    return {"verdict": judgement, "p_value": p_value if any(known in each for each in numbers) else None}


def judged(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict of a claim that needs all of the comparisons `numbers` (see `compare`), fresh or stored: `verdict`,
    `p_value` and `test` of trained models, the same of images in `these_models`, which is None where none are known.
    """
    results = list(numbers.values())
    tests = [_tested(each) if "p_seeds" in each else each["test"] for each in results]
    these: dict[str, Any] | None = None
    if all("p_images" in each for each in results):
        counts = " and ".join(dict.fromkeys(str(each["images"]) for each in results))
        these = {**_judged(results, "images"), "test": f"exact sign-flip test over {counts} images of these models"}
    return {**_judged(results, "models"), "test": "; ".join(dict.fromkeys(tests)), "these_models": these}


def verdict(measure: str, comparisons: Sequence[Comparison], note: str = "") -> dict[str, Any]:
    """The verdict of a claim that needs all of `comparisons`, under one measure; as in `study.json`."""
    numbers = {each.name: compare(each) for each in comparisons}
    missing = [f"{name}: {each['test']}" for name, each in numbers.items() if each["test"].startswith("none")]
    notes = [*([f"Too little data: {'; '.join(missing)}."] if missing else []), note]
    return {"measure": measure, **judged(numbers), "numbers": numbers, "note": " ".join(notes).strip()}


def claim(name: str, statement: str, verdicts: Sequence[Mapping[str, Any]], source: str = SOURCE) -> dict[str, Any]:
    """A claim as in `study.json`."""
    return {"name": name, "statement": statement, "source": source, "verdicts": list(verdicts)}

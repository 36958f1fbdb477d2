"""Claims of the paper, judged on results: each holds, does not hold, or is undecided at this size.

A claim is a conjunction of comparisons "this is more than that". Each is tested on runs that share seeds and test
images, so in pairs, and twice:

- over seeds, by the exact sign-flip test, which asks whether training again would come out alike. This is the claim's
  verdict. Fewer than 5 seeds cannot decide;
- over the images of the given seeds, where outcomes of images are known. This speaks about these trained models alone,
  on other images of the kind, and stands under a name of its own: `these_models`.

A claim holds where all its comparisons are significant at 5% (their largest p-value is the claim's), does not hold
where the opposite of any is (the least p-value times their number), and is undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from advmoe.studies.exact_tests import bonferroni, image_test, sign_flip
from advmoe.studies.results import ImageOutcomes

LEVEL = 0.05
ENOUGH_SEEDS = 5
"""Seeds with which the exact test over seeds can reach 5%."""
MARGIN = 0.01
"""One point of accuracy: the most that counts as losing nothing (non-inferiority), and the least that is a point more.
"""
SOURCE = "Zhang et al., ICCV 2023, sec. 4"


@dataclass(frozen=True)
class Comparison:
    """That `more` exceeds `less`: is right more often, or has the larger number."""

    more: str
    less: str
    of_more: ImageOutcomes | Mapping[int, float]
    """By seed: outcomes of images, or a number."""
    of_less: ImageOutcomes | Mapping[int, float]
    margin: float = field(default=0.0, kw_only=True)
    """How much `more` may be below `less` (a test of non-inferiority); negative: how much it must be above. Over
    images there is no test then.
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
    """The numbers of one comparison: means, differences per seed, p-values both ways over seeds and over images."""
    seeds = sorted(comparison.of_more.keys() & comparison.of_less.keys())
    result: dict[str, Any] = {
        "more": comparison.more, "less": comparison.less, "seeds": seeds, "p": 1.0, "p_opposite": 1.0,
        **({"margin": comparison.margin} if comparison.margin else {}),
        **({"unit": comparison.unit} if comparison.unit else {}),
    }  # fmt: skip
    if not seeds:
        return {**result, "test": "none: no seed has both"}
    differences, images = dict[int, float](), dict[int, int]()
    totals = [0.0, 0.0]
    for seed in seeds:
        more, less = comparison.of_more[seed], comparison.of_less[seed]
        if isinstance(more, Mapping) and isinstance(less, Mapping):
            common = sorted(more.keys() & less.keys())
            if not common:
                return {**result, "test": "none: no image in common"}
            for image in common:
                images[image] = images.get(image, 0) + int(more[image]) - int(less[image])
            sides = [sum(side[image] for image in common) / len(common) for side in (more, less)]
        else:
            sides = [float(each) for each in (more, less) if not isinstance(each, Mapping)]
        differences[seed] = sides[0] - sides[1]
        totals = [total + side for total, side in zip(totals, sides, strict=True)]
    values = [each + comparison.margin for each in differences.values()]
    result |= {
        "mean_more": totals[0] / len(seeds), "mean_less": totals[1] / len(seeds),
        "differences": {str(seed): each for seed, each in differences.items()},
        "p_seeds": sign_flip(values), "p_seeds_opposite": sign_flip([-each for each in values]),
    }  # fmt: skip
    if images and not comparison.margin:
        counts = list(images.values())
        result |= {
            "images": len(images), "p_images": image_test(counts), "p_images_opposite": image_test([-c for c in counts])
        }  # fmt: skip
    return {**result, "p": result["p_seeds"], "p_opposite": result["p_seeds_opposite"], "test": _over_seeds(len(seeds))}


def _over_seeds(number: int) -> str:
    few = "" if number >= ENOUGH_SEEDS else f": {ENOUGH_SEEDS} or more can decide"
    return f"exact sign-flip test over {number} seed{'s' * (number > 1)}{few}"


def _judged(numbers: Sequence[Mapping[str, Any]], over: str) -> dict[str, Any]:
    """Verdict and p-value of comparisons all of which must hold, by their p-values `over` seeds or images."""
    holds = max(each.get(f"p_{over}", 1.0) for each in numbers)
    fails = bonferroni([each.get(f"p_{over}_opposite", 1.0) for each in numbers])
    judgement, p_value = "undecided", holds
    if holds < LEVEL:
        judgement = "holds"
    elif fails < LEVEL:
        judgement, p_value = "does not hold", fails
    return {"verdict": judgement, "p_value": p_value if any(f"p_{over}" in each for each in numbers) else None}


def judged(numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict of a claim that needs all of the comparisons `numbers` (see `compare`), fresh or stored: `verdict`,
    `p_value` and `test` over seeds, the same over images in `these_models`, which is None where none are known.
    """
    results = list(numbers.values())
    tested = [each for each in results if "p_seeds" in each]
    tests = [_over_seeds(len(each["seeds"])) for each in tested]
    tests += [each["test"] for each in results if "p_seeds" not in each]
    images = [each["images"] for each in results if "p_images" in each]
    these: dict[str, Any] | None = None
    if len(images) == len(results):
        counts = " and ".join(map(str, dict.fromkeys(images)))
        these = {**_judged(results, "images"), "test": f"exact sign-flip test over {counts} images of these models"}
    return {
        **_judged(results, "seeds"), "test": "; ".join(dict.fromkeys(tests)), "these_models": these
    }  # fmt: skip


def verdict(measure: str, comparisons: Sequence[Comparison], note: str = "") -> dict[str, Any]:
    """The verdict of a claim that needs all of `comparisons`, under one measure; as in `study.json`."""
    numbers = {each.name: compare(each) for each in comparisons}
    missing = [f"{name}: {each['test']}" for name, each in numbers.items() if each["test"].startswith("none")]
    notes = [*([f"Too little data: {'; '.join(missing)}."] if missing else []), note]
    return {"measure": measure, **judged(numbers), "numbers": numbers, "note": " ".join(notes).strip()}


def claim(name: str, statement: str, verdicts: Sequence[Mapping[str, Any]], source: str = SOURCE) -> dict[str, Any]:
    """A claim as in `study.json`."""
    return {"name": name, "statement": statement, "source": source, "verdicts": list(verdicts)}

"""Claims of the paper, judged on results: each holds, does not hold, or is undecided at this size.

A claim is a conjunction of comparisons "this is more often right than that". Each is tested on runs that share seeds
and test images, so in pairs:

- with 5 seeds or more by the exact sign-flip test over seeds, which asks whether training again would come out alike;
- with 3 or 4, which that test cannot call significant, a comparison counts where every seed has the same sign and the
  exact sign-flip test over images is significant too. That test speaks about the trained models alone;
- with fewer, nothing is decided.

A claim holds where all its comparisons are significant at 5% (their largest p-value is the claim's), does not hold
where the opposite of any is (the least p-value times their number), and is undecided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from advmoe.studies.exact_tests import bonferroni, image_test, sign_flip
from advmoe.studies.results import ImageOutcomes

LEVEL = 0.05
ENOUGH_SEEDS = 5
"""Seeds with which the exact test over seeds can reach 5%."""
FEWEST_SEEDS = 3
SOURCE = "Zhang et al., ICCV 2023, sec. 4"


@dataclass(frozen=True)
class Comparison:
    """That `more` is right more often than `less`."""

    more: str
    less: str
    of_more: ImageOutcomes
    of_less: ImageOutcomes


def compare(comparison: Comparison) -> dict[str, Any]:
    """The numbers of one comparison: means, differences per seed, p-values both ways, and which test decides."""
    seeds = sorted(comparison.of_more.keys() & comparison.of_less.keys())
    result: dict[str, Any] = {
        "more": comparison.more, "less": comparison.less, "seeds": seeds, "p": 1.0, "p_opposite": 1.0,
    }  # fmt: skip
    if not seeds:
        return {**result, "test": "none: no seed has both"}
    differences, images = {}, dict[int, int]()
    totals = [0.0, 0.0]
    for seed in seeds:
        more, less = comparison.of_more[seed], comparison.of_less[seed]
        common = sorted(more.keys() & less.keys())
        if not common:
            return {**result, "test": "none: no image in common"}
        for image in common:
            images[image] = images.get(image, 0) + int(more[image]) - int(less[image])
        shares = [sum(side[image] for image in common) / len(common) for side in (more, less)]
        differences[seed] = shares[0] - shares[1]
        totals = [total + share for total, share in zip(totals, shares, strict=True)]
    values, counts = list(differences.values()), list(images.values())
    opposite = [-each for each in values], [-each for each in counts]
    result |= {
        "mean_more": totals[0] / len(seeds), "mean_less": totals[1] / len(seeds),
        "differences": {str(seed): each for seed, each in differences.items()}, "images": len(images),
        "p_seeds": sign_flip(values), "p_seeds_opposite": sign_flip(opposite[0]),
        "p_images": image_test(counts), "p_images_opposite": image_test(opposite[1]),
    }  # fmt: skip
    if len(seeds) >= ENOUGH_SEEDS:
        return {
            **result, "p": result["p_seeds"], "p_opposite": result["p_seeds_opposite"],
            "test": f"exact sign-flip test over {len(seeds)} seeds",
        }  # fmt: skip
    test = f"exact sign-flip test over {len(images)} images"
    if len(seeds) < FEWEST_SEEDS:
        return {**result, "test": f"none: {len(seeds)} of at least {FEWEST_SEEDS} seeds"}
    return {
        **result, "p": result["p_images"] if all(each > 0 for each in values) else 1.0,
        "p_opposite": result["p_images_opposite"] if all(each < 0 for each in values) else 1.0,
        "test": f"{test}, where all {len(seeds)} seeds agree in sign (over seeds alone p >= {0.5 ** len(seeds):g})",
    }  # fmt: skip


def verdict(measure: str, comparisons: Sequence[Comparison], note: str = "") -> dict[str, Any]:
    """The verdict of a claim that needs all of `comparisons`, under one measure; as in `study.json`."""
    results = [compare(each) for each in comparisons]
    holds, fails = max(each["p"] for each in results), bonferroni([each["p_opposite"] for each in results])
    judgement, p_value = "undecided", holds
    if holds < LEVEL:
        judgement = "holds"
    elif fails < LEVEL:
        judgement, p_value = "does not hold", fails
    tests = list(dict.fromkeys(each["test"] for each in results))
    missing = [
        f"{each['less']} < {each['more']}: {each['test']}" for each in results if each["test"].startswith("none")
    ]
    return {
        "measure": measure,
        "verdict": judgement,
        "p_value": None if len(missing) == len(results) else p_value,
        "test": "; ".join(tests),
        "numbers": {f"{each['less']} < {each['more']}": each for each in results},
        "note": " ".join([*([f"Too little data: {'; '.join(missing)}."] if missing else []), note]).strip(),
    }


def claim(name: str, statement: str, verdicts: Sequence[Mapping[str, Any]], source: str = SOURCE) -> dict[str, Any]:
    """A claim as in `study.json`."""
    return {"name": name, "statement": statement, "source": source, "verdicts": list(verdicts)}

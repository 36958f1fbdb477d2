"""The README's results and its box of what is known, beside the zoo and the results that are stored."""

import re
from pathlib import Path

import numpy as np

from advmoe.config import Config
from advmoe.evaluation.intervals import wilson
from advmoe.studies.claim_list import NOT_JUDGED, NOT_RUN, judge, stored
from advmoe.studies.claims import ENOUGH_SEEDS
from advmoe.studies.paper_claims import BEYOND
from advmoe.studies.significance import image_test
from advmoe.tables import BACKBONES
from advmoe.text import percent, radius
from advmoe.zoo import PACKED, Entry, entries_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BOX = " ".join(line.removeprefix(">").strip() for line in README.splitlines() if line.startswith(">"))
RESULTS = " ".join(README.split("## Results")[1].split("|")[0].split())
ZOO = {entry.title: entry for entry in entries_of(PACKED).values() if radius(entry.eps, entry.norm) == "8/255"}
DENSE, MOE, LAYERS = ZOO["AT (S-Dense)"], ZOO["AT (MoE)"], ZOO["AdvMoE (layer routers, TRADES)"]


def pgd(entry: Entry) -> float:
    return entry.accuracy["pgd-50"].value


def outcomes(entry: Entry, which: str) -> np.ndarray:
    """Which images withstood every attack of the evaluation, (N,)."""
    with np.load(ROOT / "docs/results/zoo" / entry.name / which / "evaluation-examples.npz") as stored:
        return np.logical_and.reduce([stored[name] for name in stored.files if name.startswith("robust/")])


def behind(one: Entry, other: Entry, which: str) -> float:
    """The one-sided p-value, over images, of `other` being more robust than `one`."""
    return image_test(outcomes(other, which).astype(int) - outcomes(one, which).astype(int))


def configuration(entry: Entry) -> Config:
    return Config.load(PACKED / entry.name / "config.yaml")


def test_the_table_holds_the_zoos_models_with_their_numbers() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:3] == "| A"]
    assert {row[0] for row in cells} == set(ZOO)
    for title, *shown in cells:
        entry = ZOO[title]
        images = (entry.accuracy["clean"].images, entry.accuracy["pgd-50"].images, entry.worst_case.images)
        assert images == (10_000, 10_000, 1000)
        numbers = (entry.accuracy["clean"].value, pgd(entry), entry.worst_case.value, entry.masking_gap)
        for text, share in zip(shown, numbers, strict=False):
            assert share is not None and abs(float(text) - 100 * share) < 0.0501, (title, text)
        assert shown[4] == f"{1000 * entry.gmacs:.1f}"


def test_what_is_said_above_the_table() -> None:
    assert RESULTS.startswith("ResNet-18 of width 16, CIFAR-10 (re-coded as JPEG), 3 epochs, eps 8/255, one seed, %:")
    for entry in ZOO.values():
        config = configuration(entry)
        assert (config.model.name, config.model.width, config.training.epochs) == ("resnet18", 16, 3)
        assert entry.data == "CIFAR-10 (JPEG)" and config.training.seed == 0
        assert {"pgd-50", "autoattack"} <= set(entry.attacks) and ("routed" in entry.attacks) == entry.routed
    # "on all 10,000 test images, whose intervals are about 1 point; ... on 1,000, whose intervals are about 3"
    for images, points in ((10_000, 1), (1000, 3)):
        assert f"{images:,}" in RESULTS and f"about {points}" in RESULTS
        for entry in ZOO.values():
            low, high = wilson(round(pgd(entry) * images), images)
            assert round(100 * (high - low) / 2) == points


def test_the_best_under_pgd_is_the_weakest_in_the_worst_case() -> None:
    assert "The model that looks best under PGD-50 has the lowest worst case" in README
    lowest = min(ZOO.values(), key=lambda each: each.worst_case.value)
    assert max(ZOO.values(), key=pgd) == lowest


def test_the_size_of_the_largest_trainings() -> None:
    words = (
        r"(\d+) epochs of ([\d,]+) CIFAR-10 images at 32 pixels, or (\d+) at 16 pixels, at a quarter of the paper's "
        "width; the recipes of its settings train 100 epochs"
    )
    epochs, images, small = re.findall(words, BOX)[0]
    pathway = [Config.load(each) for each in (ROOT / "docs/results/pathway/runs").glob("*/config.yaml")]
    most = dict[int, int]()
    for config in [*map(configuration, ZOO.values()), *pathway]:
        side = config.data.image_size or 32
        most[side] = max(config.training.epochs, most.get(side, 0))
        assert config.data.train_examples is None
        assert 50_000 * (1 - config.data.val_fraction) == int(images.replace(",", ""))
        assert config.model.width is not None and 4 * config.model.width <= BACKBONES["resnet18"].width
    assert most == {32: int(epochs), 16: int(small)}


def test_what_methods_says_of_these_models() -> None:
    text = " ".join((ROOT / "docs/results/methods.md").read_text().split())
    embedding, image = (next(e for t, e in ZOO.items() if f"({kind} router" in t) for kind in ("embedding", "image"))
    for entry, words, least, most in (
        (embedding, "24.5 against 18.1, p < 1e-9", 0, 1e-9), (image, "22.2, p = 0.025", 0.0245, 0.0255),
        (MOE, "22.6, p = 0.053", 0.0525, 0.0535), (LAYERS, "22.9, p = 0.11", 0.105, 0.115),
    ):  # fmt: skip
        assert words in text and least <= 2 * behind(entry, DENSE, "strong") < most
    assert "27.1 and 29.6 against 26.0, p = 0.004 and less" in text
    assert all(2 * behind(DENSE, entry, "all") < 0.0045 for entry in (embedding, image))
    assert "AdvMoE (24.6) is not told apart from AT (MoE) (24.4)" in text and 2 * behind(MOE, LAYERS, "all") > 0.05
    assert "AutoAttack alone would overrate two of the five models, by a point and by three" in text
    over = sorted(entry.accuracy["autoattack"].value - entry.worst_case.value for entry in ZOO.values())
    assert over[2] < 0.005 and (round(100 * over[3]), round(100 * over[4])) == (1, 3)


def test_the_papers_claims_at_that_size() -> None:
    assert "AdvMoE with the paper's layer routers is below AT (S-Dense) under PGD-50, and not told apart from it" in BOX
    assert 2 * behind(LAYERS, DENSE, "all") < 0.05 < 2 * behind(LAYERS, DENSE, "strong") < 1
    assert "Of one model each, no routed one is shown to lead in the worst case" in BOX
    assert all(entry.worst_case.value <= DENSE.worst_case.value for entry in ZOO.values())


def test_what_training_again_would_give() -> None:
    studies = stored(ROOT / "docs/results")
    assert "five seeds at a smaller size" in BOX and len(studies["table1"]["seeds"]) == ENOUGH_SEEDS == 5
    paper = [(claim, told) for claim, judged in judge(studies) for told in judged if claim.place != BEYOND]

    def worst(statement: str) -> set[str]:
        return {
            re.sub(r" \(5 seeds, p = 0\.(?!018)\d+\)", "", told.models)
            for claim, told in paper
            if claim.study == "table1" and claim.statement == statement and told.measure == "worst case"
        }

    below = "is *below* AT (Sparse), which is trained longer, in the worst case (p = 0.018, one-sided)"
    assert below in BOX and worst("AdvMoE is more robust than AT (Sparse)") == {"does not hold (5 seeds, p = 0.018)"}
    assert "It is not told apart from AT (Dense) or AT (S-Dense)" in BOX
    assert worst("AdvMoE is more robust than AT (Dense)") == {"undecided"}
    assert worst("AdvMoE is more robust than AT (S-Dense)") == {"undecided"}
    assert "nor is AT (MoE) from AT (S-Dense)" in BOX
    assert worst("AT (MoE) is less robust than AT (S-Dense)") == {"undecided"}
    place = "[more than a point below AT (S-Dense)](docs/results/price.md)"
    assert f"{place} in the worst case (20.9 against 23.6%, p = 0.021)" in BOX
    lost = [
        (told.found.partition(" %")[0], told.models)
        for claim, judged in judge(studies)
        for told in judged
        if claim.claim == "no-worse-than-s-dense" and (told.run, told.measure) == ("efficiency-32", "both, worst case")
    ]
    assert lost == [("23.6 against 20.9", "does not hold (5 seeds, p = 0.021)")]
    assert "those on cost hold (more than half of the inference saved, about twice the time of training)" in BOX
    costs = {"half-the-cost", "twice-the-time"}
    assert {told.models for claim, told in paper if claim.claim in costs} == {"holds"}
    assert "on robustness most are undecided or not run" in BOX
    words = [told.models.partition(" (")[0] for claim, told in paper if claim.claim not in costs]
    assert sum(word in ("undecided", NOT_RUN, NOT_JUDGED) for word in words) > len(words) / 2


def test_how_far_the_worst_case_lies_under_pgd() -> None:
    gaps = sorted(entry.masking_gap or 0 for entry in ZOO.values())
    least, most = (percent(gap).removesuffix(".0") for gap in (gaps[0], gaps[-1]))
    assert f"it lies {least} to {most} points under PGD-50, on 1,000 images of five models" in BOX and len(ZOO) == 5


def test_the_versions_that_tests_run_with() -> None:
    pinned = re.findall(r"^torch==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"The tests run with Python 3.11 and PyTorch {pinned[0]}." in BOX

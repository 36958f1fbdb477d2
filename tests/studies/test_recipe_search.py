"""The search for a recipe: what is combined, what is compared, and by which images it is chosen."""

import pytest

from advmoe.studies.catalogue import STUDIES
from advmoe.studies.recipe_search import BASE, BEST, CHANGES, chosen, combined
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named

LOW, MIDDLE, HIGH = "000000" + "000000", "111111" + "000000", "111111" + "111111"
FIRST, SECOND = STUDIES["recipes"].stages


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of six seeds: its robust accuracy on validation images, and outcomes on test images."""

    def make(variant, validated, pgd=MIDDLE, soft=None, method="AdvMoE"):
        epochs = [{"seconds": 1.0, "val": {"robust_accuracy": share}} for share in (0.0, validated)]
        measurements = {"epochs": epochs, "accuracy": evaluated(HIGH, {"pgd-10": pgd, "pgd-10-soft": soft or pgd})}
        labels = {"method": method, **({"variant": variant} if variant else {})}
        return row(labels, dict.fromkeys(range(6), measurements))

    return make


def test_of_each_thing_changed_the_best_is_kept_if_it_beats_the_base(row_of):
    scores = {
        "soft inner attack": 0.41, "mixed inner attack": 0.45, "image router": 0.39, "EMA": 0.5, "AWP": 0.42,
        "balance": 0.44,
    }  # fmt: skip
    rows = [row_of(BASE, 0.4), *(row_of(name, score) for name, score in scores.items())]
    assert chosen(Results(rows)) == ["EMA", "mixed inner attack", "balance"]  # AWP would be the fourth
    assert chosen(Results(rows[:3])) == ["mixed inner attack"]
    assert chosen(Results([row_of(BASE, 0.6), *rows[1:]])) == []
    assert chosen(Results(rows[1:])) == []  # without the base nothing is known to beat it
    assert chosen(Results()) == []


def test_settings_of_several_changes_lie_over_one_another():
    assert combined(["EMA", "AWP", "embedding router, random codes"]) == {
        "model": {"router": "embedding"},
        "training": {"ema": 0.99, "awp": 0.005, "router_objective": "codes", "codes": "random"},
    }


def test_the_best_are_trained_together_and_the_baseline_gets_what_helps_any_network(row_of):
    scale = scale_named("smoke")
    rows = [row_of(BASE, 0.4), row_of("EMA", 0.5), row_of("soft inner attack", 0.45)]
    together, baseline = SECOND(scale, Results(rows))
    assert together.run.labels["variant"] == f"{BEST}: EMA, soft inner attack"
    assert together.run.settings["training"]["ema"] == 0.99
    assert together.run.settings["training"]["attack_routing"] == "soft"
    assert (baseline.run.labels["method"], baseline.run.labels["variant"]) == ("AT (S-Dense)", "EMA")
    assert (
        baseline.run.settings["training"]["ema"] == 0.99 and "attack_routing" not in baseline.run.settings["training"]
    )
    (alone,) = SECOND(scale, Results([*rows[:2]]))  # one change is there already; the baseline is not
    assert alone.run.labels["method"] == "AT (S-Dense)"
    assert SECOND(scale, Results(rows[:1])) == SECOND(scale, Results()) == []


def test_the_figure_tells_a_recipe_from_the_baseline_that_has_it_too(row_of):
    rows = [
        row_of(None, 0.3, LOW, method="AT (S-Dense)"), row_of(BASE, 0.4, MIDDLE), row_of("EMA", 0.5, HIGH),
        row_of("EMA", 0.3, MIDDLE, method="AT (S-Dense)"),
    ]  # fmt: skip
    outcome = STUDIES["recipes"].show(scale_named("smoke"), Results(rows))
    (figure,) = outcome.figures
    shown = {group: round(values["RA PGD %"]["y"]) for group, values in figure.data.items()}
    assert shown == {"AT (S-Dense)": 0, BASE: 50, "EMA": 100, "AT (S-Dense), EMA": 50}
    outcome = STUDIES["recipes"].show(scale_named("smoke"), Results(rows[1:3]))  # --only: nothing to compare with
    assert outcome.notes == ["The best recipe by validation, over all seeds: EMA."]


@pytest.mark.parametrize(("name", "start"), [("smoke", None), ("cpu", "independent start"), ("paper", "shared start")])
def test_every_change_changes_something(name, start):
    baseline, base, *changed = FIRST(scale_named(name), Results())
    assert (baseline.run.labels["method"], base.run.labels["variant"]) == ("AT (S-Dense)", BASE)
    variants = [row.run.labels["variant"] for row in changed]
    if start is None:
        assert variants == ["soft inner attack", "EMA"]
    else:
        other = {"independent start": "shared start", "shared start": "independent start"}[start]
        assert variants == [variant for variant in CHANGES if variant != other]


def test_the_recipe_is_chosen_on_validation_images_and_judged_on_others(row_of):
    rows = [
        row_of(None, 0.3, MIDDLE, method="AT (S-Dense)"), row_of(BASE, 0.4, HIGH), row_of("EMA", 0.5, HIGH, soft=LOW),
    ]  # fmt: skip
    outcome = STUDIES["recipes"].show(scale_named("smoke"), Results(rows))
    (claim,) = outcome.claims
    assert claim["statement"] == (
        "The recipe best on validation images, of the other seeds, is more robust than AT (S-Dense)."
    )
    assert {each["measure"]: each["verdict"] for each in claim["verdicts"]} == {
        "PGD": "holds", "worst case": "does not hold",
    }  # fmt: skip
    assert outcome.notes == [
        "The best recipe by validation, over all seeds: EMA. What the other seeds choose is below AT (S-Dense) in the "
        "worst case at this size."
    ]
    assert list(outcome.figures[0].data) == ["AT (S-Dense)", BASE, "EMA"]
    above = STUDIES["recipes"].show(scale_named("smoke"), Results(rows[:2]))
    assert above.notes == [
        f"The best recipe by validation, over all seeds: {BASE}. What the other seeds choose is above AT (S-Dense) in "
        "the worst case at this size."
    ]


def test_it_must_beat_every_baseline(row_of):
    rows = [
        row_of(None, 0.3, LOW, method="AT (S-Dense)"), row_of("EMA", 0.3, HIGH, method="AT (S-Dense)"),
        row_of(BASE, 0.4, MIDDLE),
    ]  # fmt: skip
    (claim,) = STUDIES["recipes"].show(scale_named("smoke"), Results(rows)).claims
    first = claim["verdicts"][0]
    assert [numbers["less"] for numbers in first["numbers"].values()] == ["AT (S-Dense)", "AT (S-Dense), EMA"]
    assert first["verdict"] == "does not hold"


def test_without_a_routed_model_there_is_nothing_to_claim(row_of):
    outcome = STUDIES["recipes"].show(scale_named("smoke"), Results([row_of(None, 0.3, method="AT (S-Dense)")]))
    assert not outcome.claims and outcome.notes == ["No routed model was trained."]


def test_each_seed_is_tested_with_what_the_others_choose(row, evaluated):
    """A seed that was lucky, on validation and test images alike, does not speak for its recipe."""

    def recipe(name, validated, right):
        return row({"method": "AdvMoE", "variant": name}, {
            seed: {
                "epochs": [{"seconds": 1.0, "val": {"robust_accuracy": share}}],
                "accuracy": evaluated("1111", {"pgd-10": "1" * n + "0" * (4 - n)}),
            }
            for seed, (share, n) in enumerate(zip(validated, right, strict=True))
        })  # fmt: skip

    plain = row(
        {"method": "AT (S-Dense)"}, {seed: {"accuracy": evaluated("1111", {"pgd-10": "1100"})} for seed in range(3)}
    )
    # Alone the first recipe has the best mean, by its first seed.
    rows = [plain, recipe("EMA", [0.9, 0.1, 0.1], [4, 1, 1]), recipe(BASE, [0.3, 0.3, 0.3], [2, 3, 3])]
    (claim,) = STUDIES["recipes"].show(scale_named("smoke"), Results(rows)).claims
    (numbers,) = claim["verdicts"][0]["numbers"].values()
    # The others choose the base for the first seed (2 of 4), and EMA for the rest, which it is bad at (1 of 4).
    assert numbers["differences"] == {"0": 0.0, "1": -0.25, "2": -0.25}

"""AdvMoE at the price of AT: which variant is said to lose nothing."""

import pytest

from advmoe.config import Config
from advmoe.studies.catalogue import STUDIES
from advmoe.studies.efficiency import VARIANTS, loses_nothing
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named

FULL = "1" * 200


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of a variant: its price, how many of 200 images it is wrong on, and how many seeds it has."""

    def make(variant, price, wrong=0, seeds=3):
        measurements = {"accuracy": evaluated(FULL, {"pgd-10": "0" * wrong + "1" * (200 - wrong)})}
        if price is not None:
            measurements["pace"] = ("pace", {"ratio": price}, {})
        labels = {"method": "AdvMoE", "variant": variant} if variant else {"method": "AT (MoE)"}
        return row(labels, dict.fromkeys(range(seeds), measurements))

    return make


def show(*rows):
    return STUDIES["efficiency"].show(scale_named("smoke"), Results(rows))


def verdicts(outcome):
    (claim,) = outcome.claims
    return {each["measure"]: each["verdict"] for each in claim["verdicts"]}


def test_the_cheapest_that_loses_nothing(row_of):
    outcome = show(
        row_of("", 1.0), row_of("both", 2.0), row_of("shared-attack", 1.4), row_of("by-iteration", 1.0, wrong=20),
        row_of("every-2", 1.2, wrong=2), row_of("every-4", 1.1, wrong=3),
    )  # fmt: skip
    # Too dear; loses; a point and no more, on images that no test tells from none; a point and a half.
    assert verdicts(outcome) == {
        "shared-attack": "does not hold", "by-iteration": "does not hold", "every-2": "holds",
        "every-4": "does not hold",
    }  # fmt: skip
    assert outcome.notes == ["The cheapest variant that loses nothing at this size: every-2, 1.20 of AT (MoE)."]
    (figure,) = outcome.figures
    assert [(point["x"], point["y"]) for point in figure.data["AdvMoE, every-4"]] == [(1.1, pytest.approx(98.5))]
    assert figure.data["AT (MoE)"][0]["x"] == 1.0
    assert [row["ratio"]["mean"] for row in outcome.tables[0]["rows"]] == pytest.approx([1.0, 2.0, 1.4, 1.0, 1.2, 1.1])


def test_a_small_loss_that_a_test_finds_is_one():
    small = {"mean_more": 0.5, "mean_less": 0.495, "p": 0.01}
    assert loses_nothing({"PGD": {**small, "p": 0.06}}) and not loses_nothing({"PGD": small})
    assert not loses_nothing({"PGD": {**small, "p": 0.9, "mean_less": 0.4}})
    assert not loses_nothing({"PGD": {**small, "p": 0.9}, "worst case": small})


def test_with_too_little_data_no_variant_is_called_the_cheapest(row_of):
    few = "Too little data to say of any variant that it loses nothing."
    for rows in (
        (row_of("both", 2.0, seeds=1), row_of("every-2", 1.2, seeds=1)),
        (row_of("both", 2.0), row_of("every-2", None)),
    ):
        outcome = show(*rows)
        assert verdicts(outcome) == {"every-2": "undecided"} and outcome.notes == [few]
        assert outcome.claims[0]["verdicts"][0]["note"] == "Too little data."
    assert show().notes == [few]


def test_where_every_variant_loses_the_paper_s_stays(row_of):
    outcome = show(row_of("both", 2.0), row_of("every-2", 1.2, wrong=50))
    assert verdicts(outcome) == {"every-2": "does not hold"}
    assert outcome.notes[0].startswith("No variant loses nothing at this size: the paper's alternation stays")


def test_every_variant_is_one_that_training_knows():
    scale = scale_named("smoke")
    rows = STUDIES["efficiency"].stages[0](scale, Results())
    assert [row.run.labels.get("variant") for row in rows] == [None, *VARIANTS]
    base, *variants = [Config.from_dict(row.run.settings).training for row in rows]
    assert base.method == "at" and {each.method for each in variants} == {"advmoe"}
    assert [each.alternation for each in variants] == [*VARIANTS]
    assert {row.measures["pace"].against.name for row in rows} == {rows[0].run.name}

"""Figure 1b: every kind of network, trained without attacks and with."""

from advmoe.studies.catalogue import STUDIES
from advmoe.studies.fig1b import KINDS
from advmoe.studies.results import Results
from advmoe.studies.scales import COMPARED, scale_named

SMOKE = scale_named("smoke")


def test_each_kind_is_trained_both_ways():
    rows = STUDIES["fig1b"].stages[0](scale_named("cpu"), Results())
    methods = [row.run.labels["method"] for row in rows]
    assert methods == [*(f"standard {kind}" for kind in KINDS), *COMPARED]
    kinds = {row.run.labels["method"]: row.run.settings["model"]["kind"] for row in rows}
    assert all(kinds[f"standard {kind}"] == kinds[f"AT ({kind})"] for kind in KINDS)


def test_what_attacks_in_training_change(row, evaluated):
    """MoE is the best without attacks and the worst with them, as the paper has it."""
    clean = {"standard S-Dense": 8, "standard MoE": 10}
    robust = {"standard S-Dense": 0, "standard MoE": 0, "AT (S-Dense)": 6, "AT (MoE)": 4, "AdvMoE": 9, "AT (Dense)": 9}

    def marks(number):
        return ("1" * number + "0" * (10 - number)) * 100

    rows = [
        row(
            {"method": name, "dataset": "d", "backbone": "b"},
            {key: {"accuracy": evaluated(marks(clean.get(name, 10)), {"pgd-10": marks(number)})} for key in range(5)},
        )
        for name, number in robust.items()
    ]
    outcome = STUDIES["fig1b"].show(SMOKE, Results(rows))
    told = {claim["name"]: [each["verdict"] for each in claim["verdicts"]] for claim in outcome.claims}
    assert told["at-makes-robust, S-Dense"] == told["at-makes-robust, MoE"] == ["holds", "holds"]
    assert told["at-makes-robust, Dense"] == ["undecided", "undecided"]  # the standard one was not trained
    assert told["s-dense-is-the-lower-bound"] == ["holds"] and told["above-dense"] == ["undecided", "undecided"]
    (lower,) = (claim for claim in outcome.claims if claim["name"] == "s-dense-is-the-lower-bound")
    assert set(lower["verdicts"][0]["numbers"]) == {"standard S-Dense - 1 point < standard MoE"}
    assert [line["sa"]["mean"] for line in outcome.tables[0]["rows"][:2]] == [80.0, 100.0]
    assert [figure.name for figure in outcome.figures] == ["fig1b-sa", "fig1b-ra"]

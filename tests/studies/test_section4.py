"""Figures 3 to 5 on made-up results: which side of a claim is which, and the sums of categories."""

import pytest

from advmoe.config import Config, merged
from advmoe.studies.catalogue import STUDIES
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named

THETA, THETA2 = "router-robustified MoE", "router-robustified MoE, then its experts"
M1, M2, M3 = "standard MoE", "AT (S-Dense)", "robust mask of standard Dense"
LOW, MIDDLE, HIGH = "000000" + "000000", "111111" + "000000", "111111" + "111111"
PARTS = ("both_survive", "only_routing_fails", "only_prediction_fails", "both_fail")


@pytest.fixture
def row_of(row, evaluated):
    """Makes a row of six seeds: outcomes under PGD and through soft routing, and the category of each image."""

    def make(method, pgd, soft=None, categories=None, right=None, **labels):
        measurements = {"accuracy": evaluated("1" * len(pgd), {"pgd-10": pgd, "pgd-10-soft": soft or pgd})}
        if categories is not None:
            shares = {part: categories.count(number) / len(categories) for number, part in enumerate(PARTS, start=1)}
            content = {name: {"categories": shares} for name in ("pgd-10", "pgd-10-soft")}
            right = [True] * len(categories) if right is None else right
            arrays = {"dissection_examples": {**dict.fromkeys(content, categories), "clean_correct": right}}
            measurements["dissection"] = ("dissect", content, arrays)
        return row({"method": method, **labels}, dict.fromkeys(range(6), measurements))

    return make


def show(name, *rows):
    return STUDIES[name].show(scale_named("smoke"), Results(rows))


def verdicts(outcome):
    claim, *_ = outcome.claims
    return {each["measure"]: each["verdict"] for each in claim["verdicts"]}


def test_insight_1_is_between_the_standard_moe_and_s_dense(row_of):
    at = {"scale": 0.5}
    assert verdicts(show("fig3", row_of(THETA, MIDDLE, **at), row_of(M1, LOW, **at), row_of(M2, HIGH, **at))) == {
        "PGD": "holds", "worst case": "holds",
    }  # fmt: skip
    above = show("fig3", row_of(THETA, HIGH, soft=MIDDLE, **at), row_of(M1, LOW, **at), row_of(M2, MIDDLE, **at))
    assert verdicts(above) == {"PGD": "does not hold", "worst case": "undecided"}  # in the worst case they are level
    elsewhere = show("fig3", *(row_of(name, LOW, scale=0.8) for name in (THETA, M1, M2)))
    assert verdicts(elsewhere) == {"PGD": "undecided", "worst case": "undecided"}
    assert "robustified_moe" not in above.figures[0].caption
    assert "router-robustified MoE 37.64, standard MoE 0, AT (S-Dense) 47.68" in above.figures[0].caption


def test_robust_routers_beside_a_robust_mask(row_of):
    _, claim = show("fig3", row_of(THETA, MIDDLE, scale=0.5), row_of(M3, LOW, scale=0.5)).claims
    assert claim["name"] == "above-the-mask" and [each["verdict"] for each in claim["verdicts"]] == ["holds", "holds"]


def test_insight_2_compares_categories_3_and_1(row_of):
    often_fooled, seldom_fooled = [3] * 9 + [1] * 1 + [2, 4], [1] * 9 + [3] * 1 + [2, 4]
    standard = row_of(M1, LOW)
    outcome = show("fig4", row_of(THETA, MIDDLE, categories=often_fooled), standard)
    assert verdicts(outcome) == {"PGD": "holds", "worst case": "holds"}
    numbers = outcome.claims[0]["verdicts"][0]["numbers"][
        "1 both survive < 3 only prediction fails, of images right clean"
    ]
    assert (numbers["mean_more"], numbers["mean_less"]) == pytest.approx((9 / 12, 1 / 12))
    outcome = show("fig4", row_of(THETA, MIDDLE, categories=seldom_fooled), standard)
    assert verdicts(outcome) == {"PGD": "does not hold", "worst case": "does not hold"}
    # Where all of category 3 is wrong without an attack, nothing was fooled.
    outcome = show("fig4", row_of(THETA, MIDDLE, categories=often_fooled, right=[False] * 9 + [True] * 3), standard)
    (numbers, _, _) = outcome.claims[0]["verdicts"][0]["numbers"].values()
    assert (numbers["mean_more"], numbers["mean_less"]) == pytest.approx((0, 1 / 3))


def test_a_dissection_as_a_table_and_bars(row_of):
    outcome = show("fig4", row_of(THETA, MIDDLE, categories=[1, 1, 1, 1, 2, 2, 3, 4, 4, 4]), row_of(M1, LOW))
    lines = outcome.tables[0]["rows"]
    assert [(line["method"], line["attack"], line["n"]) for line in lines] == [
        (THETA, "pgd-10", 6), (THETA, "pgd-10-soft", 6),
    ]  # fmt: skip
    percents = {part: pytest.approx(share) for part, share in zip(PARTS, (40, 20, 10, 30), strict=True)}
    assert {part: lines[0][part] for part in PARTS} == percents
    assert (lines[0]["model"], lines[0]["routers"]) == (pytest.approx(60), pytest.approx(50))  # 1 + 2, 1 + 3
    assert outcome.figures[0].data[f"{THETA}: pgd-10"] == {
        "1 both survive": pytest.approx(0.4), "2 only routing fails": pytest.approx(0.2),
        "3 only prediction fails": pytest.approx(0.1), "4 both fail": pytest.approx(0.3),
    }  # fmt: skip
    assert "category 1 31.74, 1 + 3 76.27" in outcome.figures[0].caption


def test_insight_3_wants_a_more_robust_model_of_less_robust_routers(row_of):
    survived, lost = [1] * 6 + [3] * 6, [2] * 6 + [4] * 6
    assert verdicts(show("fig5", row_of(THETA, LOW, categories=survived), row_of(THETA2, HIGH, categories=lost))) == {
        "PGD": "holds", "worst case": "holds",
    }  # fmt: skip
    assert verdicts(show("fig5", row_of(THETA, LOW, categories=lost), row_of(THETA2, HIGH, categories=survived))) == {
        "PGD": "does not hold", "worst case": "does not hold",
    }  # fmt: skip
    assert verdicts(show("fig5", row_of(THETA, HIGH, categories=survived), row_of(THETA2, LOW, categories=lost))) == {
        "PGD": "does not hold", "worst case": "does not hold",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["fig3", "fig4", "fig5"])
def test_what_stays_fixed_is_run_under_both_conventions(name):
    rows = STUDIES[name].stages[0](scale_named("cpu"), Results())
    fixed = [row.run for row in rows if "statistics" in row.run.labels]
    assert {run.labels["statistics"] for run in fixed} == {"refresh", "keep"}
    for run in fixed:
        assert run.labels["method"] not in (M1, M2)
        chosen = run.labels["statistics"]
        while run is not None:
            config = Config.from_dict(merged(run.settings, {"training": {"init_from": "start"}}))
            # A start that leaves no part fixed is the same run under both.
            assert config.training.fixed_norms in (chosen, None)
            assert (config.training.frozen_norms is None) == (config.training.fixed_norms is None)
            assert ("statistics" in run.labels) == (config.training.fixed_norms is not None)
            run = run.start
    assert all("frozen_norms" not in row.run.settings["training"] for row in rows if row.run not in fixed)
    assert "training.frozen_norms" in STUDIES[name].varies


def test_each_convention_is_judged_by_itself(row_of):
    survived, lost = [1] * 6 + [3] * 6, [2] * 6 + [4] * 6
    kept = [row_of(THETA, LOW, categories=survived, statistics="keep")]
    kept += [row_of(THETA2, HIGH, categories=lost, statistics="keep")]
    fresh = [row_of(THETA, LOW, categories=lost, statistics="refresh")]
    fresh += [row_of(THETA2, HIGH, categories=survived, statistics="refresh")]
    outcome = show("fig5", *fresh, *kept)
    judged = {each["name"]: [verdict["verdict"] for verdict in each["verdicts"]] for each in outcome.claims}
    assert judged == {"insight-3": ["does not hold"] * 2, "insight-3-keep": ["holds"] * 2}
    assert outcome.claims[1]["statement"].endswith("each other. Here statistics are kept as they came.")
    names = [f"{method} ({statistics})" for statistics in ("refresh", "keep") for method in (THETA, THETA2)]
    assert [line["method"] for line in outcome.tables[1]["rows"]] == names
    assert [line["method"] for line in outcome.tables[0]["rows"]] == [name for name in names for _ in range(2)]


def test_a_standard_model_stands_beside_both_conventions(row_of):
    at = {"scale": 0.5}
    robustified = [row_of(THETA, MIDDLE, statistics="refresh", **at), row_of(THETA, LOW, statistics="keep", **at)]
    robustified += [row_of(M3, LOW, statistics=statistics, **at) for statistics in ("refresh", "keep")]
    outcome = show("fig3", *robustified, row_of(M1, LOW, **at), row_of(M2, HIGH, **at))
    judged = {each["name"]: each["verdicts"][0]["verdict"] for each in outcome.claims}
    assert judged == {
        "insight-1": "holds", "insight-1-keep": "undecided", "above-the-mask": "holds",
        "above-the-mask-keep": "undecided",
    }  # fmt: skip
    both = {f"{method} ({statistics})" for method in (THETA, M3) for statistics in ("refresh", "keep")}
    assert {*both, M1, M2} == set(outcome.figures[0].data)


def test_pathways_in_use_stand_beside_the_routers_robustness(row, evaluated):
    def dissected(pathways):
        shares = dict.fromkeys(PARTS, 0.25)
        found = {"categories": shares, "distinct_pathways": {"clean": pathways, "adversarial": 99}}
        return {"accuracy": evaluated("11", {"pgd-10": "10"}), "dissection": ("dissect", {"pgd-10": found}, {})}

    theta = row({"method": THETA}, {0: dissected(3), 1: dissected(4)})
    (line,) = show("fig5", theta).tables[0]["rows"]
    assert (line["routers"], line["pathways"]) == (pytest.approx(50), 3.5)


def test_a_standard_model_that_is_robust_by_itself_is_told(row_of):
    (note,) = show("fig4", row_of(THETA, MIDDLE, categories=[1] * 12), row_of(M1, MIDDLE)).notes
    assert note.startswith(f"{M1}: 50% robust under PGD by itself") and "under 3% it is trained long enough" in note
    assert not show("fig4", row_of(THETA, MIDDLE, categories=[1] * 12), row_of(M1, LOW)).notes
    # Nothing is decided beside such a one, whatever the numbers say.
    often_fooled = [3] * 9 + [1] * 1 + [2, 4]
    for standard, said in ((MIDDLE, "undecided"), (LOW, "holds")):
        outcome = show("fig4", row_of(THETA, HIGH, categories=often_fooled), row_of(M1, standard))
        assert verdicts(outcome) == {"PGD": said, "worst case": said}

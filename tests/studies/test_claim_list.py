"""The paper's claims beside stored studies: judged anew from stored numbers, and written down."""

import json
from pathlib import Path

import pytest

from advmoe.studies.claim_list import NOT_JUDGED, NOT_RUN, as_page, as_text, judge, judged_anew, stored
from advmoe.studies.claims import Comparison, claim, compare, verdict
from advmoe.studies.paper_claims import PAPER_CLAIMS
from advmoe.studies.section4 import BY_ITSELF

ROOT = Path(__file__).parents[2]
CHEAPEST = "The cheapest variant that loses nothing at this size: every-4, 1.23 of AT (MoE)."


@pytest.fixture
def study(tmp_path):
    """Writes a study's file into a folder of its own, below the test's."""

    def write(name, claims, folder=None, **content):
        home = tmp_path / (folder or f"{name}-cpu")
        home.mkdir(parents=True)
        command = f"advmoe study {name}"
        whole = {"study": name, "seeds": [0, 1, 2], "command": command, "tables": [], "claims": claims, **content}
        (home / "study.json").write_text(json.dumps(whole))

    return write


def side(seeds, marks):
    return {seed: {image: mark == "1" for image, mark in enumerate(marks)} for seed in range(seeds)}


def compared(less, more, seeds, right="111111", wrong="000000"):
    return Comparison(more, less, side(seeds, right), side(seeds, wrong))


def listed(folder):
    """By study, claim and comparisons: the judgements, whatever the setting."""
    return {
        (each.study, each.claim, each.comparisons): told for each, told in judge(stored(folder)) if not each.setting
    }


MOE, OURS = ("AT (MoE) < AT (S-Dense)",), ("AT (S-Dense) < AdvMoE",)


def test_a_conjunction_is_judged_part_by_part(study, tmp_path):
    """Both parts are stored in one claim; each has its row, its verdict over seeds and that of these models."""
    parts = [compared("AT (MoE)", "AT (S-Dense)", 5), compared("AdvMoE", "AT (S-Dense)", 5)]
    parts[1] = Comparison("AdvMoE", "AT (S-Dense)", parts[1].of_less, parts[1].of_more)
    study("table1", [claim("ordering, ResNet-18, CIFAR-10", "It is so.", [verdict("PGD", parts)])])
    found = listed(tmp_path)
    (below,) = found["table1", "ordering", MOE]
    assert (below.run, below.measure) == ("table1-cpu", "PGD")
    assert (below.models, below.these) == ("holds (5 seeds, p = 0.031)", "holds (6 images, p = 0.016)")
    assert below.found == "0.0 against 100.0 % (+100.0 to +100.0)"
    (above,) = found["table1", "ordering", OURS]
    assert (
        above.models == "does not hold (5 seeds, p = 0.031)" and above.found == "100.0 against 0.0 % (-100.0 to -100.0)"
    )
    (missing,) = found["table2", "ordering", MOE]
    assert missing.models == NOT_RUN and missing.these == missing.run == ""


def test_results_of_an_older_rule_are_judged_by_the_present_one(study, tmp_path):
    """Three seeds and clear images were said to hold."""
    numbers = compare(compared("AT (MoE)", "AT (S-Dense)", 3)) | {"test": "exact sign-flip test over 6 images"}
    old = {"measure": "PGD", "verdict": "holds", "p_value": 0.016, "numbers": {MOE[0]: numbers}, "note": ""}
    study("table1", [claim("ordering", "It is so.", [old])])
    (told,) = listed(tmp_path)["table1", "ordering", MOE]
    assert told.models == "undecided (3 seeds, p = 0.12)" and told.these == "holds (6 images, p = 0.016)"


def test_what_a_variant_lost_becomes_a_test_of_non_inferiority(study, tmp_path):
    """The first form compared the paper's with the variant, under all measures together."""
    seeds = {seed: 0.3 for seed in range(5)}
    lost = {
        name: compare(Comparison("both", "every-4", seeds, {seed: 0.3 - by for seed in seeds}))
        for name, by in (("PGD", -0.02), ("worst case", 0.05))
    }
    old = {"measure": "every-4", "verdict": "holds", "p_value": None, "numbers": {"price": 1.2, **lost}, "note": ""}
    dear = {**old, "measure": "both-ways", "numbers": {"price": 1.5, **lost}}
    study("efficiency", [claim("advmoe-at-the-price-of-at", "It is so.", [old, dear])])
    told = listed(tmp_path)["efficiency", "advmoe-at-the-price-of-at", ()]
    assert [(each.measure, each.models) for each in told] == [
        ("every-4, PGD", "undecided (5 seeds alone, p = 0.22)"),  # one of seven that would do: 7/32
        ("every-4, worst case", "does not hold (5 seeds alone, p = 0.031)"),
        *((f"both-ways, {name}", "does not hold (takes more than 1.3 of the time)") for name in ("PGD", "worst case")),
    ]  # fmt: skip
    assert told[0].found == "1.20 of AT (MoE)'s time; 30.0 against 32.0 % (+2.0 to +2.0)"


def test_a_whole_file_is_judged_anew(study, tmp_path):
    """Its verdicts by the present rule; what cannot be judged, and conclusions of no verdict, as they are."""
    numbers = compare(compared("a", "b", 3)) | {"test": "exact sign-flip test over 6 images"}
    verdicts = [
        {"measure": "PGD", "verdict": "holds", "numbers": {"a < b": numbers}},
        {"measure": "m", "numbers": {"x": 1}},
    ]
    content = {"study": "s", "claims": [{"name": "c", "verdicts": verdicts}, "odd"], "notes": ["Kept.", CHEAPEST]}
    told = judged_anew(content)
    first, second = told["claims"][0]["verdicts"]
    assert (first["verdict"], first["p_value"], first["these_models"]["verdict"]) == ("undecided", 1 / 8, "holds")
    assert second == verdicts[1] and told["claims"][1] == "odd" and told["notes"] == ["Kept."]
    assert content["notes"] == ["Kept.", CHEAPEST] and verdicts[0]["verdict"] == "holds"  # the file's stay
    assert judged_anew({"claims": "none"}) == {"claims": "none"}


def cell(mean, n=3):
    return {"mean": mean, "std": None, "n": n}


def test_means_that_were_stored_before_a_claim_was(study, tmp_path):
    """Of few seeds they leave it undecided; of enough it cannot be judged without pairs. Costs are counted."""
    rows = [
        {"method": name, "ra_pgd": cell(ra), "worst": cell(worst, 5), "gmacs": cell(gmacs)}
        for name, ra, worst, gmacs in (("AT (Dense)", 50.1, 40.0, 0.54), ("AdvMoE", 51.8, 41.0, 0.15))
    ]
    study("table1", [], tables=[{"title": "T", "columns": [], "rows": rows}])
    found = listed(tmp_path)
    pgd, worst = found["table1", "above-dense", ()]
    assert (pgd.found, pgd.models) == ("50.1 against 51.8 %", "undecided (3 seeds)")
    assert (worst.found, worst.models) == ("40.0 against 41.0 %", NOT_JUDGED)
    (saved,) = found["table1", "half-the-cost", ()]
    assert saved.models == "holds" and "share saved 0.7222" in saved.found
    (none,) = found["table1", "ordering", MOE]
    assert (none.run, none.models) == ("table1-cpu", NOT_JUDGED)


def test_the_time_of_both_levels_is_read_off_the_table(study, tmp_path):
    rows = [
        {"method": "AdvMoE", "variant": name, "ratio": cell(ratio, 1)}
        for name, ratio in (("both", 1.84), ("every-4", 1.2))
    ]
    study("efficiency", [], tables=[{"title": "T", "columns": [], "rows": rows}])
    (told,) = listed(tmp_path)["efficiency", "twice-the-time", ()]
    assert (told.models, told.found) == ("holds", "1.84 of AT (MoE)'s time")


def test_settings_stand_apart_and_a_claim_may_name_one(study, tmp_path):
    verdicts = [verdict("PGD", [compared("AT (Dense)", "AdvMoE", 5)])]
    study(
        "table1", [claim(f"above-dense, {net}, CIFAR-10", "It is so.", verdicts) for net in ("ResNet-18", "WRN-28-10")]
    )
    runs = {
        each.setting: [one.run for one in told] for each, told in judge(stored(tmp_path)) if each.claim == "above-dense"
        and each.study == "table1"
    }  # fmt: skip
    assert runs == {
        "": ["table1-cpu, ResNet-18, CIFAR-10", "table1-cpu, WRN-28-10, CIFAR-10"], "WRN-28-10": ["table1-cpu"],
    }  # fmt: skip


def test_the_list_in_words(study, tmp_path):
    study("fig1b", [claim("above-dense", "It is so.", [verdict("PGD", [compared("AT (Dense)", "AdvMoE", 5)])])])
    text = as_text(judge(stored(tmp_path)))
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "AdvMoE is more robust than AT (Dense) sec. 1, fig. 1b; study fig1b fig1b-cpu PGD: holds (5 seeds" in words
    assert words.count(NOT_RUN) == len([each for each in PAPER_CLAIMS if each.study != "fig1b"])
    assert "Fewer than 5 seeds decide nothing" in words and "margin of 1 point" in words


def test_the_page_is_a_table_and_names_its_studies(study, tmp_path):
    study("fig1b", [claim("above-dense", "It is so.", [verdict("PGD", [compared("AT (Dense)", "AdvMoE", 5)])])])
    studies = stored(tmp_path)
    page = as_page(judge(studies), studies)
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert (
        "| AdvMoE is more robust than AT (Dense) | sec. 1, fig. 1b | fig1b-cpu | PGD | "
        "0.0 against 100.0 % (+100.0 to +100.0) | holds (5 seeds, p = 0.031) | holds (6 images, p = 0.016) |"
    ) in table
    assert "- `fig1b-cpu`: 3 seeds; `advmoe study fig1b`" in page


def test_docs_hold_what_the_stored_results_say():
    studies = stored(ROOT / "docs/results")
    written = (ROOT / "docs/results/claims.md").read_text(encoding="utf-8")
    assert written == as_page(judge(studies), studies), "advmoe study claims --page docs/results/claims.md"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"claims": "none"}, "must hold a list of objects under claims, got str"),
        ({"claims": [{"name": "ordering", "verdicts": [{"numbers": 3}]}]}, "each with verdicts and their numbers"),
        ({"tables": [3]}, "must hold a list of objects under tables, got list"),
    ],
)
def test_a_file_that_is_no_study_s_is_named(tmp_path, content, said):
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as raised:
        stored(tmp_path)
    assert str(tmp_path / "study.json") in str(raised.value)


def test_numbers_of_another_s_making_are_one_line_that_names_the_study(study, tmp_path):
    numbers = {MOE[0]: {"test": "t", "p_seeds": "none", "seeds": 3}}
    study("table1", [{"name": "ordering", "verdicts": [{"measure": "PGD", "numbers": numbers}]}])
    with pytest.raises(ValueError, match=r"^table1-cpu/study.json must hold a study's numbers"):
        judge(stored(tmp_path))
    odd = {"claims": [{"name": "ordering", "verdicts": [{"measure": "PGD", "numbers": numbers}]}], "notes": []}
    assert judged_anew(odd) == odd  # a page shows it as it is


def test_a_folder_without_studies_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^--out must be a folder of studies \(a study.json in each\), got "):
        stored(tmp_path)


@pytest.mark.parametrize(
    ("by_itself", "models"),
    [
        ({BY_ITSELF: 0.091}, "undecided (5 seeds)"), ({BY_ITSELF: 0.02}, "holds (5 seeds, p = 0.031)"),
        ({}, "holds (5 seeds, p = 0.031)"),  # of fig1b: that one is robust by itself changes nothing
    ],
)  # fmt: skip
def test_nothing_is_decided_beside_a_standard_model_that_is_robust_by_itself(study, tmp_path, by_itself, models):
    """Both conventions have a row."""
    standard, robust = "standard MoE", "router-robustified MoE"
    judged = verdict("PGD", [compared(standard, robust, 5)])
    judged["numbers"] |= by_itself
    study("fig4", [claim(f"insight-2{end}", "It is so.", [judged]) for end in ("", "-keep")])
    told = listed(tmp_path)["fig4", "insight-2", (f"{standard} < {robust}",)]
    assert [(each.run, each.models) for each in told] == [
        ("fig4-cpu", models), ("fig4-cpu, statistics kept", models),
    ]  # fmt: skip

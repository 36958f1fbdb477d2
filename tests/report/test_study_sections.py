from pathlib import Path

import pytest

from advmoe.report.results import load_results
from advmoe.report.study_sections import beside_paper, claims, study_section
from advmoe.report.tables import DASH, table

PM, H, S = "\N{PLUS-MINUS SIGN}", "\N{NON-BREAKING HYPHEN}", "\N{NO-BREAK SPACE}"


@pytest.fixture
def shown(make_study, album, parsed):
    """The section of the made-up study, taken apart."""

    def get(**changed):
        (study,) = load_results([make_study(**changed)])
        return parsed(study_section(study, album, 1).html)

    return get


def test_a_whole_section(shown):
    page = shown()
    assert page.texts("h2") == ["The paper's table1 (smoke)"]
    assert page.texts("h3") == ["Claims", "Tables", "Figures", "Notes", "Commands and settings"]
    assert page.texts("p")[:2] == [
        "AdvMoE against AT.",
        "Scale smoke; seeds 0, 1; a processor; cpu; 2 threads a process; 1 h 30 min in all.",
    ]
    assert page.texts("code") == ["advmoe study table1"]
    assert page.texts("li")[-1] == "Seed 1 is short."


def test_a_study_that_holds_nothing_yet(shown):
    page = shown(tables=[], figures=[], claims=[], notes=[], runs=[], command=None, shows=None, settings={})
    assert page.texts("h3") == ["Commands and settings"]
    page = shown(name="empty", **dict.fromkeys(("seeds", "made_on", "shown_by", "seconds", "created")))
    assert "Scale smoke; seeds unknown." in page.texts("p")


def test_the_size_of_a_study_is_told_where_it_is_known(shown):
    page = shown(size="2 epochs, 30 test images")
    assert page.texts("p")[1].startswith("Scale smoke; seeds 0, 1; 2 epochs, 30 test images; a processor; ")


def test_claims_with_verdicts_tests_and_numbers(shown):
    page = shown()
    assert page.texts("h4")[0] == "AT < AdvMoE."
    sides = f"AT < AdvMoE: 40.0{S}% against 50.0{S}%, by seed +8.8, +11.2 points"
    assert page.texts("div", "judged") == [
        f"PGD \N{CHECK MARK} holds p{H}value 0.031{sides}over 5 seeds",
        "worst case ? undecidednone: 1 seedToo little data.",
    ]
    assert page.texts("p", "quiet")[0] == "ordering (sec. 4)"


def test_what_these_models_say_stands_beside_what_training_again_would(parsed):
    these = {"verdict": "holds", "p_value": 0.016, "test": "exact sign-flip test over 6 images of these models"}
    verdict = {"measure": "PGD", "verdict": "undecided", "p_value": 0.125, "these_models": these}
    page = parsed(*claims([{"name": "c", "verdicts": [verdict]}]))
    assert (
        page.texts("p", "quiet")[1]
        == "these models: holds (p = 0.016), exact sign-flip test over 6 images of these models"
    )
    verdict["these_models"] = None
    assert len(parsed(*claims([{"name": "c", "verdicts": [verdict]}])).texts("p", "quiet")) == 1


@pytest.mark.parametrize(
    ("numbers", "text"),
    [({"points": 3.0}, "gap: points 3"), (0.25, "gap: 0.25"),
     ({"test": "none: no seed has both", "p": 1.0}, "gap: not compared, no seed has both"),
     ({"test": "over 5 seeds", "unit": "bits", "mean_less": 1.5, "mean_more": 2.0,
       "differences": {"0": 0.25, "1": 0.75}},
      "gap: 1.5 against 2 bits, by seed +0.25, +0.75")],
)  # fmt: skip
def test_numbers_of_another_kind(parsed, numbers, text):
    verdict = {"measure": "PGD", "verdict": "does not hold", "p_value": 0.0001, "numbers": {"gap": numbers}}
    page = parsed(*claims([{"name": "c", "statement": None, "verdicts": [verdict]}]))
    assert page.texts("h4") == ["c"] and page.texts("li") == [text]
    assert page.texts("p")[1] == f"PGD \N{MULTIPLICATION X} does not hold p{H}value < 0.001"


def test_ours_beside_the_papers(parsed):
    columns = [{"key": "m", "title": "Method"}, {"key": "ra", "title": "RA %", "better": "higher"}, {"key": "ms"}]
    rows = [
        {"m": "AT", "ra": {"mean": 40.25, "std": 1.26, "n": 3, "paper": 48.5, "paper_std": 0.2}, "ms": 9.5},
        {"m": "AdvMoE", "ra": {"mean": None, "std": None, "n": 0, "paper": 51.83}, "ms": {"mean": 4.0, "n": 1}},
        {"m": "other", "ra": None},
    ]
    page = parsed(table("T.", *beside_paper(columns, rows)))
    assert page.texts("button") == ["Method", "RA %, ours (higher is better)", "RA %, paper", "ms"]
    cells = page.texts("td")
    assert cells[:3] == [f"40.2 {PM} 1.3 n = 3", f"48.5 {PM} 0.2", "9.5"]
    assert cells[3:6] == [DASH, "51.8", "4"]  # one run alone needs no count
    assert cells[6:] == [DASH, DASH, DASH]
    assert page.texts("td", "shade") == [f"48.5 {PM} 0.2", "51.8", DASH]


@pytest.mark.parametrize(
    ("std", "text"), [(0.0, f"0.139 {PM} 0"), (1e-5, f"0.139 {PM} 0"), (0.02, f"0.139 {PM} 0.020"), (None, "0.139")]
)
def test_a_spread_has_the_decimals_of_its_mean(parsed, std, text):
    html = table("T.", *beside_paper([{"key": "m"}, {"key": "g"}], [{"m": "AT", "g": {"mean": 0.139, "std": std}}]))
    assert parsed(html).texts("td") == [text]


def test_tables_sort_by_the_mean(shown):
    page = shown()
    assert page.attributes("td", "data-order")[:6] == ["40.0", "48.5", "9.5", "50.0", "51.8", ""]
    assert page.texts("strong") == [f"50.0 {PM} 2.5 n = 2"]


def test_figures_of_the_study(shown, album):
    page = shown()
    assert page.texts("title") == ["By epoch"] and page.texts("desc") == [
        "Lines of % against epoch. AdvMoE: from 20.0 at 1 to 30.0 at 2."
    ]
    assert page.texts("figcaption") == ["By epoch Rising."]
    assert sorted(each.name for each in album.folder.iterdir()) == ["table1-epochs.png", "table1-epochs.svg"]


@pytest.mark.parametrize("stored", [{}, {"kind": "lines"}, {"kind": "pie", "data": {"a": 1}}, {"svg": "figures/a.svg"}])
def test_a_figure_without_data_is_one_line(shown, stored):
    page = shown(figures=[{"id": "epochs", "title": "By <epoch>", **stored}])
    assert page.texts("svg") == []
    assert "The figure 'By <epoch>' is not shown: the study holds no data of it." in page.texts("p")


STORED = sorted((Path(__file__).parents[2] / "docs" / "results" / "studies").glob("*/study.json"))


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.parent.name)
def test_stored_studies_are_drawn_again(album, parsed, file):
    """From their data alone: the pictures, and what these show in words."""
    (study,) = load_results([file.parent])
    page = parsed(study_section(study, album, 1).html)
    assert page.texts("title") == [each["title"] for each in study.content["figures"]]
    assert all(text.endswith(".") for text in page.texts("desc")) and len(album.names) == len(page.texts("desc")) > 0


def test_runs_that_did_not_finish_are_named(shown):
    page = shown()
    said = "2 runs, 1 of them finished. The numbers above are without the others: AdvMoE, seed 1 (failed)."
    assert said in page.texts("p")
    assert page.texts("td")[-12:-7] == ["1", "failed", DASH, "runs/bb", "loss is NaN"]
    many = [{"key": f"k{at}", "seed": at, "status": "missing"} for at in range(10)]
    (said,) = [text for text in shown(name="many", runs=many).texts("p") if text.startswith("10 runs")]
    assert said.endswith("k7, seed 7 (missing) and 2 more.")


def test_settings_and_versions(shown):
    page = shown()
    assert page.texts("td")[-7:] == [
        "epochs 2", "a processor", "cpu", "2", "2.13.0", "torch 2.13.0", "2026-01-01T00:00:00",
    ]  # fmt: skip


def test_strings_of_a_study_are_escaped(make_study, album, parsed):
    hostile = "<img src=x onerror=alert(1)>"
    columns = [{"key": "a", "title": hostile}]
    judged = {name: hostile for name in ("measure", "verdict", "test", "note")} | {"numbers": {hostile: hostile}}
    path = make_study(
        title=hostile, shows=hostile, notes=[hostile], command=hostile, settings={hostile: hostile},
        made_on={"cpu": [hostile], hostile: [hostile]}, shown_by={hostile: hostile},
        tables=[{"title": hostile, "caption": hostile, "columns": columns, "rows": [{"a": hostile}]}],
        claims=[{"name": hostile, "statement": hostile, "verdicts": [judged]}],
        runs=[{"name": hostile, "status": hostile, "error": hostile, "path": hostile}],
        figures=[{"id": hostile, "title": hostile, "caption": hostile, "kind": "lines",
                  "data": {hostile: [{"x": 1, "y": 2}]}, "options": {"xlabel": hostile, "ylabel": hostile}}],
    )  # fmt: skip
    (study,) = load_results([path])
    html = study_section(study, album, 1).html
    assert "<img" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;") >= 17
    assert parsed(html).texts("h2") == [f"{hostile} (smoke)"]

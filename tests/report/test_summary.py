import pytest

from advmoe.report.results import load_results
from advmoe.report.summary import summary
from advmoe.report.tables import DASH


@pytest.fixture
def shown(album, parsed):
    """The summary of results, taken apart."""
    return lambda *paths: parsed(summary(load_results(paths), album).html)


def test_one_run_is_introduced(make_run, shown):
    page = shown(make_run("advmoe", only={"evaluation"}))
    assert page.texts("table") == [] and page.texts("dd")[0] == "87.5 %"
    assert page.attributes("a", "href") == ["#run-1-made"]


def test_runs_side_by_side(make_run, shown):
    plain = {"clean_accuracy": 0.9, "robust_accuracy": {"pgd-10": 0.625}, "worst_case": 0.625, "num_examples": 100,
             "threat": {"norm": "linf", "eps": 8 / 255}, "data": {"name": "digits"}}  # fmt: skip
    runs = [
        make_run("advmoe", only={"evaluation"}),
        make_run("at", routed=False, only={"evaluation"}, evaluation=plain),
        make_run("new", only=set()),
    ]
    page = shown(*runs)
    heads = [
        text.removesuffix(" (higher is better)").removesuffix(" (lower is better)") for text in page.texts("button")
    ]
    assert heads == [
        "Run", "Method", "Clean (SA)", "pgd-10", "routed", "Worst case", "GMACs", "ms/image", "Parameters", "Images",
    ]  # fmt: skip
    cells = page.texts("td")
    assert cells[1:9] == ["87.5", "50.0", "37.5", "35.0", "0.139", "4.25", "11,173,962", "40"]
    assert cells[10:18] == ["90.0", "62.5", DASH, "62.5", DASH, DASH, DASH, "100"]
    assert cells[19:] == [DASH] * 8
    assert page.texts("strong") == ["90.0", "62.5", "62.5"]
    assert [cells[at] for at in (0, 9)] == ["AdvMoEresnet18, r = 0.5, N = 2", "AT (Dense)resnet18"]
    notes = page.texts("p")
    assert "Not measured alike, so compare with care: these runs differ in attacks, number of images." in notes
    assert "Not evaluated yet: new. Each run's section has the command." in notes


def test_runs_measured_alike_are_drawn_without_a_warning(make_run, shown):
    page = shown(*(make_run(name, only={"evaluation", "sweep"}) for name in ("a", "b")))
    assert page.texts("div", "note") == []
    assert page.texts("title") == ["Accuracy side by side", "Worst case against eps"]
    compared, swept = page.texts("desc")
    assert compared == (
        "Bars of accuracy (%). clean: a 87.5, b 87.5. pgd-10: a 50.0, b 50.0. routed: a 37.5, b 37.5. "
        "worst case: a 35.0, b 35.0."
    )
    assert "b: 87.5 % at 0, 60.0 % at 4/255, 35.0 % at 8/255." in swept


def test_sweeps_in_unlike_norms_are_not_drawn_together(make_run, shown):
    runs = [make_run(name, only={"sweep"}) for name in ("a", "b")]
    (runs[1] / "sweep.json").write_text((runs[1] / "sweep.json").read_text().replace("linf", "l2"))
    assert shown(*runs).texts("svg") == []


def test_verdicts_of_studies(make_study, make_run, shown):
    page = shown(make_study("table1"), make_study("fig2", title=None, shows=None, claims=[]), make_run("a", only=set()))
    assert page.texts("li") == ["The paper's table1 (smoke): AdvMoE against AT.", "fig2 (smoke)"]
    assert page.texts("caption")[0] == "Claims and their verdicts."
    assert page.texts("td")[:4] == ["The paper's table1 (smoke)", "PGD", "\N{CHECK MARK} holds", "0.031"]
    assert page.texts("caption")[1].startswith("Runs side by side")


def test_a_study_without_claims_has_no_table_of_them(make_study, shown):
    assert shown(make_study(claims=[])).texts("table") == []

import base64
import hashlib
import os
import re
import stat
import sys

import pytest

from advmoe.report.page import write_report
from advmoe.report.results import load_results


def test_a_page_with_its_figures(make_run, make_study, tmp_path, parsed):
    runs = [make_run("advmoe", only={"metrics", "evaluation"}), make_run("at", routed=False, only={"evaluation"})]
    out = tmp_path / "new" / "report.html"
    folder = write_report(load_results([*runs, make_study()]), out, made_by="advmoe report <x>")
    assert folder == tmp_path / "new" / "report-figures"
    assert sorted(os.listdir(out.parent)) == ["report-figures", "report.html"]
    names = ["advmoe-load-by-epoch", "advmoe-losses", "advmoe-validation", "compared", "table1-epochs"]
    assert sorted(os.listdir(folder)) == [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    page = parsed(out)
    assert page.texts("h1") == ["2 runs and 1 study"]
    assert page.texts("h2") == ["Contents", "Summary", "advmoe", "at", "The paper's table1 (smoke)"]
    assert page.attributes("html", "lang") == ["en"]
    assert page.texts("footer")[0].endswith(
        "Its figures lie as SVG and PNG in report-figures/ beside it.Made by advmoe report <x>"
    )
    assert len(page.texts("figure")) == len(names)


def test_links_lead_somewhere_and_identifiers_are_there_once(make_run, make_study, tmp_path, parsed):
    paths = [make_run("a", only={"metrics", "evaluation", "sweep"}), make_run("b", only={"gallery"}), make_study()]
    write_report(load_results(paths), tmp_path / "r.html")
    page = parsed(tmp_path / "r.html")
    identifiers = [at["id"] for _, at, _ in page.elements if "id" in at]
    assert len(identifiers) == len(set(identifiers))
    links = page.attributes("a", "href")
    assert len(links) > 12 and all(link[0] == "#" and link[1:] in identifiers for link in links)
    named = [word for _, at, _ in page.elements for word in (at.get("aria-labelledby") or "").split()]
    assert len(named) > 8 and set(named) <= set(identifiers)


def test_nothing_is_fetched_and_only_the_pages_own_script_runs(make_run, tmp_path, parsed):
    write_report(load_results([make_run("a", only={"evaluation", "gallery", "sweep"})]), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    page = parsed(tmp_path / "r.html")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert all(src.startswith("data:image/png;base64,") for src in page.attributes("img", "src"))
    assert page.attributes("link", "href") == page.attributes("script", "src") == []
    (script,) = page.texts("script")
    policy = page.attributes("meta", "content")[0]
    inner = re.search(r"<script>(.*)</script>", text, re.S)[1]
    assert script and base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_same_results_make_the_same_page(make_run, tmp_path):
    results = load_results([make_run("a", only={"metrics", "gallery"})])
    texts = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_report(results, tmp_path / name / "r.html")
        texts.append((tmp_path / name / "r.html").read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("make", "title"), [("run", "AT (Dense), at <i>"), ("study", "A <i> study (smoke)"), ("own", "Title <i>")]
)
def test_titles(make_run, make_study, tmp_path, parsed, make, title):
    path = (
        make_study(title="A <i> study", figures=[]) if make == "study" else make_run("at <i>", routed=False, only=set())
    )
    write_report(load_results([path]), tmp_path / "r.html", title="Title <i>" if make == "own" else None)
    text = (tmp_path / "r.html").read_text()
    page = parsed(tmp_path / "r.html")
    assert page.texts("h1") == [title] and page.texts("title")[0] == f"{title} \N{MIDDLE DOT} advmoe report"
    assert "<i>" not in text


def test_a_page_without_figures_has_no_folder_for_them(make_run, tmp_path, parsed):
    assert write_report(load_results([make_run("bare", only=set())]), tmp_path / "r.html") is None
    assert not (tmp_path / "r-figures").exists()
    assert "figures" not in parsed(tmp_path / "r.html").texts("footer")[0]


def test_figures_take_the_place_of_earlier_ones(make_run, tmp_path):
    results = load_results([make_run("a", only={"metrics"})])
    folder = tmp_path / "r-figures"
    folder.mkdir()
    (folder / "old.svg").write_text("old")
    assert write_report(results, tmp_path / "r.html") == folder
    assert "old.svg" not in os.listdir(folder) and "a-losses.svg" in os.listdir(folder)
    if hasattr(os, "getuid"):
        before = os.umask(0o022)
        write_report(results, tmp_path / "r.html")
        os.umask(before)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_folder_that_holds_something_else_is_left_alone(make_run, tmp_path):
    (tmp_path / "r-figures").mkdir()
    (tmp_path / "r-figures" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"r-figures must be a folder that holds nothing but figures .*'notes.txt'"):
        write_report(load_results([make_run("a", only={"metrics"})]), tmp_path / "r.html")
    assert os.listdir(tmp_path / "r-figures") == ["notes.txt"] and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation", {"clean_accuracy": 0.5, "attacks": ["pgd-10"]}),
        ("evaluation", {"robust_accuracy": {"pgd-10": 0.5}}),
        ("sweep", {"curves": {"pgd-10": {"points": 3}}}),
        ("dissection", {"pgd-10": {"num_examples": 3}}),
        ("metrics", [{"train": {"all": 3}}]),
    ],
)
def test_results_of_another_shape_are_an_error_and_nothing_is_written(make_run, tmp_path, name, content):
    path = make_run("odd", **{name: content})
    out = tmp_path / "out" / "r.html"
    with pytest.raises(
        ValueError, match=r"runs/odd must hold results as this version of advmoe writes them, got|result must"
    ):
        write_report(load_results([path]), out)
    assert not out.parent.exists()


def test_an_earlier_page_outlives_an_error(make_study, tmp_path):
    path = make_study()
    out = tmp_path / "r.html"
    write_report(load_results([path]), out)
    before = out.read_bytes(), sorted(os.listdir(tmp_path / "r-figures"))
    file = path / "study.json"
    file.write_text(file.read_text().replace('"x": 1', '"z": 1'))
    with pytest.raises(ValueError, match="must hold results as this version of advmoe writes them, got KeyError: 'x'"):
        write_report(load_results([path]), out)
    assert (out.read_bytes(), sorted(os.listdir(tmp_path / "r-figures"))) == before
    assert sorted(os.listdir(tmp_path)) == ["r-figures", "r.html", "studies"]


@pytest.mark.parametrize(
    ("out", "message"),
    [("r.txt", "path must be a file ending in .html, got"), ("folder.html", "path must be a file ending in .html"),
     ("file/r.html", "path must be where files can be written")],
)  # fmt: skip
def test_places_where_no_page_can_be(make_run, tmp_path, out, message):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        write_report(load_results([make_run("a", only=set())]), tmp_path / out)


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="results must be at least one run or study, got none"):
        write_report([], tmp_path / "r.html")


def test_without_matplotlib_the_extra_is_named(make_run, tmp_path, monkeypatch):
    results = load_results([make_run("a", only=set())])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'advmoe\[figures\]'"):
        write_report(results, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()

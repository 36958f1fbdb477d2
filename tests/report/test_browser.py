"""The page in a real browser."""

import base64
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from browser import CONTRASTS, chromium, needs_browser

from advmoe.evaluation.dissection import Dissection
from advmoe.evaluation.pathways import statistics
from advmoe.report.page import write_report
from advmoe.report.results import load_results

pytestmark = needs_browser
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror='hacked = 1'>"
ENTER = "\ue007"  # as WebDriver writes the key
# Text that is read, in the page and in its figures; what stands on a coloured part keeps its own colours.
TEXT = "h1, h2, h3, p, li, td, th, dt, dd, figcaption, figcaption b, caption, summary, a, code, .verdict, .quiet"


def traced():
    """What `advmoe pathways` finds of four images, two of which an attack sends elsewhere."""
    clean, right = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]]), torch.ones(4).bool()
    halves = torch.tensor([[True, True, False, False], [False, False, True, True]])
    chosen = Dissection(clean, clean.roll(2, 0), right, right, 2, torch.tensor([0, 0, 1, 1]))
    result = statistics(chosen, [halves, halves], num_classes=2, other=None)
    result["attack"]["name"] = "pgd-10"
    return result


@pytest.fixture(scope="module")
def page(tmp_path_factory, write_run, write_study):
    """A page about a routed run, a plain one, and a study, full of names that would like to be more than names."""
    folder = tmp_path_factory.mktemp("report")
    full = write_run(folder, f"advmoe {HOSTILE.replace('/', '|')}")
    names = [HOSTILE, "dog"]
    np.savez(full / "gallery.npz", **dict(load_results([full])[0].gallery) | {"classes": names})
    (full / "pathways.json").write_text(json.dumps(traced() | {"classes": names}))
    plain = write_run(folder, "at", routed=False, only={"metrics", "evaluation", "sweep"})
    study = write_study(folder, title=f"Table 1 {HOSTILE}", notes=[HOSTILE])
    write_report(load_results([full, plain, study]), folder / "report.html", title=HOSTILE, made_by=HOSTILE)
    return folder / "report.html"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """One browser for all tests."""
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(started, page):
    """The page, opened anew on a desk."""
    started.size(1280, 900)
    started.media()
    started.open(page)
    yield started
    started.log()


def test_it_opens_fetches_nothing_and_the_console_stays_silent(browser):
    assert browser.js("return document.readyState") == "complete"
    assert browser.js("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.js("return performance.getEntriesByType('resource').map((e) => e.name)") == []
    assert browser.log() == []
    assert browser.js("return typeof hacked") == "undefined"


def test_the_console_is_read_and_a_foreign_script_does_not_run(browser):
    browser.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 1'}))")
    browser.js("console.error('a mistake')")
    said = browser.log()
    assert any("Content Security Policy" in text for text in said) and any("a mistake" in text for text in said)
    assert browser.js("return typeof hacked") == "undefined"


VISIBLE = """
return Array.from(document.querySelectorAll('figure, .strip, .pictures img'), (each) => {
  const drawn = each.querySelector('svg') ?? each, box = drawn.getBoundingClientRect();
  const parts = Array.from(drawn.querySelectorAll('path, rect, use, text, image'), (part) => part.getBBox());
  return {
    name: each.tagName, width: box.width, height: box.height, shown: drawn.checkVisibility(),
    parts: parts.filter((part) => part.width > 0 || part.height > 0).length,
    pixels: drawn.naturalWidth ?? 0, within: box.left >= 0 && each.getBoundingClientRect().right <= innerWidth,
  };
});
"""


@pytest.mark.parametrize("width", [1280, 360])
def test_every_figure_is_visible(browser, page, width):
    browser.size(width, 740, mobile=width < 500)
    images = browser.js(VISIBLE)
    figures = [each for each in images if each["name"] == "FIGURE"]
    assert len(figures) == len(list((page.parent / "report-figures").glob("*.svg"))) == 19
    assert [each["name"] for each in images if each["name"] != "FIGURE"] == [*["IMG"] * 3, "svg"] * 2
    for each in images:
        assert each["shown"] and each["within"] and each["width"] > 60 and each["height"] > 10, each
        assert each["pixels"] == 8 if each["name"] == "IMG" else each["parts"] >= 4, each


def test_tables_sort_by_a_click_and_by_the_keyboard(browser):
    table = "document.querySelector('#study-3-tables').nextElementSibling.nextElementSibling.querySelector('table')"
    rows = f"return [...{table}.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
    head = f"return [...{table}.tHead.rows[0].cells].map((cell) => cell.ariaSort)"
    at, advmoe = browser.js(rows)
    assert (at[0], advmoe[0], at[3], advmoe[3]) == ("AT", "AdvMoE", "9.5", "\N{EN DASH}")
    button = browser.js(f"return {table}.tHead.rows[0].cells[1].firstChild")
    path = f"/element/{next(iter(button.values()))}"
    browser.call("POST", f"{path}/click", {})
    assert browser.js(rows) == [at, advmoe] and browser.js(head) == ["none", "ascending", "none", "none"]
    browser.call("POST", f"{path}/click", {})
    assert browser.js(rows) == [advmoe, at] and browser.js(head)[1] == "descending"
    # By the keyboard, by name, and what is missing stays below either way.
    for cell, key, expected in ((0, ENTER, [advmoe, at]), (3, " ", [at, advmoe]), (3, ENTER, [at, advmoe])):
        button = browser.js(f"return {table}.tHead.rows[0].cells[{cell}].firstChild")
        browser.call("POST", f"/element/{next(iter(button.values()))}/value", {"text": key})
        assert browser.js(rows) == expected
    assert browser.js(head) == ["none", "none", "none", "descending"]


def test_numbers_sort_as_numbers(browser):
    script = """
      const table = document.querySelector('table.data'), body = table.tBodies[0], row = body.rows[0];
      const orders = ['10.0', '9.5', '', '-1.0', '1e-05'];
      body.replaceChildren(...orders.map((order) => { const copy = row.cloneNode(true);
        copy.cells[1].dataset.order = order; return copy; }));
      table.tHead.rows[0].cells[1].firstChild.click();
      const up = [...body.rows].map((each) => each.cells[1].dataset.order);
      table.tHead.rows[0].cells[1].firstChild.click();
      return [up, [...body.rows].map((each) => each.cells[1].dataset.order)];
    """
    assert browser.js(script) == [["-1.0", "1e-05", "9.5", "10.0", ""], ["10.0", "9.5", "1e-05", "-1.0", ""]]


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_text_stands_out_in_either_scheme(browser, scheme, dark):
    browser.media(scheme=scheme)
    page = f"{CONTRASTS} return light(behind(document.querySelector('main > section')))"
    assert (browser.js(page) < 0.05) if dark else (browser.js(page) > 0.9)
    words = f"""return [...document.querySelectorAll('{TEXT}')].filter(shown)
      .map((n) => contrast(n, getComputedStyle(n).color));"""
    contrasts = browser.js(CONTRASTS + words)
    assert len(contrasts) > 200 and min(contrasts)[0] >= 4.5, min(contrasts)
    drawn = """return [...document.querySelectorAll('.drawing text')].filter((n) => !/^[0-9.]+$/.test(n.textContent))
      .map((n) => contrast(n.closest('figure'), getComputedStyle(n).fill));"""
    contrasts = browser.js(CONTRASTS + drawn)
    assert len(contrasts) > 40 and min(contrasts)[0] >= 4.5, min(contrasts)


def test_on_a_phone_only_boxes_scroll_and_text_is_large_enough(browser):
    browser.size(360, 740, mobile=True)
    assert browser.js("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    wide = """return [...document.body.querySelectorAll('*')].filter((node) => node.checkVisibility()
      && node.getBoundingClientRect().right > 361 && !node.closest('.scroll')).map((n) => n.outerHTML.slice(0, 80))"""
    assert browser.js(wide) == []
    boxes = "return [...document.querySelectorAll('.scroll')].map((b) => [b.scrollWidth > b.clientWidth, b.tabIndex])"
    states = browser.js(boxes)
    assert {tuple(each) for each in states} == {(True, 0), (False, -1)}  # the keyboard stops where there is a way to go
    sizes = """return [...document.querySelectorAll('.drawing text, .strip text')].map((node) =>
      parseFloat(getComputedStyle(node).fontSize) * Math.hypot(node.getScreenCTM().a, node.getScreenCTM().b))"""
    assert min(browser.js(sizes)) >= 6.5
    sizes = "return [...document.querySelectorAll('p, td, li')].map((node) => getComputedStyle(node).fontSize)"
    assert min(float(size.removesuffix("px")) for size in browser.js(sizes)) >= 13


def test_printed_everything_is_open_on_white(browser):
    browser.js("""
      window.seen = [];
      addEventListener('beforeprint', () => seen.push(document.querySelectorAll('details:not([open])').length));
    """)
    assert browser.js("return document.querySelectorAll('details:not([open])').length") == 7
    document = base64.b64decode(browser.cdp("Page.printToPDF", printBackground=True)["data"])
    assert document.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", document)) >= 4
    assert browser.js("return seen") == [0]
    assert browser.js("return document.querySelectorAll('details:not([open])').length") == 7
    browser.size(700, 1000)  # about a sheet between its margins
    browser.media("print", "dark")
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.js("return document.querySelector('nav').checkVisibility()") is False
    cut = """return [...document.querySelectorAll('figure .drawing, table')].filter((node) => node.checkVisibility()
      && node.getBoundingClientRect().right > 701).map((node) => node.textContent.slice(0, 60))"""
    assert browser.js(cut) == []


def test_a_screen_reader_finds_names_and_descriptions(browser, page):
    nodes = browser.cdp("Accessibility.getFullAXTree")["nodes"]
    known = [node for node in nodes if not node["ignored"]]

    def having(*roles):
        return [node for node in known if node["role"]["value"] in roles]

    def text(node):
        return node.get("name", {}).get("value", "").strip()

    assert [text(node) for node in having("RootWebArea")] == [f"{HOSTILE} \N{MIDDLE DOT} advmoe report"]
    assert len(having("main")) == len(having("navigation")) == 1
    images = having("image", "img", "graphics-document")
    inside = "['title', 'desc'].map((name) => drawing.querySelector(name).textContent)"
    drawings = browser.js(f"return [...document.querySelectorAll('.drawing')].map((drawing) => {inside})")
    assert len(drawings) == len(list((page.parent / "report-figures").glob("*.svg")))
    assert len(images) == len(drawings) + 8  # the gallery's: two images in three pictures and a strip each
    assert all(text(node) for node in images)
    names = [text(node) for node in images]
    assert all(len(said) > 20 and f"{title} {said}" in names for title, said in drawings)
    tables = having("table")
    assert len(tables) >= 5 and all(text(node) for node in tables)
    assert [node for node in having("button", "link", "columnheader", "rowheader") if not text(node)] == []
    assert browser.js("return [...document.querySelectorAll('.scroll')].filter((box) => !box.ariaLabel).length") == 0
    levels = browser.js("return [...document.querySelectorAll('main h2, main h3, main h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 2 and all(after - before <= 1 for before, after in pairwise(levels))


def test_the_contents_lead_to_the_parts(browser):
    link = browser.element("nav a[href='#run-1-gallery']")
    browser.call("POST", f"{link}/click", {})
    assert 0 <= browser.js("return document.querySelector('#run-1-gallery').getBoundingClientRect().top") < 850

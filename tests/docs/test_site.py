"""The site that `make docs` built, in a real browser."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CONTRASTS, chromium, needs_browser
from waiting import until

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = [str(page.parent.relative_to(SITE)) for page in sorted(SITE.rglob("index.html"))]
MAIN = [
    ".",
    "tutorials/own-pictures",
    "how-to",
    "reference/commands",
    "reference/api",
    "results/methods",
    "performance",
]
MAIN += [page for page in PAGES if "leaderboard" in page or page.endswith("zoo")]


def outdated() -> bool:
    """Whether the site was built before its sources were written, or not at all."""
    sources = [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*.*")]
    built = SITE / "index.html"
    written = [file.stat().st_mtime for file in sources if "__pycache__" not in file.parts]
    return not built.is_file() or built.stat().st_mtime < max(written)


pytestmark = [needs_browser, pytest.mark.skipif(outdated(), reason="needs the site as docs/ has it: make docs")]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


WIDE = """return [...document.querySelectorAll('.md-header, .md-content *, .md-footer')].filter((node) =>
  node.checkVisibility() && node.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !node.closest('pre, .md-typeset__scrollwrap')).map((node) => node.outerHTML.slice(0, 100));"""
FAINT = """return [...document.querySelectorAll('.md-content *, .md-nav__link')].filter((node) =>
  node.checkVisibility({opacityProperty: true, visibilityProperty: true})
  && [...node.childNodes].some((each) => each.nodeType === Node.TEXT_NODE && each.data.trim()))
  .map((node) => contrast(node, getComputedStyle(node).color)).filter(([value]) => value < 4.5);"""
BLANK = (
    "return [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src);"
)
FETCHED = "return performance.getEntriesByType('resource').map((each) => each.name);"


def visit(browser, address, page, width, scheme) -> None:
    """Open a page on a screen of a width, in a scheme of colours, as somebody who has not been there."""
    browser.size(width, 900, mobile=width < 500)
    browser.media(scheme=scheme)
    browser.open(f"{address}site.css")  # of the same origin, and without a script that writes down the last scheme
    browser.js("localStorage.clear()")
    browser.log()
    browser.open(f"{address}{page}/")
    wanted = {"light": "default", "dark": "slate"}[scheme]
    until(lambda: browser.js("return document.body.dataset.mdColorScheme") == wanted)


def defects(browser, address) -> dict[str, list]:
    """What is wrong with the page that is open."""
    found = {
        "console": browser.log(),
        "of other hosts": [name for name in browser.js(FETCHED) if not name.startswith(address)],
        "images": browser.js(BLANK),
        "too wide": browser.js(WIDE),
        "faint": browser.js(CONTRASTS + FAINT),
    }
    return {name: each for name, each in found.items() if each}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "light"), (1280, "dark")])
@pytest.mark.parametrize("page", MAIN)
def test_a_page_fits_is_readable_and_fetches_nothing_elsewhere(browser, address, page, width, scheme) -> None:
    visit(browser, address, page, width, scheme)
    assert browser.js("return document.querySelectorAll('.md-content h1').length") == 1
    assert defects(browser, address) == {}


@pytest.mark.slow
def test_so_does_every_page_on_a_phone_in_the_dark(browser, address) -> None:
    found = {}
    for page in PAGES:
        visit(browser, address, page, 360, "dark")
        found[page] = defects(browser, address)
    assert {page: each for page, each in found.items() if each} == {}


def test_what_is_wrong_is_found(browser, address) -> None:
    visit(browser, address, ".", 360, "light")
    browser.js("""
      document.querySelector('.md-content p').outerHTML = '<p style="width: 500px; color: #aaa">wide and faint</p>';
      document.querySelector('.md-content').append(Object.assign(new Image(), {src: 'missing.png'}));
      console.error('a mistake');
    """)
    found = defects(browser, address)
    assert any("a mistake" in line for line in found["console"])
    assert found["images"] == [f"{address}missing.png"]
    assert found["too wide"] == ['<p style="width: 500px; color: #aaa">wide and faint</p>']
    assert [text for _, text in found["faint"]] == ["wide and faint"]


def test_the_search_finds_a_page(browser, address) -> None:
    visit(browser, address, ".", 1280, "light")
    browser.open(f"{address}?q=masking")
    wanted = "[...document.querySelectorAll('.md-search-result__link')].map((link) => link.href)"
    found = browser.call("POST", "/execute/async", {"args": [], "script": f"""
      const done = arguments[0], ends = Date.now() + 20000;
      const look = () => {{ const links = {wanted};
        if (links.length || Date.now() > ends) done(links); else setTimeout(look, 50); }};
      look();
    """})  # fmt: skip
    assert any(link.startswith(f"{address}explanation/masking/") for link in found), found
    assert browser.log() == []

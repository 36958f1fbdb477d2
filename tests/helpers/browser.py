"""A real browser: Chromium without a window, driven through chromedriver's own protocol."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    DRIVER is None or shutil.which("chromium") is None,
    reason="needs chromium and chromedriver (Debian's packages chromium and chromium-driver)",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip
CONTRASTS = """
const seen = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92
  : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const over = (under, [r, g, b, alpha = 1]) => [r, g, b].map((v, at) => v * alpha + under[at] * (1 - alpha));
const behind = (node) => { const layers = []; for (; node; node = node.parentElement)
  layers.unshift(seen(getComputedStyle(node).backgroundColor)); return layers.reduce(over, [255, 255, 255]); };
const contrast = (node, colour) => { const under = behind(node);
  const [a, b] = [light(over(under, seen(colour))), light(under)].sort((a, b) => b - a);
  return [(a + 0.05) / (b + 0.05), node.textContent.slice(0, 40)]; };
const shown = (node) => node.checkVisibility() && node.textContent.trim();
"""
"""JavaScript: the contrast of the text of an element, in a colour, with what is behind it (WCAG 2)."""


class Browser:
    """A session of chromedriver (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, driver: subprocess.Popen[str], folder: Path) -> None:
        lines = iter(driver.stdout.readline, "")
        port = next(match[1] for line in lines if (match := re.search(r"successfully on port (\d+)", line)))
        self.root = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.root += f"/{self.call('POST', '', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def call(self, method, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path | str):
        """Open a file or an address."""
        self.call("POST", "/url", {"url": page if isinstance(page, str) else page.as_uri()})

    def js(self, script, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": args})

    def cdp(self, command, **params):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def log(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def element(self, selector):
        (identifier,) = self.call("POST", "/element", {"using": "css selector", "value": selector}).values()
        return f"/element/{identifier}"

    def size(self, width, height, *, mobile=False):
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, kind="", scheme="light"):
        wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # no waiting for what glides
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.cdp("Emulation.setEmulatedMedia", media=kind, features=features)


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`, until the end."""
    with subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            browser = Browser(driver, folder)
            yield browser
            browser.call("DELETE", "")
        finally:
            driver.terminate()

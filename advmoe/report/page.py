"""`advmoe report`: runs and studies on one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from advmoe.errors import InputError
from advmoe.files import require_writable
from advmoe.report.album import Album
from advmoe.report.drawing import require_matplotlib
from advmoe.report.html import Html, element
from advmoe.report.results import RunFolder, StudyFolder
from advmoe.report.run_sections import run_section
from advmoe.report.sections import Section, contents
from advmoe.report.study_sections import study_section
from advmoe.report.summary import summary


def write_report(
    results: Sequence[RunFolder | StudyFolder],
    path: str | Path,
    *,
    title: str | None = None,
    made_by: str = "advmoe report",
) -> Path | None:
    """Write the page about `results` to `path`, and its figures as SVG and PNG into `<name>-figures/` beside it.

    Args:
        results: what `results.load_results` read, in the order in which it is shown.
        path: of the page, ending in .html.
        title: of the page; by default made from the results' names.
        made_by: the command that makes the page again, shown at its end.

    Returns the folder of the figures, which takes the place of an earlier one; None where there are no figures. Raises
    `ValueError` without matplotlib, for another suffix, no results, results of another shape than this package writes,
    or a folder that holds anything but figures; nothing is written then.
    """
    path = Path(path)
    folder = figures_of(path)
    if not results:
        raise InputError("results must be at least one run or study, got none")
    with tempfile.TemporaryDirectory() as place:
        album = Album(Path(place))
        page = _page(results, album, title or _title(results), made_by, folder.name)
        _publish(page, path, Path(place), folder)
    return folder if album.names else None


def figures_of(path: Path) -> Path:
    """The folder of the figures of a page. Raises `ValueError` where page or figures cannot be written so."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise InputError(f"path must be a file ending in .html, got {str(path)!r}")
    require_writable("path", path.parent)
    require_matplotlib()
    folder = path.with_name(f"{path.stem}-figures")
    others = [each.name for each in folder.iterdir() if each.suffix not in (".svg", ".png")] if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        rule = "a folder that holds nothing but figures (the page's take their place)"
        raise InputError(f"{folder} must be {rule}, got {others[0] if others else 'a file'!r}")
    return folder


def _publish(page: str, path: Path, drawn: Path, folder: Path) -> None:
    """Move page and figures to their places by renames: both are prepared beside them, on the same file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as place:
        fresh, whole = Path(place) / "figures", Path(place) / "page"
        fresh.mkdir()
        for figure in drawn.iterdir():
            shutil.move(figure, fresh)
        whole.write_bytes(page.encode("utf-8", "backslashreplace"))  # names of files may be no text
        if folder.exists():
            folder.rename(Path(place) / "old")
        if any(fresh.iterdir()):
            fresh.rename(folder)
        os.replace(whole, path)


def _title(results: Sequence[RunFolder | StudyFolder]) -> str:
    if len(results) == 1:
        (only,) = results
        return only.title if isinstance(only, StudyFolder) else f"{only.method}, {only.label}"
    runs, studies = (sum(isinstance(each, kind) for each in results) for kind in (RunFolder, StudyFolder))
    counts = [
        f"{runs} run{'s' * (runs > 1)}" if runs else "",
        f"{studies} stud{'ies' if studies > 1 else 'y'}" if studies else "",
    ]
    return " and ".join(each for each in counts if each)


def _page(results: Sequence[RunFolder | StudyFolder], album: Album, title: str, made_by: str, folder: str) -> str:
    sections = [_section(", ".join(str(each.path) for each in results), summary, results, album)]
    for number, each in enumerate(results, start=1):
        if isinstance(each, StudyFolder):
            sections.append(_section(str(each.path), study_section, each, album, number))
        else:
            sections.append(_section(str(each.path), run_section, each, album, number, alone=len(results) == 1))
    beside = [" Its figures lie as SVG and PNG in ", element("code", f"{folder}/"), " beside it."]
    body = element(
        "body",
        element("a", "Skip to the content", class_="skip", href="#main"),
        element("header", element("p", "advmoe report", class_="eyebrow"), element("h1", title)),
        element("div",
            element("nav", element("h2", "Contents"), contents(sections), aria_label="Contents"),
            element("main", [each.html for each in sections], id="main"),
            class_="columns",
        ),
        element("footer",
            element("p", "This page needs no other file.", beside if album.names else None),
            element("p", "Made by ", element("code", made_by)),
        ),
        element("script", script := _packaged("page.js")),
    )  # fmt: skip
    return f"<!doctype html>\n{element('html', _head(title, script), body, lang='en')}\n"


def _section(path: str, make: Callable[..., Section], *args: Any, **options: Any) -> Section:
    """A section; results of an unknown shape are a `ValueError` that names where they lie."""
    try:
        return make(*args, **options)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        rule = "hold results as this version of advmoe writes them"
        raise InputError(f"{path} must {rule}, got {type(error).__name__}: {error}") from error


def _head(title: str, script: Html) -> Html:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's own script alone may run, and nothing may be fetched, whatever a name in the results holds.
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} \N{MIDDLE DOT} advmoe report"),
        element("style", _packaged("page.css")),
    )


def _packaged(name: str) -> Html:
    return Html(files("advmoe.report").joinpath(name).read_text("utf-8"))

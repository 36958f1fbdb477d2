"""The part of the page that is about one study, from its `study.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe.report.album import Album
from advmoe.report.html import Content, Html, element, joined
from advmoe.report.pictures import KINDS, Picture
from advmoe.report.results import StudyFolder
from advmoe.report.sections import Section, Subsection, section
from advmoe.report.tables import DASH, Cell, Column, decimals, number, pairs, percent, seconds, table
from advmoe.report.words import flat
from advmoe.text import macs_column

_VERDICTS = {
    "holds": ("holds", "\N{CHECK MARK}"),
    "does not hold": ("fails", "\N{MULTIPLICATION X}"),
    "undecided": ("neutral", "?"),
}
"""Verdict: its class in the style sheet, and a mark that goes with the word."""


def study_section(study: StudyFolder, album: Album, number_: int) -> Section:
    """A study's claims, tables and figures, and the runs behind them."""
    content = study.content
    commands = [
        element("pre", element("code", str(content["command"]))) if content.get("command") else None,
        _runs(study),
        _settings(content),
    ]
    return section(
        f"study-{number_}",
        study.title,
        element("p", content.get("shows"), class_="lead") if content.get("shows") else None,
        element("p", _about(content)),
        parts=[
            Subsection("claims", "Claims", claims(content.get("claims") or [])),
            Subsection("tables", "Tables", _tables(content.get("tables") or [])),
            Subsection("figures", "Figures", _figures(study, album)),
            Subsection("notes", "Notes", _notes(content.get("notes") or [])),
            Subsection("made", "Commands and settings", commands),
        ],
    )


def _about(content: Mapping[str, Any]) -> str:
    seeds = content.get("seeds") or []
    words = [f"Scale {content.get('scale', 'unknown')}", f"seeds {', '.join(map(str, seeds)) or 'unknown'}"]
    words += [str(content["size"])] if content.get("size") else []
    machine = content.get("made_on") or {}
    words += [flat(machine[name]) for name in ("cpu", "device") if machine.get(name)]
    if machine.get("threads"):
        words.append(f"{' or '.join(map(str, machine['threads']))} threads a process")
    if content.get("seconds") is not None:
        words.append(f"{seconds(content['seconds'])} in all")
    return f"{'; '.join(words)}."


def claims(entries: Sequence[Mapping[str, Any]]) -> Content:
    """Each claim with its verdict under every measure, in words, beside the test and its numbers."""
    return [_claim(each) for each in entries] or None


def _claim(claim: Mapping[str, Any]) -> Html:
    source = f" ({claim['source']})" if claim.get("source") else ""
    return element(
        "div",
        element("h4", claim.get("statement") or claim.get("name")),
        element("p", f"{claim.get('name')}{source}", class_="quiet"),
        [_judged(each) for each in claim.get("verdicts") or []],
        class_="claim",
    )


def _judged(entry: Mapping[str, Any]) -> Html:
    """A verdict under one measure: in words, what was compared, by which test."""
    p = entry.get("p_value")
    judged = [element("b", str(entry.get("measure"))), " ", verdict(entry.get("verdict")).content]
    these = entry.get("these_models")
    below = [str(entry[name]) for name in ("test", "note") if entry.get(name)]
    return element(
        "div",
        element("p", judged, None if p is None else [" p\N{NON-BREAKING HYPHEN}value ", p_value(p).content]),
        element("p", these_models(these), f", {these.get('test')}", class_="quiet") if these else None,
        element("ul", [element("li", _compared(name, each)) for name, each in (entry.get("numbers") or {}).items()]),
        [element("p", text, class_="quiet") for text in below],
        class_="judged",
    )


def _compared(name: str, numbers: Any) -> str:
    """The two means, and by how much they differ for each seed."""
    if not isinstance(numbers, Mapping) or "test" not in numbers:
        return f"{name}: {flat(numbers)}"
    if "mean_less" not in numbers:
        return f"{name}: not compared, {numbers['test'].removeprefix('none: ')}"
    if "unit" in numbers:
        apart = ", ".join(f"{each:+.3g}" for each in numbers["differences"].values())
        less, more = (f"{numbers[side]:.4g}" for side in ("mean_less", "mean_more"))
        return f"{name}: {less} against {more} {numbers['unit']}, by seed {apart}"
    points = ", ".join(f"{100 * each:+.1f}" for each in numbers["differences"].values())
    less, more = (f"{percent(numbers[name])}\N{NO-BREAK SPACE}%" for name in ("mean_less", "mean_more"))
    return f"{name}: {less} against {more}, by seed {points} points"


def verdict(word: Any) -> Cell:
    """A verdict in words, with a mark and a colour beside them."""
    kind, mark = _VERDICTS.get(str(word), ("neutral", "?"))
    shown = element("span", element("span", f"{mark} ", aria_hidden="true"), str(word), class_=f"verdict {kind}")
    return Cell(shown, str(word))


def these_models(judged: Mapping[str, Any] | None) -> str:
    """What the images of these very models say, in words; nothing of None."""
    if not judged:
        return ""
    p = judged.get("p_value")
    return f"these models: {judged.get('verdict')}" + ("" if p is None else f" (p = {p:.2g})")


def p_value(p: float | None) -> Cell:
    """A p-value with three decimals, or `< 0.001`."""
    return Cell(DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}", p)


def _tables(entries: Sequence[Mapping[str, Any]]) -> Content:
    parts: list[Content] = []
    for entry in entries:
        columns, rows = beside_paper(*macs_column(entry.get("columns") or [], entry.get("rows") or []))
        parts.append(element("h4", entry.get("title")) if entry.get("title") else None)
        parts.append(table(str(entry.get("caption") or entry.get("title") or "Results"), columns, rows))
    return parts or None


def beside_paper(
    columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Column], list[list[Cell | Content]]]:
    """A study's table, with a further column beside every one for which the paper reports something."""
    cells = {column["key"]: [row.get(column["key"]) for row in rows] for column in columns}
    reported = {
        key for key, values in cells.items() if any(isinstance(v, dict) and v.get("paper") is not None for v in values)
    }
    heads: list[Column] = []
    lines: list[list[Cell | Content]] = [[] for _ in rows]
    for column in columns:
        key, title = column["key"], str(column.get("title") or column["key"])
        heads.append(Column(f"{title}, ours" if key in reported else title, column.get("better")))
        heads += [Column(f"{title}, paper")] if key in reported else []
        for line, value in zip(lines, cells[key], strict=True):
            line.append(_measured(value))
            if key in reported:
                paper = value if isinstance(value, dict) else {}
                line.append(_spread(paper.get("paper"), paper.get("paper_std"), None, shade=True))
    return heads, lines


def _measured(value: Any) -> Cell:
    if isinstance(value, dict):
        return _spread(value.get("mean"), value.get("std"), value.get("n"), shade=False)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(number(value), value)
    return Cell(DASH if value is None else str(value), None if value is None else str(value))


def _spread(mean: float | None, std: float | None, n: int | None, *, shade: bool) -> Cell:
    if mean is None or math.isnan(mean):
        return Cell(DASH, None, shade)
    spread = "" if std is None else f"{std:.{decimals(mean)}f}"
    around = f" \N{PLUS-MINUS SIGN} {spread if float(spread) else 0}" if spread else ""
    count = element("small", f" n = {n}") if n is not None and n != 1 else None
    return Cell(joined(number(mean), around, count), mean, shade)


def _figures(study: StudyFolder, album: Album) -> Content:
    """The pictures, drawn from the data that the file holds of them."""
    entries = study.content.get("figures") or []
    shown: list[Content] = []
    for entry in entries:
        title, name = str(entry.get("title") or entry.get("id") or "Figure"), str(entry.get("id") or "figure")
        if entry.get("kind") not in KINDS or not entry.get("data"):
            shown.append(element("p", f"The figure {title!r} is not shown: the study holds no data of it."))
            continue
        options, caption = entry.get("options") or {}, str(entry.get("caption") or "")
        shown.append(album.draw(Picture(entry["kind"], name, title, entry["data"], options, caption), study.path.name))
    return element("div", shown, class_="figures") if shown else None


def _notes(entries: Sequence[Any]) -> Content:
    return element("ul", [element("li", str(each)) for each in entries]) if entries else None


def _runs(study: StudyFolder) -> Content:
    entries = study.content.get("runs") or []
    if not entries:
        return None
    rows: list[list[Cell | Content]] = [
        [
            str(each.get("name") or each.get("key")), each.get("seed"), str(each.get("status")),
            Cell(seconds(each.get("seconds")), each.get("seconds")), str(each.get("path") or ""),
            str(each.get("error") or ""),
        ]
        for each in entries
    ]  # fmt: skip
    bad = [each for each in entries if each.get("status") != "finished"]
    sentence = f"{len(entries)} runs, {len(entries) - len(bad)} of them finished."
    if bad:
        sentence += " The numbers above are without the others: " + ", ".join(
            f"{each.get('name') or each.get('key')}, seed {each.get('seed')} ({each.get('status')})" for each in bad[:8]
        ) + (f" and {len(bad) - 8} more." if len(bad) > 8 else ".")  # fmt: skip
    listing = table(f"Runs of {study.title}", ["Run", "Seed", "Status", "Time", "Directory", "Error"], rows)
    return [element("p", sentence), element("details", element("summary", f"All {len(entries)} runs"), listing)]


def _settings(content: Mapping[str, Any]) -> Content:
    rows = [(str(name), flat(value)) for name, value in (content.get("settings") or {}).items()]
    shown_by: Mapping[str, Any] = content.get("shown_by") or {}
    parts = {
        "What all runs share": rows,
        "What runs and measurements were made on": _rows(content.get("made_on") or {}),
        "What this was put together by": _rows({**shown_by, "created": content.get("created")}),
    }
    shown = [pairs(title, each) for title, each in parts.items() if each]
    return element("details", element("summary", "Settings, versions, hardware"), shown) if shown else None


def _rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name).replace("_", " "), flat(value)) for name, value in fields.items() if value]

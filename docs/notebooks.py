"""Tutorials as Jupyter notebooks (nbformat 4.5), each made of its page."""

from __future__ import annotations

import json
import re
from typing import Any

FENCED = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
"""A block of a page: its language, the file that it shows, its text."""
LINK = re.compile(r"\[([^\]]+)\]\((?!https:)[^)\s]+\)")
"""A link within the site: a downloaded notebook has no pages beside it."""
NEEDS = "It needs advmoe where the notebook's kernel runs, and leaves its files in the notebook's folder."


def notebook(page: str) -> str:
    """A page as a notebook: prose in Markdown cells, Python and commands in code cells, no printed output."""
    cells: list[dict[str, Any]] = []
    end, runs = 0, False
    for block in FENCED.finditer(page):
        prose = page[end : block.start()]
        _add(cells, "markdown", LINK.sub(r"\1", prose))
        end, runs = block.end(), runs and not re.search(r"^#", prose, re.MULTILINE)
        language, file, text = block.groups()
        if language in ("python", "bash"):
            runs = True
            _add(cells, "code", _code(language, file, text))
        elif not runs:  # what stands below a command in its section is what it prints
            _add(cells, "markdown", block[0])
    _add(cells, "markdown", LINK.sub(r"\1", page[end:]))
    title, _, rest = cells[0]["source"].partition("\n")
    cells[0]["source"] = f"{title}\n\n{NEEDS}\n{rest}"
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": about, "cells": cells}, indent=1) + "\n"


def _code(language: str, file: str | None, text: str) -> str:
    """A block as a cell runs it; a Python file that is called is run by the kernel's own Python."""
    if language == "python":
        return f"%%writefile {file}\n{text}" if file else text
    lines = [f"!{line}" if line else line for line in text.splitlines()]
    return "\n".join(re.sub(r"^!python ", "%run ", line) for line in lines)


def _add(cells: list[dict[str, Any]], kind: str, text: str) -> None:
    """Add a cell; Markdown that follows Markdown goes on in its cell."""
    text = text.strip("\n")
    if kind == "markdown" and cells and cells[-1]["cell_type"] == kind:
        cells[-1]["source"] += f"\n\n{text}" if text else ""
    elif text:
        code = {"execution_count": None, "outputs": []} if kind == "code" else {}
        cells.append({"id": str(len(cells)), "cell_type": kind, "metadata": {}, "source": text, **code})

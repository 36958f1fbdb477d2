"""The pages: those of docs/ and those beside it."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BESIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    """The file that the block shows."""
    text: str
    line: int
    """Of the page, where the text begins."""


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a language, in order."""
    text, found = page.read_text(), []
    for match in re.finditer(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL):
        if match[1] == language:
            found.append(Block(language, match[2], match[3], text[: match.start(3)].count("\n")))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)

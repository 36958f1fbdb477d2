"""What pages name in backticks is there: commands, options, fields, files, modules, extras, targets of make.

The changelog tells of names that are gone, too.
"""

import importlib
import re
import tomllib
from functools import cache

import pytest
from hooks import GENERATED
from pages import BESIDE, DOCS, PAGES, ROOT, blocks, prose

from advmoe.cli import COMMANDS
from advmoe.config import field_names
from advmoe.models import Classifier

TEXTS = {str(page.relative_to(ROOT)): page for page in [*BESIDE, *PAGES] if page.name != "CHANGELOG.md"}
PACKAGE = ROOT / "advmoe"
FOLDERS = (".ci", ".github", "advmoe", "benchmarks", "docs", "examples", "tests")
OURS = {"advmoe", *(each.stem for each in PACKAGE.iterdir()), *(name.split(".")[0] for name in field_names())}
"""What a dotted name of ours begins with: the package, its modules, the groups of fields."""
FILE = r"\.(py|md|toml|txt|cff|json|jsonl|npz|yaml|html|safetensors)$"
PLUGINS = "advmoe.plugins"
"""The group of entry points, which is no module."""


@cache
def code() -> str:
    """All that the package, the benchmarks and the soak test consist of."""
    files = [file for folder in ("advmoe", "benchmarks", "tests/soak") for file in (ROOT / folder).rglob("*.py")]
    return "\n".join(file.read_text() for file in files)


@cache
def files() -> set[str]:
    """The names of the repository's files, and of those that pages show."""
    held = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    shown = [block.title for page in PAGES for block in blocks(page, "python") if block.title]
    return {file.name for file in held} | set(shown)


@cache
def options() -> set[str]:
    """Every option of `advmoe` and of scripts, and every field as one."""
    parsers = [command.parser() for command in COMMANDS.values()]
    known = {name for parser in parsers for name in parser._option_string_actions}
    return known | {f"--{name}" for name in field_names()} | set(re.findall(r'"(--[\w-]+)"', code()))


def resolves(dotted: str) -> bool:
    """Whether `advmoe.a.b` is a module, or something in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def missing(text: str) -> list[str]:
    """What a piece of code in prose names that is not there. Words in capitals stand for something else."""
    wrong = []
    if match := re.match(r"make ([a-z][\w-]*)", text):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        wrong += [f"make {match[1]}"] if match[1] not in targets else []
    if match := re.search(r"(?:^|[\s/])advmoe ([a-z][\w-]*)", text):
        wrong += [f"advmoe {match[1]}"] if match[1] not in {*COMMANDS, "help"} else []
    if not text.startswith(("pip ", "git ")):
        wrong += [each for each in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text) if each not in options()]
    wrong += [each for each in re.findall(r"\bADVMOE_\w+", text) if not re.search(rf"\b{each}\b", code())]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"advmoe\[([\w,]+)\]", text):
        wrong += [f"advmoe[{each}]" for each in named.split(",") if each not in extras]
    if re.fullmatch(r"[\w./-]+\.\w+(:[\w.]+.*)?|[\w.-]+/[\w./-]*", text):
        wrong += [text] if not _is_there(text) else []
    if (match := re.match(r"(\w+)(?:\.\w+)+(?=$|[=(])", text)) and not re.search(FILE, match[0]):
        wrong += [match[0]] if match[1] in OURS and not _is_named(match[0]) else []
    return wrong


def _is_named(dotted: str) -> bool:
    """Whether `a.b` is a field, a module or what is in one, or what models do."""
    group, _, rest = dotted.partition(".")
    if group == "model" and hasattr(Classifier, rest):
        return True
    return dotted in {*field_names(), PLUGINS} or resolves(dotted if group == "advmoe" else f"advmoe.{dotted}")


def _is_there(name: str) -> bool:
    """Whether a file or folder, and what is named in it (`moe/layer.py:MoELayer.output`), is there."""
    path, _, inside = name.partition(":")
    if re.search(r"[A-Z]{4}", path) and not (ROOT / path).exists():
        return True  # words that stand for others, as in tests/PATH/test_NAME.py
    top = path.split("/")[0]
    if "/" in path and top in FOLDERS:
        return (ROOT / path).exists()
    if "/" in path and path.endswith(".py"):
        module = "advmoe." + path.removesuffix(".py").replace("/", ".")
        found = re.match(r"[\w.]*", inside)
        return (PACKAGE / path).is_file() and (not inside or resolves(f"{module}.{found[0]}"))  # type: ignore[index]
    if re.search(FILE, path) and "/" not in path:
        return path in files() or path in code()
    return True


@pytest.mark.parametrize("page", TEXTS.values(), ids=TEXTS)
def test_what_a_page_names_is_there(page) -> None:
    text = prose(page)
    assert [wrong for each in re.findall(r"`([^`\n]+)`", text) for wrong in missing(each)] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\bextra `(\w+)`", text)) <= set(extras)


@pytest.mark.parametrize("name", ["commands", "configuration", "recipes", "data-sets"])
def test_so_is_what_pages_made_of_the_code_name(name) -> None:
    text = GENERATED[f"reference/{name}.md"]()
    assert [wrong for each in re.findall(r"`([^`\n]+)`", text) for wrong in missing(each)] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("make tset", ["make tset"]),
        ("make soak MINUTES=60", []),
        ("advmoe trian --config digits-advmoe", ["advmoe trian"]),
        ("advmoe evaluate RUN --atacks pgd-50", ["--atacks"]),
        ("--training.lrr 0.1", ["--training.lrr"]),
        ("training.lrr=0.1", ["training.lrr"]),
        ("training.lr=0.1", []),
        ("ADVMOE_NATIV=0", ["ADVMOE_NATIV"]),
        ("pip install 'advmoe[export,figure]'", ["advmoe[figure]"]),
        ("advmoe/moe/gone.py", ["advmoe/moe/gone.py"]),
        ("advmoe/moe/", []),
        ("tests/gone/", ["tests/gone/"]),
        ("moe/layer.py:MoELayer.output", []),
        ("moe/layer.py:MoELayer.outptu", ["moe/layer.py:MoELayer.outptu"]),
        ("moe/gone.py", ["moe/gone.py"]),
        ("gone.py", ["gone.py"]),
        ("evaluation.json", []),
        ("evaluations.json", ["evaluations.json"]),
        ("advmoe.models.sources", []),
        ("advmoe.models.source", ["advmoe.models.source"]),
        ("advmoe.recipes(name)", []),
        ("advmoe.receipt(name)", ["advmoe.receipt"]),
        ("evaluation.subjects", ["evaluation.subjects"]),
        ("attack.stps", ["attack.stps"]),
        ("model.widht", ["model.widht"]),
        ("model.predict(...)", []),
        ("torch.compile", []),
    ],
)
def test_what_is_not_there_is_found(text, wrong) -> None:
    assert missing(text) == wrong


def test_every_page_of_the_site_is_read() -> None:
    assert {str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md")} <= set(TEXTS)

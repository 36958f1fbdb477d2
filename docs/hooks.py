"""Pages that MkDocs makes when it builds: of the code, and of the README and its like beside this folder."""

from __future__ import annotations

import io
import re
from argparse import Action, ArgumentParser
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from notebooks import notebook

import advmoe
from advmoe.cli import COMMANDS, main
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting
from advmoe.tables import DATASETS
from advmoe.zoo import PACKED, entries_of
from advmoe.zoo.leaderboard import leaderboard

ROOT = Path(__file__).parent.parent
BESIDE = {
    "index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md", "benchmarks.md": "benchmarks/README.md",
}  # fmt: skip
"""Pages made of files of the repository outside this folder."""


def commands() -> str:
    """Every command with its options, but for fields of the configuration."""
    parts = [
        "# Commands\n\n`advmoe COMMAND --help` shows the same. Fields of the [configuration](configuration.md) are "
        "options too: `--training.lr 0.05`.\n\n"
        "| exit code | what it says |\n|---|---|\n| 0 | done |\n"
        "| 1 | training diverged, an exported file differs, a checked folder is unsound, a part of a study failed |\n"
        "| 2 | a mistake in the input, told in one line; nothing was created |\n"
        "| 3 | the machine failed: one line tells what is kept and how to go on |\n"
        "| 85 | training stopped as asked and saved itself; `--resume` goes on |\n"
        "| 129, 130, 143 | ended by SIGHUP, Ctrl-C, SIGTERM |\n| 141 | nobody reads the output any more |",
        f"```text\n{_overview()}```",
    ]
    for name, command in COMMANDS.items():
        parser = command.parser()
        parts.append(f"## advmoe {name}\n\n{parser.description}")
        if parser.epilog:
            parts.append(parser.epilog)
        parts.append("\n".join(f"- {_option(each)}" for each in _options(parser)))
        groups = {group: [_link(each) for each in group._group_actions] for group in _groups(parser)}
        parts += [f"Fields of `{group.title}`: {', '.join(links)}." for group, links in groups.items()]
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """Every field of a configuration, as `advmoe train` takes them."""
    parts = [
        "# Configuration\n\nA configuration is a YAML file of these groups and fields; what it leaves out has the "
        "default. Each field is an option of `advmoe train` as well: `--training.lr 0.05`. `advmoe train --config "
        "RECIPE --print_config` prints every field and its value.\n\nPixels lie in [0, 1], and strengths of attacks "
        "are in that unit; `8/255` may be written as such."
    ]
    for group in _groups(COMMANDS["train"].parser()):
        parts.append(f"## {group.title}\n\n{group.description}")
        for each in group._group_actions:
            name = each.option_strings[0].removeprefix("--")
            text, default = re.fullmatch(r"(.*) \(default: (.*)\)", _help(each), re.DOTALL).groups()  # type: ignore[union-attr]
            parts.append(f"### `{name}` {{#{name}}}\n\n{text}\n\n*Value:* `{each.metavar}`. *Default:* `{default}`.")
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """The settings and the methods that recipes are made of."""
    parts = [
        "# Recipes\n\nA recipe is a setting and a method, as in `cifar10-resnet18-advmoe`; any pair will do, except "
        "`at-sparse` of DeiT-Tiny: only CNNs are pruned. `advmoe train --config RECIPE` trains it, with any field "
        "overridden. `advmoe recipes` prints these lists."
    ]
    for title, names, describe in (("Settings", SETTINGS, describe_setting), ("Methods", METHODS, describe_method)):
        rows = [f"| `{name}` | {describe(name)} |" for name in names]
        parts.append("\n".join([f"## {title}\n\n| name | what it is |\n|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def data_sets() -> str:
    """The data sets by name."""
    lines = [
        "# Data sets\n\n`advmoe data list` prints this list. [How to prepare data](../how-to/data.md) says what a "
        "folder must hold.\n\n| `data.name` | what it holds | licence | where it comes from |\n|---|---|---|---|"
    ]
    lines += [f"| `{name}` | {each.about} | {each.licence} | {each.origin} |" for name, each in DATASETS.items()]
    return "\n".join(lines) + "\n"


def api() -> str:
    """The public names, each from its docstring."""
    parts = [
        "# Python\n\nAll of these are names of `advmoe` itself: `from advmoe import evaluate`. They are imported on "
        "first use, so that `import advmoe` does not load PyTorch."
    ]
    for name in advmoe.__all__:
        if not name.startswith("_"):
            found = getattr(advmoe, name)
            parts.append(f"::: {found.__module__}.{found.__qualname__}")
    return "\n\n".join(parts) + "\n"


GENERATED: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/configuration.md": configuration,
    "reference/recipes.md": recipes,
    "reference/data-sets.md": data_sets,
    "reference/api.md": api,
}
"""Pages made of the code."""


def beside(name: str) -> str:
    """A page made of a file in the repository's root: its links start in this folder."""
    text = (ROOT / BESIDE[name]).read_text().replace("](docs/", "](")
    for page, file in BESIDE.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the tutorials as notebooks; MkDocs calls this."""
    from mkdocs.structure.files import File

    for name in BESIDE:
        files.append(File.generated(config, name, content=beside(name)))
    for name, make in GENERATED.items():
        files.append(File.generated(config, name, content=make()))
    for page in [each for each in files if _is_tutorial(each)]:
        name = page.src_uri.replace(".md", ".ipynb")
        files.append(File.generated(config, name, content=notebook(page.content_string)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put a tutorial's notebook under its title; MkDocs calls this."""
    if not _is_tutorial(page.file):
        return markdown
    title, _, rest = markdown.partition("\n")
    return f"{title}\n\n[This tutorial as a notebook]({page.file.name}.ipynb){{: download }}\n{rest}"


def _is_tutorial(file: Any) -> bool:
    return bool(re.fullmatch(r"tutorials/[\w-]+\.md", file.src_uri))


def _overview() -> str:
    """What `advmoe --help` prints."""
    text = io.StringIO()
    with redirect_stdout(text), suppress(SystemExit):
        main(["--help"])
    return text.getvalue()


def _groups(parser: ArgumentParser) -> list[Any]:
    return [
        group
        for group in parser._action_groups
        if any("." in each.dest for each in group._group_actions) and group.description
    ]


def _options(parser: ArgumentParser) -> list[Action]:
    fields = [each for group in _groups(parser) for each in group._group_actions]
    return [each for each in parser._actions if each not in fields and each.dest != "help"]


def _option(option: Action) -> str:
    value = "" if option.nargs == 0 else str(option.metavar or "")
    shown = f"`{' '.join([*option.option_strings[-1:], *filter(None, [value])])}`"
    return f"{shown}: {_help(option)}"


def _link(option: Action) -> str:
    name = option.option_strings[0].removeprefix("--")
    return f"[`{name}`](configuration.md#{name})"


def _help(option: Action) -> str:
    return " ".join((option.help or "").replace("%%", "%").split())


GENERATED["results/leaderboard.md"] = lambda: leaderboard(entries_of(PACKED))

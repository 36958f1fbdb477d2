"""`advmoe init`."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from advmoe.cli.arguments import Parser, field_docs, new_parser, to_run
from advmoe.config import Config, require
from advmoe.documents import dump_yaml
from advmoe.errors import InputError
from advmoe.files import require_writable, write_text
from advmoe.recipes import describe, recipe, recipe_names
from advmoe.text import nearest, show

WIDTH = 100


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Write a recipe as a configuration of your own, with every field and what it means.")
    parser.add_argument("file", metavar="FILE.yaml", help="what to write; it must not be there yet")
    parser.add_argument("--recipe", metavar="NAME", help="see `advmoe recipes` (default: folder-advmoe)")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    path, name = Path(args["file"]), args.get("recipe", "folder-advmoe")
    if name not in recipe_names():
        got = f"{show(name)}{nearest(name, recipe_names())}"
        raise InputError(f"--recipe must be a recipe (see `advmoe recipes`), got {got}")
    require(path.suffix in (".yaml", ".yml"), "FILE.yaml", "a name that ends in .yaml", args["file"])
    require(not path.exists(), "FILE.yaml", "a file that is not there yet", args["file"])
    require(path.parent.is_dir(), "FILE.yaml", "in a directory that exists", args["file"])
    require_writable("FILE.yaml", path.parent)
    write_text(path, commented(name))
    print(f"written to {path}\nnext  {to_run('train', '--config', path)}")
    return 0


def commented(name: str) -> str:
    """The recipe `name` as YAML: its own fields, and all others behind `#` at their defaults, each with its meaning."""
    own, whole = recipe(name), Config.from_dict(recipe(name)).to_dict()
    lines = [f"# {line}" for line in _wrapped(describe(name), WIDTH - 2)]
    lines.append("# Fields behind a # have the values that they would have anyway.")
    for group, cls in get_type_hints(Config).items():
        lines += ["", f"# {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}", f"{group}:"]
        docs = field_docs()[cls.__name__]
        for item in fields(cls):
            lines += [f"  # {line}" for line in _wrapped(docs[item.name], WIDTH - 4)]
            set_here = item.name in (own.get(group) or {})
            [text] = dump_yaml({item.name: whole[group][item.name]}).splitlines()
            lines.append(f"  {text}" if set_here else f"  # {text}")
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

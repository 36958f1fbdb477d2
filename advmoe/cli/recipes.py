"""`advmoe recipes`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, new_parser
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting
from advmoe.text import listing, wrapped


def parser() -> Parser:
    """The command's options."""
    return new_parser("List the recipes.")


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    about = "A recipe is a setting and a method, as in cifar10-resnet18-advmoe; any pair will do, except at-sparse of "
    print("\n".join(wrapped(f"{about}DeiT-Tiny: only CNNs are pruned.")))
    for title, names, describe in (("settings", SETTINGS, describe_setting), ("methods", METHODS, describe_method)):
        print("\n".join(["", title, *listing([(name, describe(name)) for name in names], indent="  ")]))
    return 0

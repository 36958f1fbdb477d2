"""`advmoe recipes`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, new_parser
from advmoe.recipes import METHODS, SETTINGS, describe_method, describe_setting


def parser() -> Parser:
    """The command's options."""
    return new_parser("List the recipes.")


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    width = max(map(len, (*SETTINGS, *METHODS)))
    print("A recipe is a setting and a method, as in cifar10-resnet18-advmoe; any pair will do,")
    print("except at-sparse of DeiT-Tiny: only CNNs are pruned.")
    for title, names, describe in (("settings", SETTINGS, describe_setting), ("methods", METHODS, describe_method)):
        print(f"\n{title}")
        for name in names:
            print(f"  {name:<{width}}  {describe(name)}")
    return 0

"""`advmoe push`."""

from __future__ import annotations

from typing import Any

from advmoe.cli.arguments import Parser, existing_run, new_parser


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Upload a run's model with its card to the Hugging Face Hub (log in with `hf auth login`).")
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory")
    add("repo", metavar="OWNER/NAME", help="the repository, made if there is none")
    add("--model", dest="source", metavar="FILE.py:FACTORY", help="the network of your own that RUN trained; executed")
    add("--private", action="store_true", help="make a new repository private")
    add("--branch", metavar="BRANCH", help="what to commit to (default: main)")
    add("--license", metavar="ID", help="of the weights, as the Hub names it, e.g. apache-2.0 (default: unknown)")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    folder = existing_run("RUN", args["run"])

    from advmoe.hub import push_to_hub

    options = {name: args[name] for name in ("branch", "license", "source") if name in args}
    print(push_to_hub(folder, args["repo"], private=True if "private" in args else None, **options))
    return 0

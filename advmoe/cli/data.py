"""`advmoe data`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.cli.arguments import Parser, new_parser, to_run
from advmoe.config import require_path
from advmoe.errors import InputError
from advmoe.tables import DATASETS
from advmoe.text import nearest, show, wrapped


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("List data sets, fetch one, or check a folder of pictures before training on it.")
    parser.prog = "advmoe data"
    add = parser.add_argument
    add("action", metavar="{list,fetch,check,cifar10-jpeg}", help="what to do: see below")
    add("what", metavar="NAME_OR_ROOT", nargs="?", help="of fetch: a data set; of check: a folder of pictures")
    add("--root", metavar="DIR", help="where downloads and copies go (default: data)")
    add("--download", action="store_true", help="of cifar10-jpeg: fetch the official archive where it is missing")
    add("--json", action="store_true", help="of check: print what was found as JSON")
    parser.epilog = (
        "list: the data sets and their licences. fetch NAME: download one, checked by its checksum. check ROOT: count "
        "images per class; name what is damaged, doubled, in train and test alike, or of odd size; exit code 1 where "
        "training would fail or its results would say nothing. cifar10-jpeg: CIFAR-10 as JPEG files of quality 75, on "
        "which the studies run."
    )
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    actions: dict[str, Callable[[dict[str, Any]], int]] = {
        "list": _list, "fetch": _fetch, "check": _check, "cifar10-jpeg": _copy,
    }  # fmt: skip
    action = args["action"]
    if action not in actions:
        raise InputError(f"data must do one of {', '.join(actions)}, got {show(action)}{nearest(action, actions)}")
    if action in ("list", "cifar10-jpeg") and "what" in args:
        raise InputError(f"data {action} must get no name, got {show(args['what'])}")
    for option, owner in (("download", "cifar10-jpeg"), ("json", "check")):
        if option in args and action != owner:
            raise InputError(f"--{option} must go with data {owner}, got data {action}")
    return actions[action](args)


def _list(args: dict[str, Any]) -> int:
    for name, each in DATASETS.items():
        about = (each.about, f"licence: {each.licence}", each.origin)
        print("\n".join([name, *(line for text in about for line in wrapped(f"  {text}", "    "))]))
    return 0


def _fetch(args: dict[str, Any]) -> int:
    able = {name: each.fetch for name, each in DATASETS.items() if each.fetch is not None}
    name = args.get("what")
    if name not in able:
        rule = f"data fetch must get one of {', '.join(able)}"
        if name is not None and name in DATASETS:
            raise InputError(f"{rule}, got {show(name)}: {DATASETS[name].origin}")
        raise InputError(f"{rule}, got {show(name) if name is not None else 'nothing'}")
    root = Path(args.get("root", "data"))
    path = able[name](root)
    print(f"data  {path}\nnext  {to_run('train', '--config', f'{name}-resnet18-advmoe', '--data.root', root)}")
    return 0


def _check(args: dict[str, Any]) -> int:
    if "what" not in args:
        raise InputError("data check must get a folder of pictures, got nothing")
    require_path("data check", args["what"])

    from advmoe.data.inspect import check_folder, described

    found = check_folder(args["what"])
    print(json.dumps(found.to_dict(), indent=2) if "json" in args else described(found))
    if "json" not in args:
        print(f"\nnext  {to_run('train', '--data.root', args['what'])}" if found.sound else "\nnot sound: see above")
    return 0 if found.sound else 1


def _copy(args: dict[str, Any]) -> int:
    from advmoe.data.copies import write_cifar10_jpeg

    folder = write_cifar10_jpeg(Path(args.get("root", "data")), download="download" in args)
    print(f"data  {folder}\nnext  {to_run('train', '--config', 'folder-advmoe', '--data.root', folder)}")
    return 0

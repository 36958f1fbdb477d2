"""`advmoe zoo`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe.cli.arguments import Parser, add_fields, config_fields, existing_run, new_parser, to_run
from advmoe.config import Config
from advmoe.errors import InputError
from advmoe.text import aligned, macs_unit, nearest, passes, percent, radius, show, split_words, wrapped
from advmoe.zoo import INDEX, PLACE, PREFIX, entries, find
from advmoe.zoo.leaderboard import interval, lines

ENTRY_FIELDS = {"data": ("name", "root", "download", "image_size", "workers")}
_NEEDED = ("name", "title", "licence", "of")
"""Options without which there is no entry."""


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("List trained models and what was measured of them, or make the entry of one of your own.")
    parser.prog = "advmoe zoo"
    add = parser.add_argument
    add("action", metavar="{list,show,entry}", help="what to do: see below")
    add("what", metavar="NAME_OR_RUN", nargs="?", help="of show: a model; of entry: a run directory")
    add("--json", action="store_true", help="of list and show: print what the index holds")
    add("--name", metavar="NAME", help="of entry: the model's name in the zoo")
    add("--title", metavar="TEXT", help="of entry: what the model is, in words")
    add("--licence", metavar="ID", help="of entry: of the weights, e.g. apache-2.0")
    add("--of", metavar="TEXT", help="of entry: the data set, in words")
    add("--url", metavar="ADDRESS", help="of entry: of the folder where the files are to lie (default: in the zoo)")
    add("--hardware", metavar="TEXT", help="of entry: on what the evaluation's ms/image was taken (default: left out)")
    add("--evaluations", metavar="DIR,...", help="of entry: folders of evaluations of the run (default: the run)")
    add("--out", metavar="DIR", help="of entry: the zoo, new or existing (default: zoo)")
    add_fields(parser, ENTRY_FIELDS, defaults=False)
    parser.epilog = (
        "list: the models, ranked by worst case. show NAME: all that was measured of one. entry RUN: put a run and its "
        f"evaluations into a zoo of your own, which {PLACE}=DIR then adds to these. Wherever a run is evaluated, "
        f"predicts or is exported, {PREFIX}NAME stands for a model."
    )
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    actions: dict[str, Callable[[dict[str, Any]], int]] = {"list": _list, "show": _show, "entry": _entry}
    action = args["action"]
    if action not in actions:
        raise InputError(f"zoo must do one of {', '.join(actions)}, got {show(action)}{nearest(action, actions)}")
    if action == "list" and "what" in args:
        raise InputError(f"zoo list must get no name, got {show(args['what'])}")
    allowed = {"action", "what"} | ({"json"} if action != "entry" else set(args) - {"json"})
    if other := sorted(set(args) - allowed):
        raise InputError(
            f"--{other[0]} must go with zoo {'list or show' if action == 'entry' else 'entry'}, got {action}"
        )
    return actions[action](args)


def _list(args: dict[str, Any]) -> int:
    known = entries()
    if "json" in args:
        print(json.dumps({name: entry.told for name, entry in known.items()}, indent=2))
        return 0
    print("\n".join(lines(known.values())))
    print(f"next  {to_run('zoo', 'show', next(iter(known)))}")
    return 0


def _show(args: dict[str, Any]) -> int:
    if "what" not in args:
        raise InputError(f"zoo show must get one of {', '.join(entries())}, got nothing")
    entry = find(args["what"])
    if "json" in args:
        print(json.dumps(entry.told, indent=2))
        return 0
    same, time = entry.same, entry.time
    told = [
        ("model", entry.model),
        ("data", f"{entry.data}, {entry.norm} {radius(entry.eps, entry.norm)}"),
        ("licence", entry.licence),
        ("weights", f"float16, {same.count:,} of {same.images:,} predictions as evaluated"),
        ("SHA-256", entry.digest),
    ]
    shares = [*entry.accuracy.items(), ("worst case", entry.worst_case)]
    rows = [(name, f"{percent(e.value)} %", f"{interval(e)}, {e.images:,} images") for name, e in shares]
    if entry.masking_gap is not None:
        rows.append(("masking gap", f"{percent(entry.masking_gap)} points", ""))
    unit, factor = macs_unit([entry.gmacs])
    rows += [(unit, f"{entry.gmacs * factor:.4g}", ""), ("parameters", f"{entry.parameters:,}", "")]
    rows.append(("active parameters", f"{entry.active_parameters:,}", ""))
    if time is not None:
        rows.append(("ms per image", f"{time.ms:.4g}", time.setting))
    print(f"{PREFIX}{entry.name}  {entry.title}\n")
    print("\n".join([*aligned(told), "", *aligned(rows, "<><"), ""]))
    if budget := passes(entry.told):
        print("\n".join(wrapped(budget)))
    for flag in entry.flags:
        print(f"flag  {flag}")
    print(f"next  {to_run('predict', f'{PREFIX}{entry.name}', 'IMAGE')}")
    return 0


def _entry(args: dict[str, Any]) -> int:
    if "what" not in args:
        raise InputError("zoo entry must get a run directory, got nothing")
    existing_run("RUN", args["what"])
    for option in _NEEDED:
        if option not in args:
            raise InputError(f"zoo entry must get --{option} (see advmoe zoo --help), got none")
    overrides = config_fields(args)
    Config.from_dict(overrides)
    from advmoe.zoo.entry import Label, make_entry

    out = Path(args.get("out", "zoo"))
    label = Label(
        args["name"], args["title"], args["licence"], args["of"], url=args.get("url"), hardware=args.get("hardware")
    )
    evaluations = split_words(args.get("evaluations", ""))
    entry, folder = make_entry(args["what"], label, evaluations=evaluations, out=out, overrides=overrides)
    print("\n".join(lines([entry])))
    print(f"written to {folder} and {out / INDEX}")
    print(f"next  {PLACE}={shlex.quote(str(out))} {to_run('zoo', 'show', entry.name)}")
    return 0

"""`advmoe search`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from advmoe.cli.arguments import (
    FAILED,
    Parser,
    add_engine,
    add_fields,
    config_fields,
    continuable,
    engine_options,
    fail,
    new_parser,
    number,
    only_one_of,
    to_run,
)
from advmoe.cli.engine import add_engines, engine_of
from advmoe.cli.study import print_estimate
from advmoe.cli.train import config_source
from advmoe.config import Config, Count, Processes, Seed, Within, merged, require
from advmoe.rundir import CALIBRATION
from advmoe.text import aligned, duration, percent, split_words

JOBS_ELSEWHERE = "8"
"""Trials that a cluster has at once, unless the user says otherwise: TPE learns from those that have ended."""


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Search fields of the configuration for the best accuracy on validation images.")
    add = parser.add_argument
    add("space", metavar="SPACE.yaml", help="what is varied: `training.lr: {low: 0.01, high: 0.3, log: true}`")
    add("--config", metavar="RECIPE|YAML", help="what all trials share, as `advmoe train` takes it")
    add("--objective", metavar="{worst_case,clean_accuracy}", help="what is maximised (default: worst_case)")
    add("--trials", metavar="N", help="trials in all (20); a later call may ask for more")
    add("--sampler", metavar="{tpe,random}", help="how values are drawn (default: tpe)")
    add("--pruner", metavar="{none,median,asha}", help="stops trials that fall behind after an epoch (none)")
    add("--search-seed", metavar="S", help="of what is drawn (0)")
    add("--attacks", metavar="NAME,...", help="on validation images (default: as of `advmoe evaluate`)")
    add("--num-examples", metavar="N", help="validation images attacked (default: all)")
    add("--allow", metavar="CHECK,...", help="checks made before an attack that may fail")
    add("--jobs", metavar="K", help=f"trials done at once (default: 1; on a cluster {JOBS_ELSEWHERE})")
    add("--out", metavar="DIR", help="the search's folder (default: runs/search-<SPACE>)")
    add("--dry-run", action="store_true", help="print what is left and stop; how long too, once calibrated")
    add("--calibrate", action="store_true", help="with --dry-run: time the networks for about a minute, and keep that")
    add("--status", action="store_true", help="print how far each trial is and where its log lies, and stop")
    add_engine(parser, "1")
    add_engines(parser)
    add_fields(parser, dict.fromkeys(get_type_hints(Config)), defaults=False)
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    from advmoe.search.session import SearchOptions

    here = engine_options(args)
    engine = engine_of(args, here["accelerator"])
    settings = _settings(args)
    options = SearchOptions(
        out=Path(args.get("out", f"runs/search-{Path(args['space']).stem}")),
        trials=number("--trials", Annotated[int, Within(1, 100_000)], args.get("trials", "20")),
        jobs=number("--jobs", Processes, args.get("jobs", "1" if engine.local else JOBS_ELSEWHERE)),
        threads=here["threads"] or 1, accelerator=here["accelerator"], engine=engine, command=["advmoe", *argv],
    )  # fmt: skip
    settings.require_same(options.out)
    require("calibrate" not in args or "dry_run" in args, "--calibrate", "with --dry-run", "no --dry-run")
    if asked := only_one_of(args, "dry_run", "status"):
        return _status(settings, options) if asked == "status" else _plan(settings, options, "calibrate" in args)
    engine.require()
    from advmoe.search.settings import SEARCH

    with continuable(options.out, to_run(*argv), SEARCH):
        return _run(settings, options, argv)


def _settings(args: dict[str, Any]) -> Any:
    """The search. Raises `InputError` for what cannot be."""
    from advmoe.search.settings import SearchSettings
    from advmoe.search.space import read_space

    require(Path(args["space"]).is_file(), "SPACE", "a YAML file of fields to vary", args["space"])
    dimensions, own = read_space(args["space"]), config_fields(args)
    for each in dimensions:
        group, _, name = each.name.partition(".")
        require(name not in own.get(group, {}), f"--{each.name}", "left out, as the space varies it",
                own.get(group, {}).get(name))  # fmt: skip
    _, values = config_source(args.get("config"), own)
    chosen = {name: args[name] for name in ("objective", "sampler", "pruner") if name in args}
    settings = SearchSettings(
        space=dimensions, base=merged(values, own),
        seed=number("--search-seed", Seed, args.get("search_seed", "0")),
        attacks=split_words(args["attacks"]) if "attacks" in args else None,
        num_examples=number("--num-examples", Count, args.get("num_examples")),
        allow=split_words(args.get("allow", "")), **chosen,
    )  # fmt: skip
    settings.config.require_trainable()
    if settings.attacks is not None:
        from advmoe.evaluation.suite import ATTACKS

        require(bool(settings.attacks), "--attacks", "at least one attack", "none")
        for name in settings.attacks:
            ATTACKS.require("--attacks", name)
    return settings


def _plan(settings: Any, options: Any, calibrate: bool) -> int:
    tasks = options.tasks(settings)
    left = sum(task.state() != "finished" for task in tasks.values())
    print(f"{len(tasks)} trials, {left} to do, by {options.jobs} process{'es' * (options.jobs > 1)}")
    if left and (calibrate or (options.out / CALIBRATION).is_file()):
        from advmoe.search.work import works

        print_estimate(works(tasks.values()), options.out, options)
    return 0


def _status(settings: Any, options: Any) -> int:
    from advmoe.search.session import Standing
    from advmoe.studies.status import status_of

    tasks, ledger = options.tasks(settings), options.workers().ledger
    standing = Standing.of(tasks)
    counts = Counter[str]()
    for name, task in tasks.items():
        now, end = status_of(task, ledger), standing.ends.get(name)
        state = end["state"] if end else now.state
        counts[state] += 1
        words = [
            f"{state:11}  trial {name}",
            _came_to(settings, end) if end else "",
            f"since {now.since}" if now.since and not end else "",
            f"on {now.host}" if now.host and not end else "",
            f"job {now.job}" if now.job and not end else "",
            now.error or "",
            f"log {now.log}" if now.log else "",
        ]
        print("  ".join(filter(None, words)))
    best = "" if standing.best is None else f"; best so far: {_best(settings, standing)}"
    print(f"{len(tasks)} trials: {_counted(counts)}{best}")
    return 0


def _run(settings: Any, options: Any, argv: list[str]) -> int:
    from advmoe.engines import MachineFailed
    from advmoe.progress import tell
    from advmoe.search.session import run_search
    from advmoe.search.settings import BEST

    if not options.engine.local:
        again = to_run(*argv, "--status")
        tell(f"trials print into {options.out / 'logs'}; how far they are: {again}", "task")

    def told(step: Any, task: Any, standing: Any) -> None:
        _told(settings, step, task, standing)

    standing, errors = run_search(settings, options, told)
    print("\n".join(_ranking(settings, standing)))
    if failed := next((error for error in errors.values() if isinstance(error, MachineFailed)), None):
        return fail(f"{failed}; what is finished is kept; to continue: {to_run(*argv)}", FAILED)
    if standing.best is None:
        return fail("no trial came to its end; --status tells why", 1)
    best = options.out / BEST
    print(f"\nbest  {_best(settings, standing)}\nwritten to {best}")
    print(f"next  {to_run('train', '--config', best, plugins_of=argv)}")
    print(f"      {to_run('report', options.out, '-o', options.out / 'report.html', plugins_of=argv)}")
    return 0


MOST_SHOWN = 10
"""Trials that are printed at the end, the best ones."""


def _ranking(settings: Any, standing: Any) -> list[str]:
    """The best trials, and how many there are of the others."""
    ends: dict[str, Any] = standing.ends
    ranked = sorted(
        (name for name, end in ends.items() if end["value"] is not None), key=lambda name: -ends[name]["value"]
    )
    if not ranked:
        return []
    fields = [each.name for each in settings.space]
    rows = [["trial", f"{settings.objective} %", *fields]]
    for name in ranked[:MOST_SHOWN]:
        rows.append([name, percent(ends[name]["value"]), *(_shown(ends[name]["parameters"][each]) for each in fields)])
    return [*aligned(rows, "<>>"), f"{len(ends)} trials: {_counted(Counter(end['state'] for end in ends.values()))}"]


def _counted(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _told(settings: Any, step: Any, task: Any, standing: Any) -> None:
    """Tell that a trial starts, or how it ended, what is best so far, and how much is left."""
    from advmoe.progress import tell

    end = standing.ends.get(task.id)
    fields: dict[str, Any] = {"kind": "trial", "trial": task.id}
    if step in ("starts", "queued"):
        tell(f"{step:8}  trial {task.id}", "task", state=str(step), **fields)
        return
    state = "failed" if end is None or step != "done" else end["state"]
    came_to = f"failed: {step}" if state == "failed" else _came_to(settings, end)
    left = f", about {duration(step.seconds_left)}" if step.seconds_left else ""
    words = [
        f"{state:8}  trial {task.id}", came_to,
        "" if step.seconds is None else duration(step.seconds),
        f"best {_best(settings, standing, short=True)}" if standing.best else "",
        f"{step.left} left{left}" if step.left else "",
    ]  # fmt: skip
    for name in ("seconds", "seconds_left"):
        fields[name] = None if (value := getattr(step, name)) is None else round(value, 1)
    value = None if end is None else end["value"]
    fields |= {"value": value, "parameters": end and end["parameters"], "best": standing.best, "left": step.left}
    tell("  ".join(filter(None, words)), "failed" if state == "failed" else "task", state=state, **fields)


def _came_to(settings: Any, end: Any) -> str:
    """What an ended trial came to, and its values."""
    values = ", ".join(f"{name} {_shown(value)}" for name, value in end["parameters"].items())
    if end["state"] == "failed":
        return f"{end['error']}  ({values})"
    if end["state"] == "pruned":
        epoch, share = list(end["epochs"].items())[-1]
        return f"after epoch {epoch}, {settings.watched} {percent(share)} %  ({values})"
    return f"{settings.objective} {percent(end['value'])} %  ({values})"


def _best(settings: Any, standing: Any, *, short: bool = False) -> str:
    end = standing.ends[standing.best]
    return (
        f"{percent(end['value'])} % ({standing.best})" if short else f"trial {standing.best}, {_came_to(settings, end)}"
    )


def _shown(value: Any) -> str:
    from advmoe.documents import dump_yaml

    return f"{value:.4g}" if isinstance(value, float) else dump_yaml([value])[2:].strip()

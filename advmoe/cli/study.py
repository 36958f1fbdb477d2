"""`advmoe study`."""

from __future__ import annotations

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
from advmoe.cli.engine import USUAL_JOBS, add_engines, engine_of
from advmoe.config import Config, Count, Processes, Within, require
from advmoe.errors import InputError
from advmoe.files import require_writable, write_text
from advmoe.rundir import CALIBRATION
from advmoe.text import as_option, duration, listing, split_words, wrapped


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Regenerate a table or figure of the paper, or answer a question beyond it (`study list`).")
    add = parser.add_argument
    add("name", metavar="NAME", help="a study, `list`, or `claims`: those of the paper, judged on what is stored")
    add("--scale", metavar="{smoke,cpu,paper}", help="minutes on digits, a night of two cores, the paper's own (smoke)")
    add("--seeds", metavar="S", help="runs of each row, seeds 0 to S - 1 (default: the scale's, 1, 5 and 5)")
    add("--only", metavar="WORD,...", help="rows whose run's name holds one of these; of A+B both, as in AdvMoE+ResNet")
    add("--jobs", metavar="K", help=f"tasks done at once (default: 1; on a cluster {USUAL_JOBS})")
    add("--num-examples", metavar="N", help="test images attacked (default: the scale's)")
    add("--out", metavar="DIR", help="folder of studies and their runs (default: runs/studies; of `claims` first "
        "docs/results)")  # fmt: skip
    add("--page", metavar="FILE", help="of `claims`: where to write the list as a page of Markdown")
    add("--dry-run", action="store_true", help="print what would be done and stop; how long too, once calibrated")
    add("--calibrate", action="store_true", help="with --dry-run: time the networks for about a minute, and keep that")
    add("--status", action="store_true", help="print how far each task is and where its log lies, and stop")
    add("--put-away", action="store_true", help="drop the weights of a finished study's runs, keep their results, "
        "and stop; further measurements would have to train again, another study's of the same runs too")  # fmt: skip
    add_engine(parser, "1")
    add_engines(parser)
    add_fields(parser, dict.fromkeys(get_type_hints(Config)), defaults=False)
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    if args["name"] == "list":
        return _list(args)
    if args["name"] == "claims":
        return _claims(args)
    if "page" in args:
        raise InputError(f"--page must be left out of a study, as it is of `claims`, got {args['page']!r}")
    from advmoe.studies.catalogue import study_named
    from advmoe.studies.session import StudyOptions

    study_named(args["name"])
    here = engine_options(args)
    engine = engine_of(args, here["accelerator"])
    options = StudyOptions(
        scale=args.get("scale", "smoke"),
        seeds=number("--seeds", Annotated[int, Within(1, 1000)], args.get("seeds")),
        only=split_words(args.get("only", "")),
        overrides=config_fields(args),
        num_examples=number("--num-examples", Count, args.get("num_examples")),
        root=Path(args.get("out", "runs/studies")),
        jobs=number("--jobs", Processes, args.get("jobs", "1" if engine.local else USUAL_JOBS)),
        threads=here["threads"] or 1,
        accelerator=here["accelerator"],
        engine=engine,
        command=["advmoe", *argv],
    )
    require("calibrate" not in args or "dry_run" in args, "--calibrate", "with --dry-run", "no --dry-run")
    if asked := only_one_of(args, "dry_run", "status", "put_away"):
        return {"dry_run": _plan, "status": _status, "put_away": _put_away}[asked](args, options)
    engine.require()
    with continuable(options.root, to_run(*argv), "runs"):
        return _run(args["name"], options, argv)


def _list(args: dict[str, Any]) -> int:
    _require_no_more(args)
    from advmoe.studies.catalogue import STUDIES

    print("\n".join(listing([(name, study.shows) for name, study in STUDIES.items()])))
    return 0


def _claims(args: dict[str, Any]) -> int:
    """Print the paper's claims beside what stored studies say of them."""
    _require_no_more(args, "out", "page")
    from advmoe.studies.claim_list import as_page, as_text, judge, stored

    usual = Path("docs/results") if Path("docs/results/studies").is_dir() else Path("runs/studies")
    studies = stored(Path(args["out"]) if "out" in args else usual)
    listed = judge(studies)
    if "page" in args:
        page = Path(args["page"])
        require_writable("--page", page.parent)
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, as_page(listed, studies))
    print(as_text(listed))
    if "page" in args:
        print(f"\nwritten to {args['page']}")
    return 0


def _require_no_more(args: dict[str, Any], *of_it: str) -> None:
    """Raise `InputError` for options that a list has not."""
    if idle := [as_option(name) for name in args if name not in ("name", *of_it)]:
        able = " but " + " and ".join(map(as_option, of_it)) if of_it else ""
        raise InputError(f"`study {args['name']}` must have no options{able}, got {', '.join(idle)}")


def _plan(args: dict[str, Any], options: Any) -> int:
    from advmoe.studies.plan import put_away_source
    from advmoe.studies.session import plan_study

    tasks = plan_study(args["name"], options)
    left = [task for task in tasks.values() if task.state() != "finished"]
    for task in tasks.values():
        lost = put_away_source(task) if task in left else None
        lacks = "" if lost is None else f"  lacks the weights that --put-away dropped of {lost.path}"
        print(f"{task.state():11}  {described(task)}{lacks}")
    print(f"{len(tasks)} tasks, {len(left)} to do, by {options.jobs} process{'es' * (options.jobs > 1)}")
    if left and ("calibrate" in args or (options.root / CALIBRATION).is_file()):
        from advmoe.studies.estimate_work import works

        print_estimate(works(tasks), options.root, options)
    return 0


def print_estimate(works: Any, folder: Path, options: Any) -> None:
    """Print how long `works` will take, with the options of a study or a search, and how much they leave."""
    import torch

    from advmoe.studies.estimate import estimated, lines

    gpus = options.accelerator != "cpu" and torch.cuda.is_available()
    of = estimated(works, folder, threads=options.threads, accelerator=options.accelerator)
    print("\n".join(["", *lines(of, jobs=options.jobs, threads=options.threads, gpus=gpus)]))


def _status(args: dict[str, Any], options: Any) -> int:
    from advmoe.studies.session import plan_study
    from advmoe.studies.status import counted, status_of

    tasks, ledger = plan_study(args["name"], options), options.workers().ledger
    states = [status_of(task, ledger) for task in tasks.values()]
    for task, now in zip(tasks.values(), states, strict=True):
        words = [
            f"{now.state:11}  {described(task)}",
            f"since {now.since}" if now.since else "",
            f"on {now.host}" if now.host and now.state != "finished" else "",
            f"job {now.job}" if now.job and now.state != "finished" else "",
            now.error or "",
            f"log {now.log}" if now.log else "",
        ]
        print("  ".join(filter(None, words)))
    print(f"{len(tasks)} tasks: {counted(states)}")
    return 0


def _put_away(args: dict[str, Any], options: Any) -> int:
    from advmoe.studies.session import put_away_runs

    dropped = put_away_runs(args["name"], options)
    for run, _ in dropped:
        print(f"put away  {described(run)}")
    print(f"{len(dropped)} runs without weights, {sum(freed for _, freed in dropped) / 1e6:.1f} MB freed; results stay")
    return 0


def _run(name: str, options: Any, argv: list[str]) -> int:
    from advmoe.progress import tell
    from advmoe.report.figures import require_matplotlib
    from advmoe.studies.session import run_study
    from advmoe.studies.tables import text
    from advmoe.studies.task_pool import MachineFailed

    require_matplotlib()
    if not options.engine.local:
        tell(f"tasks print into {options.root / 'logs'}; how far they are: {to_run(*argv, '--status')}", "task")
    home, content = run_study(name, options, _told)
    print("\n".join(wrapped(content["size"])), end="\n\n")
    for shown in content["tables"]:
        print(f"{text(shown)}\n")
    for claim in content["claims"]:
        print("\n".join(wrapped(claim["statement"])))
        for each in claim["verdicts"]:
            p = "" if each["p_value"] is None else f" (p = {each['p_value']:.3g})"
            these = f"; these models: {models['verdict']}" if (models := each.get("these_models")) else ""
            print(f"  {each['measure']}: {each['verdict']} at this size{p}{these}")
    for note in content["notes"]:
        print("\n".join(wrapped(note)))
    bad = [run for run in content["runs"] if run["status"] != "finished"]
    for each in bad:
        print(f"{each['status']}: {each['name']}, seed {each['seed']}: {each['error'] or 'not done'}")
    print(f"\nwritten to {home / 'study.json'}")
    print(f"next  {to_run('report', home, '-o', home / 'report.html', plugins_of=argv)}")
    if failed := next((each["error"] for each in bad if isinstance(each["error"], MachineFailed)), None):
        return fail(f"{failed}; what is finished is kept; to continue: {to_run(*argv)}", FAILED)
    return 1 if bad else 0


def described(task: Any) -> str:
    """A task in words."""
    return f"{_called(task)}  {getattr(task, 'run', task).key}"


def _called(task: Any) -> str:
    from advmoe.studies.plan import kind_of

    run = getattr(task, "run", task)
    return f"{kind_of(task):8}  {run.name}, seed {run.seed}"


def _told(step: Any, task: Any) -> None:
    """Tell that a task starts, or how it ended, what it came to, and how much is left."""
    from advmoe.progress import tell
    from advmoe.studies.brief import brief
    from advmoe.studies.plan import kind_of

    run, state = getattr(task, "run", task), step if step in ("starts", "queued", "done") else "failed"
    fields = {"state": state, "kind": kind_of(task), "name": run.name, "seed": run.seed, "key": run.key}
    if state in ("starts", "queued"):
        tell(f"{state}  {described(task)}", "task", **fields)
        return
    if state == "failed":
        words, event = [f"failed: {step}", described(task)], "failed"
    else:
        words, event = ["done  ", _called(task), brief(task)], "task"
    for name in ("seconds", "seconds_left"):
        fields[name] = None if (value := getattr(step, name)) is None else round(value, 1)
    words.append("" if step.seconds is None else duration(step.seconds))
    about = f", about {duration(step.seconds_left)}" if step.seconds_left else ""
    words.append(f"{step.left} left{about}" if step.left else "")
    tell("  ".join(filter(None, words)), event, **fields, left=step.left)

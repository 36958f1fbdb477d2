"""`advmoe train`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from advmoe.cli.arguments import (
    Parser,
    add_engine,
    add_fields,
    config_fields,
    continuable,
    engine_options,
    existing_run,
    fail,
    new_parser,
    number,
    to_run,
)
from advmoe.cli.sbatch import LEAST_HOURS, NOTICE, Job, script, without
from advmoe.config import OWN_MODEL, Config, Hours, Processes, is_source, merged, read_yaml, require
from advmoe.errors import InputError
from advmoe.evaluation.targets import home_of
from advmoe.files import read_object, require_writable, write_text
from advmoe.recipes import recipe, recipe_names
from advmoe.rundir import CONFIG, MANIFEST, METRICS, Epochs
from advmoe.tables import DATASETS
from advmoe.text import as_option, nearest
from advmoe.training.launchers import rank
from advmoe.training.leftovers import START_ANEW, begun, startable


def parser() -> Parser:
    """The command's options."""
    parser = new_parser("Train a model, or continue a run.")
    add = parser.add_argument
    add(
        "--config",
        metavar="RECIPE|YAML",
        help="a recipe by name (see `advmoe recipes`) or a YAML file (default: folder-advmoe for --data.root FOLDER)",
    )
    add("--run-dir", metavar="DIR", help="where the run is kept (default: runs/<recipe or file>-<seed>)")
    add("--resume", metavar="RUN", help="continue the run in this directory")
    add("--print_config", action="store_true", help="print the resolved configuration and stop")
    usual = "1, the resumed run's, or those that torchrun or srun started"
    add("--devices", metavar="K", help=f"processes on a machine, each with a device of its own (default: {usual})")
    add("--num-nodes", metavar="N", help="checked where torchrun or srun starts the processes, as --devices is there")
    add("--max-hours", metavar="H", help="stop after H hours with exit code 85; --resume goes on from there")
    add("--sbatch", metavar="FILE", help="train nothing here: write a script for SLURM, which requeues itself")
    add("--tensorboard", action="store_true", help="show every epoch in RUN/tensorboard too (extra tensorboard)")
    add_engine(parser)
    add_fields(parser, dict.fromkeys(get_type_hints(Config)), defaults=True)
    add("--model", dest="model.source", metavar="FILE.py:FACTORY", help="short for --model.source")
    add("--to-moe", dest="model.to_moe", nargs="?", const="true", metavar="true", help="short for --model.to_moe true")
    return parser


def run(args: dict[str, Any], argv: list[str]) -> int:
    """Run the command on its parsed options; returns the exit code."""
    overrides, resumed = config_fields(args), args.get("resume")
    model = overrides.get("model", {})
    engine = engine_options(args) | {"tensorboard": "tensorboard" in args}
    for name in ("devices", "num_nodes"):
        engine[name] = number(as_option(name), Processes, args.get(name))
    engine["max_hours"] = number("--max-hours", Hours, args.get("max_hours"))
    first = rank() == 0
    name, run_dir, config = _continued(args, overrides) if resumed is not None else _new(args, overrides)
    if "print_config" in args:
        print(config.to_yaml(), end="")
        return 0
    if resumed is None and first:
        config.require_trainable()
        rule = "new or empty (--resume continues a run, --run-dir names another place)"
        require(startable(run_dir), "the run directory", rule, str(run_dir))
    named = model.get("source", config.model.source)
    own = ["--model", named] if named is not None else []
    learns = _taught_by(config, overrides.get("training", {}) if resumed is not None else {})
    again = to_run("train", "--resume", run_dir, *own, *learns, plugins_of=argv)
    if "sbatch" in args:
        begin = to_run(*without(argv, "--sbatch", "--max-hours", "--run-dir"), "--run-dir", run_dir)
        if resumed is not None:  # with the options of this command, whenever it runs
            begin = again = to_run(*without(argv, "--sbatch", "--max-hours"))
            require((run_dir / MANIFEST).is_file(), "--resume", f"a run that holds {MANIFEST}", str(run_dir))
            engine["accelerator"] = args.get("accelerator", read_object(run_dir / MANIFEST).get("accelerator", "auto"))
        return _write_script(Path(args["sbatch"]), run_dir, engine, begin, again)
    with continuable(run_dir, again, CONFIG):
        from advmoe.training import run as runs
        from advmoe.training.preemption import REQUEUE, Stopped
        from advmoe.training.trainer import TrainingDiverged

        try:
            if resumed is None:
                command = ["advmoe", *argv]
                changed = (f"{group}.{field}" for group, fields in overrides.items() for field in fields)
                told: dict[str, Any] = {"name": name, "command": command}
                if notes := config.notes(changed):
                    told["notes"] = notes
                runs.train(config, run_dir=run_dir, **told, **engine)
            else:
                if "accelerator" not in args:
                    del engine["accelerator"]  # the run's own
                runs.resume(run_dir, source=model.get("source"), **overrides.get("training", {}), **engine)
        except TrainingDiverged as error:
            return fail(error, 1)
        except Stopped as error:
            return fail(f"{error}; to continue: {again}", REQUEUE) if first else REQUEUE
    if not first:
        return 0
    for line in _unused(run_dir / METRICS):
        print(line)
    print(f"run   {run_dir}\nnext  {to_run('evaluate', run_dir, *own, plugins_of=argv)}")
    return 0


def _taught_by(config: Config, moved: Mapping[str, Any]) -> list[str]:
    """The words that a command to continue needs of a teacher: where it was named on resuming, and code always."""
    named = config.training.teacher
    words = {"teacher": named} if named is not None and is_source(named) else {}
    words |= {name: moved[name] for name in ("teacher", "teacher_weights") if name in moved}
    return [word for name, value in words.items() for word in (f"--training.{name}", value)]


def _write_script(file: Path, run_dir: Path, engine: dict[str, Any], begin: str, again: str) -> int:
    """Write the script for SLURM that begins by one command line and goes on by the other; the exit code."""
    require(not file.exists(), "--sbatch", "a file that is not there yet", str(file))
    require(file.parent.is_dir(), "--sbatch", "in a directory that exists", str(file))
    require_writable("--sbatch", file.parent)
    nodes, tasks, hours = engine["num_nodes"] or 1, engine["devices"] or 1, engine["max_hours"]
    rule = f">= {LEAST_HOURS} with --sbatch (SLURM's signal comes {NOTICE} s before the end)"
    require(hours is None or hours >= LEAST_HOURS, "--max-hours", rule, hours)
    job = Job(run_dir, nodes, tasks, engine["accelerator"] != "cpu", engine["threads"], hours)
    write_text(file, script(job, begin, again))
    print(f"written to {file}\nnext  sbatch {shlex.quote(str(file))}")
    return 0


def _continued(args: dict[str, Any], overrides: dict[str, Any]) -> tuple[str, Path, Config]:
    """Of the run to be continued: its name, which it keeps, its directory and its configuration."""
    resumed, given = args["resume"], {(group, name) for group, fields in overrides.items() for name in fields}
    movable = {("model", "source"), ("training", "teacher"), ("training", "teacher_weights")}
    alone = given <= movable and "config" not in args and "run_dir" not in args
    require(alone, "--resume", "without --config, --run-dir and fields (a run keeps its own)", resumed)
    if begun(Path(resumed)) and not (Path(resumed) / CONFIG).is_file():
        raise InputError(
            f"--resume must be a run directory (one that holds a config.yaml), got {resumed!r}: {START_ANEW}"
        )
    run_dir = existing_run("--resume", resumed)
    return run_dir.name, run_dir, Config.load(run_dir / CONFIG)


def _new(args: dict[str, Any], overrides: dict[str, Any]) -> tuple[str, Path, Config]:
    """Of a new run: its name, its directory and its configuration."""
    model = overrides.get("model", {})
    name, values = config_source(args.get("config"), overrides)
    config = Config.from_dict(merged(values, overrides))
    for field in OWN_MODEL if config.model.source is not None else ():
        require(field not in model, f"model.{field}", "left out with a network of your own (--model)", model.get(field))
    return name, Path(args.get("run_dir", f"runs/{name}-{config.training.seed}")), config


def _unused(metrics: Path) -> list[str]:
    """What to say of experts that got no image in the last epoch: such a model has fewer of them than it seems."""
    lines = Epochs.read(metrics).lines
    layers = lines[-1].get("layers", []) if lines else []
    dead = {each["layer"]: each["dead_experts"] for each in layers if each["dead_experts"]}
    if not dead:
        return []
    named = ", ".join(f"layer {layer}: {' '.join(map(str, experts))}" for layer, experts in dead.items())
    return [f"note  experts chosen for no image in the last epoch, in {len(dead)} of {len(layers)} layers ({named})"]


def config_source(text: str | None, overrides: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the fields of `--config`: a recipe's, or a YAML file's; where there is none, those of the recipe of
    the data set that `overrides` name, and none to train a network of the user's own.
    """
    names, own, data = recipe_names(), overrides.get("model", {}).get("source"), overrides.get("data", {})
    prefix = f"{home_of(own).name}-" if own is not None else ""
    usual = f"{data.get('name', 'folder')}-advmoe"
    if text is None and own is not None:
        return prefix.removesuffix("-"), {}
    if text is None and data.keys() & {"name", "root"} and usual in names:
        text = usual
    if text in names:
        return prefix + text, recipe(text)
    if text is not None and Path(text).is_file():
        return prefix + Path(text).stem, read_yaml(text)
    if text is None and "name" in data:
        DATASETS.require("data.name", data["name"])
    got = f"{text!r}{nearest(text, names)}"
    if text is None:
        got = "nothing (nor --data.root FOLDER, to train on a folder of pictures)"
    raise InputError(f"--config must be a YAML file or a recipe (see `advmoe recipes`), got {got}")

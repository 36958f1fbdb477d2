"""A run: a directory that training fills, from its start or from its last checkpoint, in one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from advmoe.config import (
    Accelerator,
    Config,
    Hours,
    Processes,
    Threads,
    file_digest,
    is_source,
    require,
    require_path,
    typed,
)
from advmoe.data import Dataset, load_dataset
from advmoe.errors import InputError
from advmoe.files import checksum, require_writable
from advmoe.locks import hold
from advmoe.models import save_model
from advmoe.models.compute import compute_on
from advmoe.models.convert import ConvertedClassifier
from advmoe.models.sources import file_of
from advmoe.pool import threads_set
from advmoe.precision import deterministic
from advmoe.progress import shown
from advmoe.rundir import (
    BEST,
    BOARD,
    CONFIG,
    CONFIG_DIGEST,
    DRAWN_FROM,
    LAST,
    MANIFEST,
    config_note,
    digest_at,
    require_plain,
    require_same_images,
)
from advmoe.training import checkpoint as checkpoints
from advmoe.training import manifest as manifests
from advmoe.training.board import Board, require_tensorboard
from advmoe.training.launch import Engine, launch
from advmoe.training.launchers import launched, rank
from advmoe.training.leftovers import START_ANEW, begun, clear, startable
from advmoe.training.loop import fit
from advmoe.training.model import build_model
from advmoe.training.preemption import AfterEpoch, Requests
from advmoe.training.teacher import load_teacher
from advmoe.training.trainer import Trainer, TrainingDiverged

TEACHER = "teacher_sha256"
"""The teacher's digest in a manifest."""


@dataclass(frozen=True)
class _Launch:
    """What each process of a run starts from."""

    config: Config
    run_dir: Path
    name: str
    devices: int
    accelerator: str
    threads: int | None
    command: list[str] | None
    fresh: bool
    tensorboard: bool
    notes: Sequence[str] = ()
    """Lines to print once the run can begin."""
    max_hours: float | None = None
    after_epoch: AfterEpoch | None = None
    begun: float = field(default_factory=time.monotonic)
    """When the command began, of `time.monotonic`."""

    def resumed(self) -> bool:
        """Whether the weights come from a checkpoint of the run itself."""
        return not self.fresh and bool(checkpoints.candidates(self.run_dir / LAST))


def _process(fabric: Fabric, launch: _Launch, threads: int) -> None:
    """One process of a run; the first shows how far it is."""
    same = deterministic(launch.config.training.deterministic)
    with threads_set(threads), same, shown(fabric.is_global_zero), ExitStack() as alone:
        _train(fabric, launch, alone)


def _train(fabric: Fabric, launch: _Launch, alone: ExitStack) -> None:
    """Train in one process. The directory is made once data and model are known to be good; while `alone` is open no
    other run fills it.
    """
    config, folder = launch.config, launch.run_dir
    compute_on(fabric.device, config.training.compute, config.model.num_experts)  # which refuses what cannot be had
    if fabric.is_global_zero and not launch.fresh:
        _claim(folder, alone)
    dataset = load_data(config)
    if not launch.fresh:
        require_same_images(folder, dataset.drawn_from)
    if dataset.chosen_size is not None:  # whatever pictures are added later
        config = replace(config, data=replace(config.data, image_size=dataset.chosen_size))
        launch = replace(launch, config=config)
    _require_shares(config, dataset, fabric.world_size)
    model = build_model(config, dataset, resumed=launch.resumed())
    trainer = Trainer(config, model, dataset, fabric)
    described = _described(fabric, launch, dataset)
    if trainer.teacher is not None:
        described[TEACHER] = trainer.teacher.digest
    if fabric.is_global_zero and launch.fresh:
        if isinstance(model, ConvertedClassifier):
            print(model.conversion)
        for line in (*launch.notes, *_notes(config, len(dataset.train))):
            print(f"note  {line}")
        _claim(folder, alone)
        _require_empty(folder)
        clear(folder)
        manifests.write(folder, described | {"accelerator": launch.accelerator})
        config.dump(folder / CONFIG)
    fabric.barrier()
    manifest = manifests.read(folder)
    if manifest.get(TEACHER) != described.get(TEACHER):
        was, now = (str(each.get(TEACHER))[:16] for each in (manifest, described))
        raise InputError(f"training.teacher must be what the run began with (SHA-256 {was}), got {now}")
    began_with = manifest.get("source_sha256")
    if fabric.is_global_zero and began_with is not None and began_with != described["source_sha256"]:
        print(f"note  the code of {config.model.source} is not what the run began with")
    if fabric.is_global_zero and (note := config_note(folder, file_digest(folder / CONFIG))) is not None:
        print(f"note  {note}")
    board = Board(folder) if launch.tensorboard and fabric.is_global_zero else None
    try:
        fit(trainer, folder, manifest, board, None if launch.fresh else described, _requests(launch))
    except TrainingDiverged as error:  # on every process
        started_from = not checkpoints.candidates(folder / BEST)
        if fabric.is_global_zero:
            manifests.write(folder, manifests.read(folder) | {"diverged": str(error)})
            if started_from:
                save_model(build_model(config, dataset), folder)
        fabric.barrier()
        raise (TrainingDiverged(f"{error}; what it started from is kept") if started_from else error) from None


def _requests(launch: _Launch) -> Requests:
    minutes, hours = launch.config.training.checkpoint_minutes, launch.max_hours
    deadline = math.inf if hours is None else launch.begun + 3600 * hours
    return Requests(60 * minutes if minutes else math.inf, deadline, launch.after_epoch)


def _described(fabric: Fabric, launch: _Launch, dataset: Dataset) -> dict[str, Any]:
    """The manifest of this process, with digests of the run's settings and of what they name."""
    config = launch.config
    described = manifests.describe(
        name=launch.name, seed=config.training.seed, device=fabric.device, devices=fabric.world_size,
        command=launch.command,
    )  # fmt: skip
    described[CONFIG_DIGEST] = config.digest()
    if config.model.kind == "moe":
        described["compute"] = compute_on(fabric.device, config.training.compute, config.model.num_experts)
    if config.training.compile:
        described["compiled"] = "whole passes" if described.get("compute", "masked") == "masked" else "pieces"
    if dataset.notes:
        described["data_notes"] = list(dataset.notes)
    if dataset.drawn_from is not None:
        described[DRAWN_FROM] = dataset.drawn_from._asdict()
    if config.training.init_from is not None and launch.fresh:
        described["init_from_sha256"] = digest_at(Path(config.training.init_from))
    if config.model.source is not None:
        described["source_sha256"] = checksum(file_of(config.model.source))
    return described


def _claim(folder: Path, alone: ExitStack) -> None:
    """Make `folder` this process's, as long as `alone` is open. Raises `ValueError` where another one has it."""
    lock = hold(folder.resolve(), folder=True)  # which the user may name by a link
    if lock is None:
        raise InputError(f"run_dir must be free of other processes, got {str(folder)!r}: one is training there")
    alone.callback(lock.close)
    for left in folder.glob(".*.partial"):  # by a process that was killed
        if left.is_file():
            left.unlink()


def _require_empty(folder: Path) -> None:
    if not startable(folder):
        rule = "new, empty, or begun by a training that was killed before its first checkpoint"
        raise InputError(f"run_dir must be {rule} (continue a run with --resume), got {str(folder)!r}")


def _require_shares(config: Config, dataset: Dataset, devices: int) -> None:
    """Raise `ValueError` where the images make no batches of equal shares, of two images a process at least."""
    size = min(config.training.batch_size, len(dataset.train))
    if size % devices or size // devices < 2:
        rule = f"make batches that {devices} processes share equally, of >= 2 images each"
        raise InputError(
            f"the training images (data.train_examples, data.val_fraction) must {rule}, got {size} a batch"
        )


def _notes(config: Config, images: int) -> list[str]:
    """What the settings come to with so many training `images`, where that may surprise."""
    t, lines = config.training, list[str]()
    if t.batch_size > images:
        lines.append(f"training.batch_size {t.batch_size} is more than the training images: batches are of {images}")
    total = t.epochs * (images // min(t.batch_size, images))
    if max(level.every for level in t.levels()) >= total:
        lines.append(f"training.alternation {t.alternation} trains the routers once: the run has {total} iterations")
    return lines


def load_data(config: Config) -> Dataset:
    """The data set that a configuration trains on, split by `training.seed`, on the CPU. Raises `ValueError` for what
    cannot be read.
    """
    data = config.data
    return load_dataset(
        data.name,
        root=data.root,
        download=data.download,
        image_size=data.image_size,
        val_fraction=data.val_fraction,
        train_examples=data.train_examples,
        workers=data.workers,
        seed=config.training.seed,
    )


def _processes(devices: int | None, num_nodes: int | None) -> int | None:
    """How many processes the run has in all: those that a launcher started, or those asked for, if any. Raises
    `InputError` where these differ.
    """
    member = launched()
    if member is None:
        if num_nodes not in (None, 1):
            raise InputError(f"num_nodes must be 1 where neither torchrun nor srun starts processes, got {num_nodes!r}")
        return devices
    for name, asked, there in (("devices", devices, member.local_world), ("num_nodes", num_nodes, member.nodes)):
        if asked not in (None, there):
            raise InputError(f"{name} must be left out, or {there} as {member.launcher} has it, got {asked!r}")
    return member.world


def _start(run: _Launch) -> Path:
    devices, batch_size, member = run.devices, run.config.training.batch_size, launched()
    # Two images a process at least: the routers' batch norms need a batch.
    if devices < 1 or batch_size % devices or batch_size // devices < 2:
        raise InputError(f"devices must divide training.batch_size={batch_size} into shares of >= 2, got {devices!r}")
    present, here = torch.cuda.device_count(), devices if member is None else member.local_world
    if present < here and (run.accelerator == "cuda" or (run.accelerator == "auto" and present)):
        require(present > 0, "accelerator", "cpu or auto, as there is no CUDA device", run.accelerator)
        rule = f"<= the {present} CUDA devices present (or go with --accelerator cpu)"
        raise InputError(f"devices must be {rule}, got {here!r}")
    require_writable("run_dir", run.run_dir)
    if devices > 1 and member is None:
        # Here first, so that bad input is one line from one process and a first decode or download happens once.
        with shown():
            build_model(run.config, dataset := load_data(run.config), resumed=run.resumed())
            if run.config.training.teacher is not None:
                load_teacher(run.config.training, dataset)
    threads = run.threads or max(1, torch.get_num_threads() // here)
    launch(
        partial(_process, launch=run, threads=threads),
        Engine(run.accelerator, devices, run.config.training.precision),
    )
    return run.run_dir


def train(
    config: Config,
    *,
    run_dir: str | Path,
    name: str = "run",
    devices: int | None = None,
    num_nodes: int | None = None,
    accelerator: str = "auto",
    threads: int | None = None,
    max_hours: float | None = None,
    command: list[str] | None = None,
    tensorboard: bool = False,
    notes: Sequence[str] = (),
    after_epoch: AfterEpoch | None = None,
) -> Path:
    """Train `config` from its start and fill `run_dir`, which must be new or empty.

    Args:
        name: the recipe's, for the manifest. command: what the user typed, likewise.
        devices: processes, one per device; they share each batch. By default one, or as many as torchrun or srun
            started: then every one of them calls this, and `devices` (of one node) and `num_nodes` only check that.
        accelerator: `auto`, `cpu` or `cuda`.
        threads: CPU threads per process; by default what PyTorch has, shared among them.
        max_hours: stop after these, at the end of an iteration.
        tensorboard: show every epoch in `run_dir/tensorboard` too (extra `tensorboard`): the scalars of
            `metrics.jsonl`, and a few validation images, clean and adversarial.
        notes: lines to be printed once data and model are known to be good.
        after_epoch: called with each epoch's entry of `metrics.jsonl`; a reason that it returns ends the run there.

    Returns `run_dir`. Raises `ValueError` before anything is created for input that cannot be used, `TrainingDiverged`
    for a NaN or infinite loss, `Stopped` where a signal (SIGTERM, SIGUSR1), `max_hours` or `after_epoch` ended it, once
    all is kept.
    """
    run_dir = Path(run_dir)
    require_path("run_dir", str(run_dir))
    if not isinstance(config, Config):
        raise InputError(f"config must be a Config (advmoe.recipe makes one), got a {type(config).__name__}")
    config = config.checked()
    config.require_trainable()
    _require_engine(devices, num_nodes, accelerator, threads, max_hours)
    devices = _processes(devices, num_nodes) or 1
    if rank() == 0:
        _require_empty(run_dir)
    if tensorboard:
        require_tensorboard()
    return _start(
        _Launch(
            config, run_dir, name, devices, accelerator, threads, command, fresh=True, tensorboard=tensorboard,
            notes=notes, max_hours=max_hours, after_epoch=after_epoch,
        )
    )  # fmt: skip


def _require_engine(
    devices: int | None, num_nodes: int | None, accelerator: str | None, threads: int | None, max_hours: float | None
) -> None:
    """Raise `ValueError` for what says where and how long to compute, and cannot be."""
    typed("devices", Processes | None, devices)
    typed("num_nodes", Processes | None, num_nodes)
    typed("accelerator", Accelerator | None, accelerator)
    typed("threads", Threads | None, threads)
    typed("max_hours", Hours | None, max_hours)


def _take_teacher(config: Config, given: str | None, weights: str | None) -> None:
    """Have `config`, of a run to be resumed, name the teacher that was `given`, if one was or must be, and where its
    `weights` lie by now.
    """
    named = config.training.teacher
    if named is None and given is not None:
        raise InputError(f"training.teacher must be left out for a run without a teacher, got {given!r}")
    if named is not None and given is None and is_source(named):
        raise InputError(f"training.teacher must be given again for {named} (code is never run unasked), got nothing")
    config.training.teacher = given or named
    if weights is not None:
        rule = "left out for a run whose teacher has no file of weights"
        require(config.training.teacher_weights is not None, "training.teacher_weights", rule, weights)
        config.training.teacher_weights = weights


def resume(
    run_dir: str | Path,
    *,
    source: str | None = None,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    accelerator: str | None = None,
    threads: int | None = None,
    max_hours: float | None = None,
    tensorboard: bool = False,
    after_epoch: AfterEpoch | None = None,
) -> Path:
    """Continue the run in `run_dir` from its last sound checkpoint, by default with the accelerator, processes and
    threads that it began with.

    `source` is the `FILE.py:FACTORY` of a run that trains a network of the user's own: what the run names is never
    executed. So it is with the `teacher` of a run that learns from the user's own network; any may be given that lies
    elsewhere by now, and so may the file of its weights. What `run_dir/tensorboard` shows goes on, or with
    `tensorboard` begins (see `train`). On CPU the weights end bit-identical to those of a run that was never
    interrupted. Returns `run_dir`.
    Raises `ValueError` for a directory that holds no run, or only damaged checkpoints.
    """
    _require_engine(devices, num_nodes, accelerator, threads, max_hours)
    run_dir = Path(run_dir)
    require_plain(run_dir)
    for name in (CONFIG, MANIFEST):
        if not (run_dir / name).is_file():
            if begun(run_dir):
                raise InputError(f"a run to resume must hold {name}, got {str(run_dir)!r}: {START_ANEW}")
            raise InputError(f"a run to resume must hold {name}, got {str(run_dir)!r}")
    config, manifest = Config.load(run_dir / CONFIG), manifests.read(run_dir)
    if (config.model.source is None) != (source is None):
        rule = "left out for a run of a model of advmoe's own"
        if source is None:
            rule = f"given again for a run of {config.model.source} (code is never run unasked)"
        raise InputError(f"--model FILE.py:FACTORY must be {rule}, got {source or 'nothing'}")
    config.model.source = source
    _take_teacher(config, teacher, teacher_weights)
    devices = _processes(devices, num_nodes) or manifest["devices"]
    threads = threads or manifest["threads"]
    accelerator = accelerator or manifest.get("accelerator") or "auto"
    if tensorboard := tensorboard or (run_dir / BOARD).is_dir():
        require_tensorboard()
    name, command = manifest["name"], manifest["command"]
    return _start(
        _Launch(
            config,
            run_dir,
            name,
            devices,
            accelerator,
            threads,
            command,
            fresh=False,
            tensorboard=tensorboard,
            max_hours=max_hours,
            after_epoch=after_epoch,
        )
    )

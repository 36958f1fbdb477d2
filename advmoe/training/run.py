"""A run: a directory that training fills, from its start or from its last checkpoint, in one process or several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from advmoe.config import Config, require_path
from advmoe.data import Dataset, load_dataset
from advmoe.errors import InputError
from advmoe.files import checksum, require_writable
from advmoe.locks import hold
from advmoe.models import save_model
from advmoe.models.convert import ConvertedClassifier
from advmoe.models.sources import file_of
from advmoe.pool import threads_set
from advmoe.progress import BRIEF, bar, shown, tell
from advmoe.pruning import write_masks
from advmoe.rundir import (
    BEST,
    BOARD,
    CONFIG,
    CONFIG_DIGEST,
    LAST,
    MANIFEST,
    METRICS,
    Epochs,
    config_note,
    digest_at,
    require_plain,
)
from advmoe.tables import METHODS
from advmoe.text import one_line
from advmoe.training import checkpoint as checkpoints
from advmoe.training import manifest as manifests
from advmoe.training.board import Board, examples, require_tensorboard
from advmoe.training.launch import Engine, launch
from advmoe.training.leftovers import START_ANEW, begun, clear, startable
from advmoe.training.phases import Phase, enter, leave, phase_at, phases
from advmoe.training.schedule import batches, cosine
from advmoe.training.trainer import Trainer, TrainingDiverged, build_model


def fit(
    trainer: Trainer,
    run_dir: Path,
    manifest: dict[str, Any],
    board: Board | None = None,
    resumption: dict[str, Any] | None = None,
) -> None:
    """Train from the last checkpoint in `run_dir`, or from the start, to the end; write metrics, checkpoints and the
    model, and show every epoch on `board`.

    What `resumption` tells of this process is noted in the manifest, unless nothing is left to do. A phase's successor
    starts from the best checkpoint of it, and is what `last` holds once it is over.
    """
    run, plan = trainer, phases(trainer.config)
    fabric, t = run.fabric, run.config.training
    phase, trainer, progress = _begin(run, plan, run_dir, board)
    epochs, iterations = plan[-1].end, len(batches(len(run.train_set), t.batch_size, seed=t.seed, epoch=0))
    if resumption is not None and progress["epoch"] < epochs:
        other = _differing(manifest, resumption)
        if fabric.is_global_zero and progress["epoch"] and other is not None:
            rule = "the weights need not be those, bit by bit, of a run that was never interrupted"
            print(f"note  the run goes on with other {other}: {rule}", flush=True)
        manifest = _noted(manifest, resumption)
        if fabric.is_global_zero:
            manifests.write(run_dir, manifest)
    with bar("train", epochs * iterations, unit="it", done=progress["epoch"] * iterations) as drawn:
        for epoch in range(progress["epoch"], epochs):
            started = time.perf_counter()
            drawn.set_description(f"{f'{phase.name}, ' if phase.name else ''}epoch {epoch + 1}/{epochs}")
            with _named(phase):
                trainer.train_epoch(epoch - phase.first, drawn)
            seconds = time.perf_counter() - started
            with _named(phase), shown(fabric.is_global_zero, delay=BRIEF):
                measured = _measured(trainer, epoch)
            line = _epoch_line(trainer, phase, epoch, seconds, iterations, measured)
            score = _score(t.method, measured)
            known = progress["best"]
            better = known is None or score is None or score >= known["score"]
            progress = {
                "epoch": epoch + 1,
                "best": {"epoch": epoch + 1, "score": score, "val": measured} if better else known,
                "wall_seconds": progress["wall_seconds"] + time.perf_counter() - started,
            }
            if fabric.is_global_zero:
                _log(trainer, run_dir, line, board)
                if better:
                    _keep_best(trainer, run_dir, progress)
            if epoch + 1 == phase.end < epochs:
                fabric.barrier()
                best = checkpoints.load_latest(run_dir / BEST) or checkpoints.load(run_dir / BEST)
                leave(phase, trainer, run, best.weights)
                phase = phase_at(plan, epoch + 1)
                trainer = enter(phase, run)
                progress["best"] = None
            if fabric.is_global_zero:
                checkpoints.save(run_dir / LAST, trainer.state(progress))
            fabric.barrier()
    if fabric.is_global_zero:
        _finish(trainer, run_dir, manifest, progress)


def _log(trainer: Trainer, run_dir: Path, line: dict[str, Any], board: Board | None) -> None:
    """Tell of an epoch in `metrics.jsonl` and on the board."""
    known = Epochs.read(run_dir / METRICS)
    Epochs([*known.lines, line]).write(run_dir / METRICS)
    if board is not None:
        board.write(line, examples(trainer))


def _keep_best(trainer: Trainer, run_dir: Path, progress: dict[str, Any]) -> None:
    """Write the weights that were measured, as the best checkpoint and as the run's model."""
    with trainer.averaged():
        checkpoints.save(run_dir / BEST, replace(trainer.state(progress), more={}), keep_previous=False)
        save_model(trainer.as_saved(), run_dir)


def _begin(
    run: Trainer, plan: tuple[Phase, ...], run_dir: Path, board: Board | None
) -> tuple[Phase, Trainer, dict[str, Any]]:
    """The phase under way, its trainer, and how far it is: as the last checkpoint has it, or at the start."""
    found = checkpoints.load_latest(run_dir / LAST)
    start: dict[str, Any] = {"epoch": 0, "best": None, "wall_seconds": 0.0}
    progress = start if found is None else found.progress
    phase = phase_at(plan, progress["epoch"])
    trainer = enter(phase, run)
    if found is not None:
        try:
            trainer.restore(found)
        except (RuntimeError, ValueError) as error:
            rule = "hold weights of the model that its config.yaml, and --model, describe"
            raise InputError(f"{run_dir / 'last'} must {rule}, got {one_line(error)}") from error
    if run.fabric.is_global_zero:
        logged = Epochs.read(run_dir / METRICS).upto(progress["epoch"])
        for problem in logged.problems:
            tell(f"note  {problem}")
        if (run_dir / METRICS).exists():
            logged.write(run_dir / METRICS)
        if board is not None:
            board.follow(logged.lines)
    return phase, trainer, progress


@contextmanager
def _named(phase: Phase) -> Iterator[None]:
    """What diverges inside says in which phase."""
    try:
        yield
    except TrainingDiverged as error:
        raise (error if phase.name is None else TrainingDiverged(f"{phase.name}: {error}")) from None


def _measured(trainer: Trainer, epoch: int) -> dict[str, float] | None:
    """What `validate` finds after `epoch` (from 0); what diverged by then says so."""
    try:
        return trainer.validate()
    except TrainingDiverged as error:
        raise TrainingDiverged(f"after epoch {epoch + 1}: {error}") from None


def _score(method: str, measured: dict[str, float] | None) -> float | None:
    """What the best checkpoint is chosen by; None (the last one is best) without a validation split."""
    if measured is None:
        return None
    return measured["robust_accuracy" if METHODS[method].adversarial else "clean_accuracy"]


def _epoch_line(
    trainer: Trainer, phase: Phase, epoch: int, seconds: float, iterations: int, measured: dict[str, float] | None
) -> dict[str, Any]:
    t = trainer.config.training
    seen = sum(trainer.means.counts.values()) * trainer.fabric.world_size
    return {
        "epoch": epoch + 1,
        **({} if phase.name is None else {"phase": phase.name}),
        "lr": t.lr * cosine((epoch - phase.first) * iterations, t.epochs * iterations),
        "train": trainer.means.report(trainer.fabric),
        "val": measured,
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1),
        "layers": trainer.use.report(trainer.fabric),
    }


def _finish(trainer: Trainer, run_dir: Path, manifest: dict[str, Any], progress: dict[str, Any]) -> None:
    best = checkpoints.load_latest(run_dir / BEST)
    if best is not None:
        trainer.load(best.weights)
    save_model(model := trainer.as_saved(), run_dir)
    if model.spec["kind"] == "sparse":
        write_masks(model, run_dir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    sound = {name: value for name, value in manifest.items() if name != "diverged"}  # as it may have, earlier
    manifests.write(run_dir, {**sound, "finished": now, "wall_seconds": round(progress["wall_seconds"], 1)})


@dataclass(frozen=True)
class _Launch:
    """What each process of a run is told."""

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
    """What is said once the run can begin."""

    def resumed(self) -> bool:
        """Whether the weights come from a checkpoint of the run itself."""
        return not self.fresh and bool(checkpoints.candidates(self.run_dir / LAST))


def _process(fabric: Fabric, launch: _Launch, threads: int) -> None:
    """One process of a run, of which the first shows how far it is."""
    with threads_set(threads), shown(fabric.is_global_zero), ExitStack() as alone:
        _train(fabric, launch, alone)


def _train(fabric: Fabric, launch: _Launch, alone: ExitStack) -> None:
    """What each process does. The directory is made once data and model are known to be good; while `alone` is open
    no other run fills it.
    """
    config, folder = launch.config, launch.run_dir
    if fabric.is_global_zero and not launch.fresh:
        _claim(folder, alone)
    dataset = load_data(config)
    if dataset.chosen_size is not None:  # whatever pictures are added later
        config = replace(config, data=replace(config.data, image_size=dataset.chosen_size))
    _require_shares(config, dataset, fabric.world_size)
    model = build_model(config, dataset, resumed=launch.resumed())
    trainer = Trainer(config, model, dataset, fabric)
    described = manifests.describe(
        name=launch.name, seed=config.training.seed, device=fabric.device, devices=fabric.world_size,
        command=launch.command,
    )  # fmt: skip
    described[CONFIG_DIGEST] = config.digest()
    if dataset.notes:
        described["data_notes"] = list(dataset.notes)
    if config.training.init_from is not None and launch.fresh:
        described["init_from_sha256"] = digest_at(Path(config.training.init_from))
    if config.model.source is not None:
        described["source_sha256"] = checksum(file_of(config.model.source))
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
    began_with = manifest.get("source_sha256")
    if fabric.is_global_zero and began_with is not None and began_with != described["source_sha256"]:
        print(f"note  the code of {config.model.source} is not what the run began with")
    if fabric.is_global_zero and (note := config_note(folder, described[CONFIG_DIGEST])) is not None:
        print(f"note  {note}")
    board = Board(folder) if launch.tensorboard and fabric.is_global_zero else None
    try:
        fit(trainer, folder, manifest, board, None if launch.fresh else described)
    except TrainingDiverged as error:  # on every process
        started_from = not checkpoints.candidates(folder / BEST)
        if fabric.is_global_zero:
            manifests.write(folder, manifests.read(folder) | {"diverged": str(error)})
            if started_from:
                save_model(build_model(config, dataset), folder)
        fabric.barrier()
        raise (TrainingDiverged(f"{error}; what it started from is kept") if started_from else error) from None


def _claim(folder: Path, alone: ExitStack) -> None:
    """Make `folder` this process's, as long as `alone` is open. Raises `ValueError` where another one has it."""
    held = hold(folder.resolve(), folder=True)  # which the user may name by a link
    if held is None:
        raise InputError(f"run_dir must be free of other processes, got {str(folder)!r}: one is training there")
    alone.callback(held.close)
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
    """What the number of training images makes of the settings."""
    t, lines = config.training, list[str]()
    if t.batch_size > images:
        lines.append(f"training.batch_size {t.batch_size} is more than the training images: batches are of {images}")
    total = t.epochs * (images // min(t.batch_size, images))
    if max(level.every for level in t.levels()) > total:
        lines.append(f"training.alternation {t.alternation} trains the routers once: the run has {total} iterations")
    return lines


def _noted(manifest: dict[str, Any], resumption: dict[str, Any]) -> dict[str, Any]:
    """The manifest that tells what the run went on with, which may be other than what it began with."""
    machine = ("versions", "platform", "cpu", "device", "devices", "fp32", "threads", "kernels", "omp_wait_policy")
    names = (*machine, "git_commit", "source_sha256", "data_notes", CONFIG_DIGEST, "started")
    earlier = manifest.get("resumed") or []
    return manifest | {"resumed": [*earlier, {name: resumption[name] for name in names if name in resumption}]}


_TELLING = {
    "kernels": "kernels", "torch": "PyTorch", "advmoe": "advmoe", "git_commit": "code", "cpu": "CPU",
    "device": "device", "devices": "devices", "threads": "threads",
}  # fmt: skip
"""What the bits of a run's weights depend on besides its configuration, and what it is called."""


def _differing(manifest: dict[str, Any], resumption: dict[str, Any]) -> str | None:
    """What differs between how a run goes on and how it went so far, in words; None where nothing does."""

    def of(part: dict[str, Any], name: str) -> Any:
        return part.get("versions", {}).get(name) if name in ("torch", "advmoe") else part.get(name)

    found = []
    for name, called in _TELLING.items():
        now = of(resumption, name)
        before = [of(part, name) for part in (manifest, *(manifest.get("resumed") or []))]
        if other := [each for each in before if each != now]:
            found.append(f"{called} ({other[-1]}, now {now})")
    return ", ".join(found) or None


def load_data(config: Config) -> Dataset:
    """The images that `config` trains on. Raises `ValueError` for what cannot be read."""
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


def _start(wanted: _Launch) -> Path:
    devices, batch_size = wanted.devices, wanted.config.training.batch_size
    # Two images a process at least: the routers' batch norms need a batch.
    if devices < 1 or batch_size % devices or batch_size // devices < 2:
        raise InputError(f"devices must divide training.batch_size={batch_size} into shares of >= 2, got {devices!r}")
    present = torch.cuda.device_count()
    if present < devices and (wanted.accelerator == "cuda" or (wanted.accelerator == "auto" and present)):
        rule = f"<= the {present} CUDA devices present (or go with --accelerator cpu)"
        raise InputError(f"devices must be {rule}, got {devices!r}")
    require_writable("run_dir", wanted.run_dir)
    if devices > 1:
        # Here first, so that bad input is one line from one process and a first decode or download happens once.
        with shown():
            build_model(wanted.config, load_data(wanted.config), resumed=wanted.resumed())
    threads = wanted.threads or max(1, torch.get_num_threads() // devices)
    launch(
        partial(_process, launch=wanted, threads=threads),
        Engine(wanted.accelerator, devices, wanted.config.training.precision),
    )
    return wanted.run_dir


def train(
    config: Config,
    *,
    run_dir: str | Path,
    name: str = "run",
    devices: int = 1,
    accelerator: str = "auto",
    threads: int | None = None,
    command: list[str] | None = None,
    tensorboard: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Train `config` from its start and fill `run_dir`, which must be new or empty.

    Args:
        name: the recipe's, for the manifest. command: what the user typed, likewise.
        devices: processes, one per device; they share each batch. accelerator: `auto`, `cpu` or `cuda`.
        threads: CPU threads per process; by default what PyTorch has, shared among them.
        tensorboard: show every epoch in `run_dir/tensorboard` too (extra `tensorboard`): the scalars of
            `metrics.jsonl`, and a few validation images, clean and adversarial.
        notes: lines to be printed once data and model are known to be good.

    Returns `run_dir`. Raises `ValueError` before anything is created for input that cannot be used, `TrainingDiverged`
    for a NaN or infinite loss.
    """
    run_dir = Path(run_dir)
    require_path("run_dir", str(run_dir))
    config.require_trainable()
    _require_empty(run_dir)
    if tensorboard:
        require_tensorboard()
    given: dict[str, Any] = {"fresh": True, "tensorboard": tensorboard, "notes": notes}
    return _start(_Launch(config, run_dir, name, devices, accelerator, threads, command, **given))


def resume(
    run_dir: str | Path,
    *,
    source: str | None = None,
    devices: int | None = None,
    accelerator: str | None = None,
    threads: int | None = None,
    tensorboard: bool = False,
) -> Path:
    """Continue the run in `run_dir` from its last sound checkpoint, by default with the accelerator, processes and
    threads that it began with.

    `source` is the `FILE.py:FACTORY` of a run that trains a network of the user's own: what the run names is never
    executed. What `run_dir/tensorboard` shows goes on, or with `tensorboard` begins (see `train`). On CPU the weights
    end bit-identical to those of a run that was never interrupted. Returns `run_dir`.
    Raises `ValueError` for a directory that holds no run, or only damaged checkpoints.
    """
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
    devices, threads = devices or manifest["devices"], threads or manifest["threads"]
    accelerator = accelerator or manifest.get("accelerator") or "auto"
    if tensorboard := tensorboard or (run_dir / BOARD).is_dir():
        require_tensorboard()
    name, command = manifest["name"], manifest["command"]
    return _start(
        _Launch(config, run_dir, name, devices, accelerator, threads, command, fresh=False, tensorboard=tensorboard)
    )

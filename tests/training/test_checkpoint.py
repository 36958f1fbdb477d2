"""Checkpoints: written whole, verified when read, damage named."""

import json
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from advmoe.files import checksum
from advmoe.training import checkpoint as checkpoints
from advmoe.training.checkpoint import DamagedCheckpoint, TrainingState


def _checkpoint(value: float) -> TrainingState:
    parameter = torch.nn.Parameter(torch.full((3,), float(value)))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return TrainingState({"w": torch.full((2, 2), float(value))}, [optimizer.state_dict()], {"epoch": int(value)})


def test_round_trip_keeps_weights_optimizer_and_progress(tmp_path):
    checkpoints.save(tmp_path / "last", _checkpoint(3))
    state = checkpoints.load(tmp_path / "last")
    assert torch.equal(state.weights["w"], torch.full((2, 2), 3.0))
    assert state.progress == {"epoch": 3}
    assert torch.equal(state.optimizers[0]["state"][0]["momentum_buffer"], torch.ones(3))


def test_second_save_keeps_the_one_before(tmp_path):
    for value in (1, 2, 3):
        checkpoints.save(tmp_path / "last", _checkpoint(value))
    assert checkpoints.load(tmp_path / "last").progress["epoch"] == 3
    assert checkpoints.load(tmp_path / "last-previous").progress["epoch"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last-previous"]


def test_nothing_saved_is_none(tmp_path):
    assert checkpoints.load_latest(tmp_path / "last") is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path, name, damage):
    for value in (1, 2):
        checkpoints.save(tmp_path / "last", _checkpoint(value))
    path = tmp_path / "last" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoints.load(tmp_path / "last")
    with pytest.warns(UserWarning, match=f"{name}.*going on from last-previous"):
        latest = checkpoints.load_latest(tmp_path / "last")
    assert latest.progress["epoch"] == 1


def test_all_damaged_is_an_error_that_names_both(tmp_path):
    for value in (1, 2):
        checkpoints.save(tmp_path / "last", _checkpoint(value))
    for folder in ("last", "last-previous"):
        (tmp_path / folder / "checksums.json").write_text("{")
    with pytest.raises(DamagedCheckpoint, match=r"last/checksums.json.*last-previous/checksums.json"):
        checkpoints.load_latest(tmp_path / "last")


@contextmanager
def killed_after(renames):
    """Inside, the process seems to be killed when it renames a folder for the next time after so many."""
    real, done = Path.replace, []

    def replace(self, target):
        if self.is_dir():
            done.append(target)
            if len(done) > renames:
                raise KeyboardInterrupt
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        yield


@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_at_either_rename_leaves_a_sound_checkpoint(tmp_path, survived):
    checkpoints.save(tmp_path / "last", _checkpoint(1))
    with pytest.raises(KeyboardInterrupt), killed_after(survived):
        checkpoints.save(tmp_path / "last", _checkpoint(2))
    assert (tmp_path / "last").exists() == (survived == 0)
    assert checkpoints.load_latest(tmp_path / "last").progress["epoch"] == 1
    checkpoints.save(tmp_path / "last", _checkpoint(3))
    assert checkpoints.load_latest(tmp_path / "last").progress["epoch"] == 3


@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_after_a_damaged_checkpoint_leaves_the_sound_one(tmp_path, survived):
    for value in (1, 2):
        checkpoints.save(tmp_path / "last", _checkpoint(value))
    (tmp_path / "last" / "state.pt").write_bytes(b"damaged")
    with suppress(KeyboardInterrupt), killed_after(survived):  # there is one rename: the second case comes to its end
        checkpoints.save(tmp_path / "last", _checkpoint(3))
    assert checkpoints.load(tmp_path / "last-previous").progress["epoch"] == 1
    assert (tmp_path / "last").exists() == (survived == 1)


def test_opening_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    checkpoints.save(tmp_path / "last", _checkpoint(1))
    torch.save({"optimizers": [Evil()], "progress": {}}, tmp_path / "last" / "state.pt")
    sums = {name: checkpoints.checksum(tmp_path / "last" / name) for name in ("model.safetensors", "state.pt")}
    (tmp_path / "last" / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        checkpoints.load(tmp_path / "last")
    assert not (tmp_path / "owned").exists()


def test_checksums_that_are_no_object_are_damage(tmp_path):
    for value in (1, 2):
        checkpoints.save(tmp_path / "last", _checkpoint(value))
    (tmp_path / "last" / "checksums.json").write_text("[]")
    with pytest.warns(UserWarning, match=r"last/checksums\.json must hold a JSON object, got a list; going on"):
        latest = checkpoints.load_latest(tmp_path / "last")
    assert latest is not None and latest.progress == {"epoch": 1}


def _deflated(path):
    """The archive `path` compressed, as which some kilobytes can be gigabytes."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    "spoil",
    [
        _deflated,
        lambda path: path.write_bytes(b"PK"),
        lambda path: torch.save([1], path),
        lambda path: torch.save({}, path),
    ],
    ids=["compressed", "no archive", "a list", "empty"],
)
def test_a_state_that_only_its_checksum_vouches_for_is_named(tmp_path, spoil):
    checkpoints.save(tmp_path / "last", _checkpoint(3))
    state, sums = tmp_path / "last" / "state.pt", tmp_path / "last" / "checksums.json"
    spoil(state)
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {"state.pt": checksum(state)}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.pt must hold a state of training, got "):
        checkpoints.load(tmp_path / "last")

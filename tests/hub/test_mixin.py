"""The Hub's interface to a checkpoint; a folder stands in for the repository, so that no network is asked."""

import shutil
from pathlib import Path

import pytest
import torch

import advmoe
from advmoe.hub import mixin
from advmoe.hub.mixin import HubCheckpoint
from advmoe.models import create_model


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository; what the client downloads of it lies in a folder of its own."""
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=4, input_size=8)
    source = advmoe.save_pretrained(model, tmp_path / "repository")

    def download(name: str, *, allow_patterns: list[str], **options: object) -> str:
        assert name == str(source)
        cache = tmp_path / "cache"
        cache.mkdir()
        for file in allow_patterns:
            if (source / file).exists():
                shutil.copy(source / file, cache)
        return str(cache)

    monkeypatch.setattr(mixin, "snapshot_download", download)
    return source


def test_a_model_is_rebuilt_from_description_and_weights_alone(repository: Path, tmp_path: Path) -> None:
    HubCheckpoint.from_pretrained(repository).save_pretrained(tmp_path / "again")
    again, expected = (advmoe.from_pretrained(folder).state_dict() for folder in (tmp_path / "again", repository))
    assert all(torch.equal(value, expected[name]) for name, value in again.items())
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["model.json", "model.safetensors"]


def test_what_is_saved_by_the_client_is_a_checkpoint(repository: Path, tmp_path: Path) -> None:
    HubCheckpoint.from_pretrained(repository).save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["README.md", "config.json", "model.json", "model.safetensors"]
    assert (tmp_path / "again" / "model.json").read_bytes() == (repository / "model.json").read_bytes()


def test_damage_is_named_with_the_repository(repository: Path) -> None:
    (repository / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=rf"^{repository}: .*model\.safetensors"):
        HubCheckpoint.from_pretrained(repository)

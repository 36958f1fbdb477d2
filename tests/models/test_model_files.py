"""Model files rebuild a model bit for bit with nothing else, and damaged ones are named."""

import json
import shutil

import pytest
import torch

from advmoe import load_run
from advmoe.models import create_model, load_model, save_model


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=4, input_size=16, router="embedding", experts="independent")
    save_model(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "kwargs",
    [
        {"router": "layer", "num_experts": 3, "scale": 0.4},
        {"router": "image", "experts_init": "shared", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 1 / 3]},
        {"kind": "s-dense", "in_channels": 1},
    ],
    ids=str,
)
def test_round_trip_is_exact(tmp_path, kwargs):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=4, width=8, **kwargs).to(memory_format=torch.channels_last)
    x = torch.rand(8, model.spec["in_channels"], 16, 16)
    model(x)  # statistics of its own
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    save_model(model, tmp_path / "here")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["model.json", "model.safetensors"]
    for path in (tmp_path / "here").iterdir():
        shutil.move(path, tmp_path / "elsewhere")
    before = torch.get_rng_state()
    loaded = load_run(tmp_path / "elsewhere")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in loaded.modules())
    assert loaded.spec == model.spec
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def other_width(path):
    save_model(create_model("resnet18", num_classes=3, width=8, router="embedding", experts="independent"), path.parent)
    spec = json.loads((path.parent / "model.json").read_text())
    (path.parent / "model.json").write_text(json.dumps(spec | {"width": 4}))


DAMAGE = {
    "weights missing": ("model.safetensors", lambda path: path.unlink()),
    "weights empty": ("model.safetensors", lambda path: cut(path, 0)),
    "weights cut in the header": ("model.safetensors", lambda path: cut(path, 0.01)),
    "weights cut in the data": ("model.safetensors", lambda path: cut(path, 0.9)),
    "weights not safetensors": ("model.safetensors", lambda path: path.write_bytes(b"\x80\x04" * 500)),
    "weights of another shape": ("model.safetensors", other_width),
    "description missing": ("model.json", lambda path: path.unlink()),
    "description cut": ("model.json", lambda path: cut(path, 0.5)),
    "description no text": ("model.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "description a list": ("model.json", lambda path: path.write_text("[1, 2]")),
    "description of an unknown field": ("model.json", lambda path: path.write_text('{"name": "resnet18", "depth": 3}')),
    "description of an unknown backbone": (
        "model.json",
        lambda path: path.write_text(path.read_text().replace("resnet18", "resnet99")),
    ),
    "description out of range": ("model.json", lambda path: path.write_text(path.read_text().replace("0.5", "1.5"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(saved, damage):
    name, spoil = DAMAGE[damage]
    spoil(saved / name)
    with pytest.raises(ValueError) as error:
        load_model(saved)
    message = str(error.value)
    assert name in message and str(saved) in message and "\n" not in message

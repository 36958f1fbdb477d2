"""Model files rebuild a model bit for bit with nothing else, and damaged ones are named."""

import json
import shutil

import pytest
import torch
from torch import nn

from advmoe import load_run
from advmoe.models import create_model, load_model, save_model
from advmoe.models.modes import Undrawn


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
        {"router": "layer", "router_norm": "layer"},
        {"router": "embedding", "router_norm": "none"},
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16_384}, "model.safetensors must hold the weights that model.json describes, got "),  # > 100 GB
        ({"width": 20_000}, "model.width must be >= 1 and <= 16384, got 20000"),
        ({"name": "wrn-1000-1", "width": 8}, "model.safetensors must hold the weights that model.json describes, got "),
        ({"name": "wrn-600004-1"}, "model.name wrn-D-K must have D = 6n + 4 >= 10 and <= 1000, and K >= 1 and <= 100"),
        ({"name": "wrn-28-" + "9" * 5000}, "model.name must be one of resnet18, "),
        ({"num_experts": 1024, "experts": "independent"}, "model.safetensors must hold the weights that"),
        ({"num_experts": 10**6}, "model.num_experts must be >= 1 and <= 1024, got 1000000"),
        ({"num_classes": 10**6}, "got other shapes: backbone.classifier.weight (3, 16) for (1000000, 16)"),
        ({"num_classes": 10**9}, "num_classes must be >= 2 and <= 1000000, got 1000000000"),
        ({"input_size": 10**6}, "input_size must be >= 8 and <= 4096, got 1000000"),
        ({"in_channels": 10**9}, "in_channels must be >= 1 and <= 4096, got 1000000000"),
        ({"router": "embedding", "width": 16_384}, "model.safetensors must hold the weights that"),
        ({"mean": [float("1e400")] * 3}, "model.json must be JSON, got: Infinity, which is no number"),
        ({"name": [[[[[[]]]]]] * 100_000}, "model.json must be an undamaged model description, got "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sizes_are_looked_at_before_anything_is_made(saved, change, message):
    path = saved / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        load_model(saved)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_headers_of_weights_that_lie(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "backbone.stem.0.weight"

    def written(entry):
        text = json.dumps(header | {name: entry}).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    sound = header[name]
    for damage in (
        (2**40).to_bytes(8, "little") + content[8:],
        (99_000_000).to_bytes(8, "little") + b" " * 99_000_000,
        written(sound | {"shape": [10**9, 10**9]}),
        written(sound | {"data_offsets": [0, 10**15]}),
        written(sound | {"dtype": "F99"}),
        written(sound | {"shape": [-1]}),
        written(sound | {"shape": []}),
    ):
        path.write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"model\.safetensors must hold the weights that model\.json describes, got "
        ):
            load_model(saved)


@pytest.mark.parametrize("kind", ["dense", "moe", "s-dense", "sparse"])
def test_loading_draws_nothing(tmp_path, kind):
    save_model(create_model("resnet18", kind=kind, num_classes=3, width=8).eval(), tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(saved, damage):
    name, spoil = DAMAGE[damage]
    spoil(saved / name)
    with pytest.raises(ValueError) as error:
        load_model(saved)
    message = str(error.value)
    assert name in message and str(saved) in message and "\n" not in message


def test_initialisations_that_draw_again_end_where_nothing_is_drawn():
    """Of memory that nobody has filled, truncated normals would wait for ever for values within their bounds."""
    tensor = torch.full((2, 3), 9.0)
    with Undrawn():
        nn.init.trunc_normal_(tensor, std=0.02)
        linear = nn.Linear(2, 3)
    assert (tensor.abs() <= 2).all() and not linear.weight.any()


def test_a_users_default_dtype_changes_no_file(tmp_path):
    model = create_model("resnet18", num_classes=3, width=4, input_size=8).eval()
    save_model(model, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        again = load_model(tmp_path)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))

"""The model of a run directory: as it was saved, or what is missing."""

import pytest
import torch

from advmoe.errors import InputError
from advmoe.models import create_model, save_model
from advmoe.models.convert import to_moe
from advmoe.models.runs import load_run
from advmoe.models.sources import load_module

NETWORK = """
from torch import nn

def small(in_channels=1, num_classes=3):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def test_a_run_s_model_is_the_saved_one_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=4, in_channels=1, input_size=8)
    x = torch.rand(4, 1, 8, 8)
    model(x)  # statistics of its own
    save_model(model, tmp_path)
    loaded = load_run(str(tmp_path))
    assert not loaded.training and {each.device.type for each in loaded.parameters()} == {"cpu"}
    assert loaded.origin.run == tmp_path
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("missing", ["model.json", "model.safetensors"])
def test_what_is_missing_is_named(tmp_path, missing):
    save_model(create_model("resnet18", num_classes=3, width=4, input_size=8), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=missing):
        load_run(tmp_path)


def test_a_network_of_the_user_s_own_is_opened_by_its_source_alone(tmp_path):
    (tmp_path / "mine.py").write_text(NETWORK)
    source, x = f"{tmp_path / 'mine.py'}:small", torch.rand(4, 1, 8, 8)
    torch.manual_seed(0)
    for name in ("own", "ours"):
        (tmp_path / name).mkdir()
    model = to_moe(load_module(source), 2, example=x).eval()
    save_model(model, tmp_path / "own")
    with pytest.raises(InputError, match="whose code is never run unasked"):
        load_run(tmp_path / "own")
    loaded = load_run(tmp_path / "own", source)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    save_model(create_model("resnet18", num_classes=3, width=4, input_size=8), tmp_path / "ours")
    with pytest.raises(InputError, match="must be opened without --model"):
        load_run(tmp_path / "ours", source)

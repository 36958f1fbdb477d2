"""How long training takes says what it was measured with."""

import torch

from advmoe.config import Config
from advmoe.ops import kernels_used
from advmoe.pool import threads_set
from advmoe.training import pace as module
from advmoe.training.pace import pace


def config(method, **training):
    return Config.from_dict(
        {
            "model": {"width": 4, "kind": "moe"},
            "data": {"name": "digits", "image_size": 8, "augment": False},
            "training": {"method": method, "batch_size": 16, "attack_steps": 1, "step_size": 0.1, **training},
        }
    )


def test_the_setting_stands_beside_the_times(monkeypatch):
    monkeypatch.setattr(module, "ITERATIONS", 2)
    configs = {
        "ours": config("advmoe"),
        "against": config("at", precision="bf16-mixed", warmup_epochs=3, first_attack_steps="1:4"),
    }
    with threads_set(2):
        times = pace(configs, rounds=1, accelerator="cpu", threads=1)
        assert torch.get_num_threads() == 2
    assert (times["threads"], times["device"], times["kernels"]) == (1, "cpu", kernels_used())
    assert times["precision"] == {"ours": "fp32", "against": "bf16-mixed"}
    assert times["batch_size"] == {"ours": 16, "against": 16}
    for each in times["seconds"].values():
        assert 0 < each["least"] == each["median"] == each["most"]
    assert times["ratio"] == times["seconds"]["ours"]["median"] / times["seconds"]["against"]["median"]

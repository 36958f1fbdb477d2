"""What a step asks of a GPU: launches, and waits of the host for the device. The budgets may only fall."""

import pytest
import torch
from lightning_fabric import Fabric

from advmoe.data import load_dataset
from advmoe.evaluation.scoring import measuring
from advmoe.moe import MoEConv2d
from advmoe.precision import full_fp32
from advmoe.training.trainer import Trainer, build_model

BATCH = 8
DISPATCH = {"training": {"compute": "dispatch"}}
BUDGETS = {
    # setting: what is changed, waits of an iteration of all levels (two attack steps each), launches of it
    "advmoe": ({}, 0, 5_600),
    "advmoe, dispatch": (DISPATCH, 160, 6_650),
    "at": ({"training": {"method": "at"}}, 0, 3_000),
    "at, s-dense": ({"training": {"method": "at"}, "model": {"kind": "s-dense"}}, 0, 950),
}
"""A layer's dispatch waits once a pass; else nothing waits but the look at losses, every 16 steps."""


@pytest.fixture
def make_trainer(make_config):
    def make(**groups):
        groups["data"] = {"val_fraction": 0.2, "image_size": 8}
        config = make_config(**groups)
        dataset = load_dataset("digits", image_size=8, val_fraction=0.2, train_examples=64, seed=0)
        fabric = Fabric(accelerator="cuda", devices=1, precision=config.training.precision)
        fabric.launch()
        return Trainer(config, build_model(config, dataset, resumed=True), dataset, fabric)

    return make


@pytest.mark.parametrize("name", BUDGETS)
def test_an_iteration_keeps_within_its_budget(name, make_trainer, pretended):
    groups, waits, launches = BUDGETS[name]
    counts = counted(make_trainer(**groups), pretended)
    print(name, counts.waited, counts.launched, counts.waits)
    assert counts.waited <= waits and counts.launched <= launches


def counted(trainer, pretended):
    """What an iteration of all levels asks of the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = torch.rand(BATCH, 1, 8, 8, device="cuda"), torch.arange(BATCH, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    for level in trainer.levels:  # optimisers have no momentum before
        trainer.step(level, x, y, generator)
    with pretended.counting() as counts:
        for level in trainer.levels:
            trainer.step(level, x, y, generator)
    return counts


@pytest.mark.usefixtures("gpu_kernels")
def test_kernels_wait_for_no_choice(make_trainer, pretended, monkeypatch):
    from advmoe.ops import triton_conv

    results = {"_sort": (1, 2), "_convolve": (4,), "_unconvolve": (2,), "_filter_gradients": (2, 3)}
    launched = []

    def zeros(kernel, grid, *arguments, **constants):
        """Stands in for a launch: in its interpreter a ResNet-18's would take minutes."""
        launched.append(kernel.fn.__name__)
        for each in (*results[launched[-1]], *([5] if constants.get("POOL") else [])):
            pretended.on_host(arguments[each]).zero_()

    monkeypatch.setattr(triton_conv, "_launch", zeros)
    trainer = make_trainer(training={"compute": "kernel"})
    counts = counted(trainer, pretended)
    kernels = len(launched) // 2  # of the first of two iterations too
    print("advmoe, kernel", counts.waited, counts.launched, kernels)
    assert counts.waited == 0 and counts.launched + kernels <= 5_150
    assert launched.count("_convolve") == 2 * 16 * 10  # layers; of each level an attack has 3 passes, its loss 2


@pytest.mark.parametrize("name", ["at", "advmoe"])
def test_measurements_wait_for_no_choice_and_answer_as_by_dispatch(name, make_trainer, pretended):
    model = make_trainer(training={"compute": "dispatch", "method": name}).model
    x = torch.rand(BATCH, 1, 8, 8, device="cuda")
    with torch.no_grad():
        expected = model.eval()(x)
        with pretended.counting() as counts, measuring(model, x.device):
            logits = model(x)
        assert counts.waited == 0
        with pretended.counting() as counts:
            model(x)
        assert counts.waited > 0  # as before
    torch.testing.assert_close(logits, expected)


def test_groups_of_few_sizes_where_a_gpu_tries_every_size(make_trainer, monkeypatch):
    model = make_trainer(training={"compute": "dispatch"}).model.train()
    x, sizes, results = torch.rand(40, 1, 8, 8, device="cuda"), [], []
    for layer in model.modules():
        if isinstance(layer, MoEConv2d):
            compute = layer.compute
            monkeypatch.setattr(layer, "compute", lambda x, *w, f=compute: sizes.append(len(x)) or f(x, *w))
    for benchmark in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        sizes.clear()
        model.zero_grad()
        with full_fp32():  # choices that are close may turn round else
            logits = model(x)
            logits.square().sum().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
        assert all(size % 16 == 0 for size in sizes) is benchmark and sizes
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)

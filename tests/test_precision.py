"""Numbers that are said to be fp32's are, whichever flags of PyTorch's are set, by whichever names."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from advmoe import create_model, evaluate
from advmoe.evaluation.cost import in_turn, milliseconds_per_image, timing
from advmoe.moe import pathway
from advmoe.precision import deterministic, fp32_on, full_fp32, gpu_libraries

BACKENDS: Any = torch.backends
FLAGS = (BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul,
         BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn, BACKENDS.mkldnn.matmul)  # fmt: skip
CPU = torch.device("cpu")


def state():
    """Every flag by its newer name, and by the older ones where they can be read."""
    flags: list[Any] = [flag.fp32_precision for flag in FLAGS]
    older = (lambda: BACKENDS.cudnn.allow_tf32, lambda: BACKENDS.cuda.matmul.allow_tf32)
    for read in (*older, torch.get_float32_matmul_precision):
        try:
            flags.append(read())
        except RuntimeError:
            flags.append("unreadable")
    return flags


@pytest.fixture(autouse=True)
def as_it_was():
    before, older = [flag.fp32_precision for flag in FLAGS], torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = older
    torch.set_float32_matmul_precision("highest")
    for flag, value in zip(FLAGS, before, strict=True):
        flag.fp32_precision = value


SET = {
    "nothing": lambda: None,
    "older names": lambda: (
        setattr(BACKENDS.cudnn, "allow_tf32", False), setattr(BACKENDS.cuda.matmul, "allow_tf32", True)
    ),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer names": lambda: [setattr(flag, "fp32_precision", "tf32") for flag in FLAGS[:3]],
    "a cpu's": lambda: [setattr(flag, "fp32_precision", "bf16") for flag in FLAGS[3:]],
    "mixed": lambda: (
        setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"), setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32")
    ),
}  # fmt: skip


class Watching(nn.Module):
    """A classifier of two classes that notes the flags it ran under, and whether autocast was on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.seen = set()
        self.spec = {"in_channels": 3, "input_size": 4}

    def forward(self, x):
        self.seen |= {flag.fp32_precision for flag in FLAGS} | {torch.is_autocast_enabled("cpu")}
        return x.mean((2, 3)) @ self.weight.T * torch.tensor([1.0, 0.5])


@pytest.mark.parametrize("set_flags", SET.values(), ids=SET)
def test_inside_everything_is_fp32_and_afterwards_as_it_stood(set_flags):
    set_flags()
    before = state()
    with full_fp32():
        assert {flag.fp32_precision for flag in FLAGS} == {"ieee"} and fp32_on(CPU) == "fp32"
        for known, inside, full in zip(before[6:], state()[6:], (False, False, "highest"), strict=True):
            assert known == "unreadable" or inside == full
    assert state() == before
    with pytest.raises(KeyError), full_fp32():
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("set_flags", SET.values(), ids=SET)
@pytest.mark.parametrize("what", ["evaluate", "time", "sides", "pathway"])
def test_what_is_measured_is_fp32(set_flags, what):
    set_flags()
    before, model = state(), Watching()
    x, y = torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=what != "pathway"):
        if what == "evaluate":
            evaluate(model, (x, y), steps=1)
        elif what == "time":
            milliseconds_per_image(model, 4, repeats=1)  # type: ignore[arg-type]
        elif what == "sides":
            with timing(model):
                in_turn({"it": model}, x, seconds=0)
        else:
            pathway(model, x)
    assert model.seen == {"ieee", False} and state() == before


def test_the_label_says_what_the_flags_make_of_fp32(monkeypatch):
    assert fp32_on(CPU) == "fp32"
    torch.set_float32_matmul_precision("medium")
    assert fp32_on(CPU) == "fp32, bf16 products"
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"
    assert fp32_on(CPU) == "fp32, bf16 convolutions and products"
    torch.set_float32_matmul_precision("highest")
    gpu = torch.device("cuda")
    for capability, label in (((7, 5), "fp32"), ((9, 0), "fp32, TF32 convolutions")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, version=capability: version)
        torch.backends.cudnn.allow_tf32 = True
        assert fp32_on(gpu) == label
    torch.backends.cuda.matmul.allow_tf32 = True
    assert fp32_on(gpu) == "fp32, TF32 convolutions and products"
    with full_fp32():
        assert fp32_on(gpu) == "fp32"


def test_folded_filters_are_fp32_s_where_time_is_taken_under_autocast():
    model = create_model("resnet18", kind="s-dense", num_classes=2, width=4, input_size=8)
    dtypes = []
    hook = model.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        milliseconds_per_image(model, 2, repeats=1)
    hook.remove()
    assert set(dtypes) == {torch.float32}


def test_deterministic_algorithms_are_asked_for_inside_alone(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own stays
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    x, index = torch.zeros(2).requires_grad_(), torch.tensor([0, 0])
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert torch.equal(x.index_add(0, index, torch.ones(2)), torch.tensor([2.0, 0.0]))
        with deterministic(False):
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert gpu_libraries(torch.device("cpu")) is None

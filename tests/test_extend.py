"""What is registered is a choice everywhere, in every process, and nowhere unless its plugin is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from advmoe import cli, extend
from advmoe.attacks.pgd import LOSSES
from advmoe.data.digits import load_digits
from advmoe.data.types import Request
from advmoe.errors import InputError
from advmoe.evaluation.suite import ATTACKS
from advmoe.tables import BACKBONES, DATASETS, METHODS, ROUTERS, Level
from advmoe.threat import ThreatModel

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")

ROOT = Path(__file__).parents[1]
PLUGIN = str(ROOT / "examples" / "plugin.py")
ONE_THREAD = ("--threads", "1", "--accelerator", "cpu")


# Into the tables


def test_a_backbone_and_a_router() -> None:
    @extend.register_backbone("mine", width=8, tokens=True, min_size=16)
    class Mine(torch.nn.Module):
        pass

    entry = BACKBONES.find("mine")
    assert (entry.width, entry.label, entry.tokens, entry.min_size) == (8, "mine", True, 16)
    assert isinstance(entry.build(), Mine)
    assert extend.register_backbone("labelled", width=4, label="Mine")(Mine) is Mine  # what is decorated stays itself
    assert BACKBONES["labelled"].label == "Mine" and not BACKBONES["labelled"].tokens

    ahead, within = (lambda *sizes, pool: torch.nn.ReLU()), (lambda channels, experts, *, per_token=False: Mine())
    extend.register_router("ahead", apart=False)(ahead)
    extend.register_router("within", in_layers=True)(within)
    assert (ROUTERS["ahead"].in_layers, ROUTERS["ahead"].apart) == (False, False)
    assert isinstance(ROUTERS["ahead"].build(3, pool=1), torch.nn.ReLU)
    assert (ROUTERS["within"].in_layers, ROUTERS["within"].apart) == (True, True)
    assert isinstance(ROUTERS["within"].layer(3, 2), Mine)


def test_a_data_set_a_loss_and_a_method() -> None:
    extend.register_dataset("mine", licence="yours")(load_digits)
    assert (DATASETS["mine"].label, DATASETS["mine"].licence) == ("mine", "yours")
    request = Request(root=Path(), download=False, image_size=8, workers=0)
    assert len(DATASETS["mine"].reader(request).train) == len(load_digits(request).train)

    extend.register_loss("first", from_labels=False, least_classes=3)(lambda logits, labels: logits[:, 0] * labels)
    loss = LOSSES["first"]
    ascended = loss.at(lambda x: x, torch.zeros(2, 3), torch.tensor([1, 2]))
    assert ascended(torch.tensor([[4.0, 0.0, 0.0], [5.0, 0.0, 0.0]])).item() == 4 * 1 + 5 * 2  # summed over images
    assert (loss.from_labels, loss.least_classes) == (False, 3)

    extend.register_method("twice", (Level("routers"), Level("routers", batch=1)), sentence="routers twice")
    method = METHODS["twice"]
    assert (method.label, method.sentence, method.trains_routers, method.kind) == ("twice", "routers twice", True, None)


def test_an_attack() -> None:
    @extend.register_attack("up", for_routed=True)
    def up(predict: Any, x: torch.Tensor, y: torch.Tensor, *, threat: Any, seed: int) -> torch.Tensor:
        return x + 1

    assert ATTACKS["up"].for_routed
    assert torch.equal(ATTACKS["up"].function(None, torch.zeros(2), None, threat=None, seed=0), torch.ones(2))


def test_a_name_that_is_taken_is_refused() -> None:
    for register in (
        lambda: extend.register_backbone("resnet18", width=8)(print),
        lambda: extend.register_backbone("wrn-10-1", width=8)(print),  # of a family
        lambda: extend.register_router("layer")(print),
        lambda: extend.register_dataset("digits")(print),
        lambda: extend.register_loss("ce")(print),
        lambda: extend.register_attack("pgd")(print),
        lambda: extend.register_method("at", (Level("all"),)),
    ):
        with pytest.raises(InputError, match="already"):
            register()


# Through commands: the example of each

TRAIN = (
    "train", "--config", "digits-advmoe", "--run-dir", "run", "--data.name", "shifted-digits", "--model.name", "tiny",
    "--model.router", "brightness", "--training.method", "experts-twice", "--training.epochs", "1",
    "--data.train_examples", "128", "--training.batch_size", "32", *ONE_THREAD,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that knows its plugin by the option, in a process as users start it."""
    home = tmp_path_factory.mktemp("plugins")
    command = [sys.executable, "-m", "advmoe", *TRAIN, "--plugin", PLUGIN]
    done = subprocess.run(command, cwd=home, env={**os.environ}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def beside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, where the test works."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("COLUMNS", "500")
    return trained


@pytest.mark.slow
def test_one_of_each_is_trained_and_evaluated(beside: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # In two processes, which both know the plugin by the environment this time.
    monkeypatch.setenv("ADVMOE_PLUGINS", PLUGIN)
    words = ("--num-examples", "20", "--batch-size", "10", "--workers", "2", *ONE_THREAD)
    assert cli.main(["evaluate", "run", "--attacks", "corner,pgd-2-logit", *words]) == 0, capsys.readouterr().err
    robust = json.loads((beside / "run" / "evaluation.json").read_text())["robust_accuracy"]
    assert set(robust) == {"corner", "pgd-2-logit"}


@pytest.mark.slow
def test_reports_and_costs_know_them(beside: Path, capsys: Any) -> None:
    assert cli.main(["cost", "run", f"--plugin={PLUGIN}", "--batch", "1", "--seconds", "0"]) == 0
    assert cli.main(["report", "run", "--plugin", PLUGIN, "--no-gallery"]) == 0, capsys.readouterr().err
    assert "experts-twice" in (beside / "report.html").read_text()


def test_help_names_them(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = capsys.readouterr().out
    assert "tiny-imagenet" in told and "experts-twice" not in told
    with pytest.raises(SystemExit):
        cli.main(["train", "--plugin", PLUGIN, "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in ("tiny", "brightness", "shifted-digits", "experts-twice"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [("predict", "run", "x.png"), ("evaluate", "run")])
def test_a_run_that_needs_a_plugin_says_so_without_it(beside: Path, capsys: Any, words: tuple[str, ...]) -> None:
    assert cli.main([*words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert any(name in err for name in ("experts-twice", "tiny", "shifted-digits", "brightness"))


# Mistakes in a plugin


def test_what_a_plugin_raises_or_returns_is_one_line() -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("mine")

    for register, find, what in (
        (extend.register_backbone("mine", width=8), lambda: BACKBONES["mine"].build, "the backbone mine"),
        (extend.register_router("mine"), lambda: ROUTERS["mine"].build, "the router mine"),
        (extend.register_dataset("mine"), lambda: DATASETS["mine"].reader, "the data set mine"),
        (extend.register_attack("mine"), lambda: ATTACKS["mine"].function, "the attack mine"),
    ):
        register(fails)
        with pytest.raises(InputError, match=rf"^{what} must run without an error, got KeyError: 'mine' \(line \d+\)$"):
            find()(1, pool=2)
    extend.register_router("none", in_layers=True)(lambda *sizes, **options: 3)
    extend.register_backbone("other", width=8)(lambda layers: None)
    without, other = ROUTERS["none"].layer, BACKBONES["other"].build
    assert without is not None
    with pytest.raises(InputError, match=r"^the router none must return a Module, got an object of type int$"):
        without(4, 2)
    with pytest.raises(InputError, match=r"^the backbone other must run without an error, got TypeError: .*'width'$"):
        other(None, width=8)


def test_what_a_plugin_s_exit_and_the_machine_mean() -> None:
    @extend.register_attack("ends")
    def ends(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit(0)

    @extend.register_attack("full")
    def full(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    @extend.register_attack("ours")
    def ours(*args: Any, **kwargs: Any) -> Any:
        ThreatModel.project(None, None, None)  # a bug of the package's keeps its traceback

    for name, error in (("ends", InputError), ("full", MemoryError), ("ours", AttributeError)):
        entry: Any = ATTACKS[name]
        with pytest.raises(error):
            entry.function()


def test_a_loss_is_not_called_like_a_way_to_route() -> None:
    for name in ("soft", "mine-soft"):
        with pytest.raises(InputError, match=r"^loss must get a name that does not end in soft"):
            extend.register_loss(name)(lambda logits, labels: logits[:, 0])
    extend.register_loss("a.b")(lambda logits, labels: logits[:, 0])
    ATTACKS.find("pgd-2-a.b")
    with pytest.raises(InputError, match="got 'pgd-2-axb'"):
        ATTACKS.find("pgd-2-axb")

"""A network of the user's own, trained and measured by the command line: converted or as it is, never run unasked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import advmoe
from advmoe import cli
from advmoe.config import Config, ModelConfig
from advmoe.files import checksum
from advmoe.training.methods import learning
from advmoe.training.run import resume, train

ROOT = Path(__file__).parents[2]

OWN = """
from pathlib import Path
import torch
from torch import nn

(Path(__file__).parent / "executed").touch()

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.norm(self.conv(self.depth(self.stem(x)))).relu()
        x = self.down(x).mean((2, 3))
        return self.fc(self.drop(x + self.mlp(x)))

def net():
    return Net()

def few():
    return Net(3)

def coloured():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10))

class Talkative(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class Nervous(Net):
    def forward(self, x):
        assert not self.training, "never in train mode"
        return super().forward(x)

def function():
    return lambda x: x.flatten(1)[:, :10]

def ready():
    import advmoe
    return advmoe.to_moe(Net(), example=torch.rand(3, 1, 8, 8))

def mixed():
    from advmoe.moe import MoEConv2d

    made = Net()
    made.stem[0] = MoEConv2d(1, 8, 3, padding=1, bank_rows=24, num_experts=3, layer=0)
    made.conv = MoEConv2d(8, 8, 3, padding=1, groups=2, bank_rows=8, num_experts=1, layer=1)
    made.down = MoEConv2d(8, 16, 1, stride=2, bank_rows=32, num_experts=2, layer=2)
    return made

def numbered(*numbers):
    made = mixed()
    for layer, number in zip((made.stem[0], made.conv, made.down), numbers):
        layer.layer = number
    return made

def twice():
    return numbered(0, 0, 1)

def gap():
    return numbered(0, 2, 3)
"""
TINY = [
    "--config", "digits-advmoe", "--data.image_size", "8", "--training.epochs", "1", "--training.batch_size", "256",
    "--training.attack_steps", "1", "--training.val_attack_steps", "1", "--accelerator", "cpu", "--threads", "1",
]  # fmt: skip
SMALL = ["--attack.steps", "2", "--attack.queries", "2", "--attack.pathways", "1", "--num-examples", "12"]
SMALL += ["--accelerator", "cpu"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    return tmp_path


def command(place, *words):
    """The command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "advmoe", *map(str, words)], cwd=place, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_converted_network_is_trained_measured_and_continued(place, capsys):
    words = ["train", "--model", "own.py:net", "--to-moe", *TINY, "--model.skip", "stem", "--model.linear", "*mlp"]
    code, out, err = command(place, *words)
    assert (code, err) == (0, "")
    assert "4 of 6 layers are MoE layers\n  plain  stem.0: named in skip\n  plain  depth: depthwise\n" in out
    run = Path("runs/own-net-digits-advmoe-0")
    assert f"next  advmoe evaluate {run} --model own.py:net" in out
    spec = json.loads((run / "model.json").read_text())
    assert spec["layers"] == ["conv", "down", "mlp.0", "mlp.2"] and spec["source"] == "own.py:net"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [layer["layer"] for layer in lines[0]["layers"]] == [0, 1, 2, 3]

    # Nothing that the run names is executed: who opens it names the code.
    (place / "executed").unlink()
    code, out, err = command(place, "evaluate", run, *SMALL)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "holds a network of somebody's own (own.py:net), whose code is never run unasked" in err
    for command_ in (["dissect", str(run), *SMALL], ["sweep-eps", str(run), "--eps", "0.1", *SMALL]):
        assert cli.main(command_) == 2 and "never run unasked" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "--model FILE.py:FACTORY must be given again for a run of own.py:net" in capsys.readouterr().err
    with pytest.raises(ValueError, match="never run unasked"):
        advmoe.load_run(run)
    assert not (place / "executed").exists() and not (run / "evaluation.json").exists()

    shutil.move("own.py", "moved.py")
    named = ["--model", "moved.py:net"]
    both = ["--attacks", "pgd,routed", "--batch-size", "6", "--workers", "2"]
    code, out, err = command(place, "evaluate", run, *named, *SMALL, *both)
    assert (code, err) == (0, "") and "worst case" in out and "MACs" in out
    assert cli.main(["dissect", str(run), *named, *SMALL, "--no-figure"]) == 0
    assert "4 MoE layers of 2 experts" in capsys.readouterr().out
    assert cli.main(["sweep-eps", str(run), *named, "--eps", "0,0.1", *SMALL, "--no-figure"]) == 0
    model = advmoe.load_run(run, source="moved.py:net")
    assert advmoe.pathway(model, torch.rand(3, 1, 8, 8)).shape == (3, 4)

    # Longer by an epoch, from its last checkpoint.
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("epochs: 1", "epochs: 2"))
    code, out, err = command(place, "train", "--resume", run, *named)
    assert (code, err) == (0, "") and "--model moved.py:net" in out
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def settings(**groups):
    base = {
        "data": {"name": "digits", "image_size": 8, "train_examples": 320, "val_fraction": 0.0, "augment": False},
        "training": {"epochs": 1, "batch_size": 160, "attack_steps": 1, "step_size": 0.06},
    }
    return Config.from_dict({name: {**base.get(name, {}), **groups.get(name, {})} for name in {*base, *groups}})


ENGINE = {"accelerator": "cpu", "threads": 1}


@pytest.mark.parametrize(
    ("model", "training"),
    [
        ({"source": "own.py:net"}, {"method": "standard"}),
        ({"source": "own.py:net"}, {"method": "at"}),
        ({"source": "own.py:net", "to_moe": True, "router": "image"}, {"router_objective": "codes"}),
        ({"source": "own.py:net", "to_moe": True, "router": "embedding", "num_experts": 3},
         {"router_objective": "codes", "codes": "random", "attack_routing": "soft"}),
        ({"source": "own.py:ready"}, {"method": "advmoe"}),
        ({"source": "own.py:net", "to_moe": True},
         {"alternation": "warm-start", "attack_routing": "mixed", "balance": 0.01, "margin": 0.1, "awp": 0.005}),
    ],
    ids=["standard", "at", "image", "embedding", "converted by its own code", "options"],
)  # fmt: skip
def test_methods_train_own_networks(place, model, training):
    run = train(settings(model=model, training=training), run_dir="run", **ENGINE)
    assert Config.load(run / "config.yaml").model.source == model["source"]
    loaded = advmoe.load_run(run, model["source"])
    assert loaded.routed == ("to_moe" in model or "ready" in model["source"])
    weights = load_file(run / "last" / "model.safetensors")
    state = loaded.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


@pytest.mark.parametrize("terms", [{"balance": 0.01, "margin": 0.1}, {"router_objective": "codes", "codes": "random"}])
def test_layers_of_different_numbers_of_experts_are_trained_and_measured(place, terms):
    run = train(settings(model={"source": "own.py:mixed"}, training=terms), run_dir="run", **ENGINE)
    (epoch,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [len(layer["load"]) for layer in epoch["layers"]] == [3, 1, 2]
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-5) for layer in epoch["layers"])
    named = ["--model", "own.py:mixed", "--num-examples", "8", "--accelerator", "cpu"]
    small = ["--attack.steps", "2", "--attack.queries", "2", "--attack.pathways", "1", "--attacks", "pgd,routed"]
    assert cli.main(["evaluate", str(run), *named, *small]) == 0
    assert cli.main(["certify", str(run), *named, "--radii", "0.01"]) == 0
    assert (
        cli.main(["cost", str(run), "--model", "own.py:mixed", "--batch", "4", "--seconds", "0", "--out", "cost.json"])
        == 0
    )
    (entry,) = json.loads(Path("cost.json").read_text())["batches"]
    assert [sum(shares) for shares in entry["loads"]] == pytest.approx([1] * 3, abs=1e-3)
    assert entry["loads"][1][0] == 1 and entry["busiest"] == pytest.approx(sum(map(max, entry["loads"])) / 3, abs=1e-3)


def test_an_interrupted_run_ends_bit_identical(place):
    config = settings(model={"source": "own.py:net", "to_moe": True}, training={"epochs": 2})
    whole = train(config, run_dir="whole", **ENGINE)
    shutil.copytree(whole, "cut")
    shutil.rmtree("cut/last")
    shutil.move("cut/last-previous", "cut/last")
    Path("elsewhere.py").write_text(OWN)
    resume("cut", source="elsewhere.py:net")
    a, b = (load_file(Path(name) / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match=r"--model FILE\.py:FACTORY must be given again .* got nothing"):
        resume("cut")
    rule = r"cut/last must hold weights of the model that its config\.yaml, and --model, describe, got RuntimeError: "
    Path("elsewhere.py").write_text(OWN.replace("nn.Linear(16, 16), nn.GELU()", "nn.Linear(16, 16, False), nn.GELU()"))
    with pytest.raises(ValueError, match=rule):
        resume("cut", source="elsewhere.py:net")


def test_a_resumption_with_changed_code_says_so(place, capsys):
    config = settings(model={"source": "own.py:net", "to_moe": True}, training={"epochs": 2})
    train(config, run_dir="run", **ENGINE)
    shutil.copytree("run/last-previous", "kept")
    began = json.loads(Path("run/manifest.json").read_text())["source_sha256"]
    assert began == checksum(Path("own.py"))
    Path("own.py").write_text(OWN + "\n# a comment\n")
    for source, changed in (("same.py:net", False), ("own.py:net", True)):
        Path("same.py").write_text(OWN)
        shutil.rmtree("run/last")
        shutil.copytree("kept", "run/last")
        capsys.readouterr()
        resume("run", source=source)
        assert (f"note  the code of {source} is not what the run began with" in capsys.readouterr().out) == changed
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert manifest["source_sha256"] == began
        assert manifest["resumed"][-1]["source_sha256"] == checksum(Path(source.partition(":")[0]))


def test_a_trained_plain_network_is_upcycled(place):
    plain = train(settings(model={"source": "own.py:net"}, training={"method": "standard"}), run_dir="plain", **ENGINE)
    converted = settings(
        model={"source": "own.py:net", "to_moe": True}, training={"init_from": str(plain), "lr": 1e-12}
    )
    run = train(converted, run_dir="converted", **ENGINE)
    x = torch.rand(6, 1, 8, 8)
    before, after = advmoe.load_run(plain, "own.py:net"), advmoe.load_run(run, "own.py:net")
    for each in (before, after):  # the statistics of batch norms have moved
        each.backbone.norm.train()
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-4)
    # A converted run goes on as such: routers by themselves, then experts.
    learns = {"method": "at-routers", "init_from": str(run), "frozen_norms": "keep"}
    further = settings(model={"source": "own.py:net", "to_moe": True}, training=learns)
    routers = train(further, run_dir="routers", **ENGINE)
    a, b = (load_file(each / "model.safetensors") for each in (run, routers))
    assert {name for name in a if not torch.equal(a[name], b[name])} == {name for name in a if ".router." in name}


def test_what_a_network_has_frozen_stays_so(place):
    model = advmoe.to_moe(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)))
    model.backbone[0].bank.requires_grad_(False)
    for part, learns in (("all", True), ("experts", True), ("routers", False)):
        with learning(model, part):
            assert not model.backbone[0].bank.requires_grad and model.backbone[1].bank.requires_grad == learns
            assert model.backbone[0].router.norm.weight.requires_grad == (part != "experts")
        assert not model.backbone[0].bank.requires_grad


def test_a_factory_that_converts_is_attacked_as_routed(place, capsys):
    data = ["--data.name", "digits", "--data.image_size", "8", "--threat.eps", "0.1", "--attacks", "pgd-2,routed"]
    assert cli.main(["evaluate", "own.py:ready", *data, *SMALL, "--workers", "1"]) == 0
    evaluation = json.loads(Path("evaluations/own-ready/evaluation.json").read_text())
    assert "soft T=1" in evaluation["attacks"]["routed"]["parts"] and evaluation["cost"]["gmacs"] > 0
    assert cli.main(["dissect", "own.py:ready", *data[:-2], *SMALL, "--no-figure"]) == 0
    assert "3 MoE layers of 2 experts" in capsys.readouterr().out


TRAIN = ["train", *TINY]
MISTAKES = [
    (["--model", "own.py"], "model.source must be FILE.py:FACTORY, got 'own.py'"),
    (["--model", "absent.py:net", "--to-moe"], "a classifier's file must exist, got 'absent.py'"),
    (["--model", "own.py:nat", "--to-moe"], "own.py:nat must name something in the file (did you mean"),
    (["--to-moe"], "model.to_moe must be false without a source (--model FILE.py:FACTORY), got True"),
    (["--model.skip", "stem"], "model.skip must be left out without model.to_moe, got 'stem'"),
    (["--model", "own.py:net"], "model.source must be converted (--to-moe), or have MoE layers of its own, when "
     "training.method is advmoe, got 'own.py:net' without"),
    (["--model", "own.py:net", "--training.method", "at", "--training.margin", "1"], "MoE layers of its own, when "
     "training.margin is > 0, got 'own.py:net' without"),
    (["--model=own.py:net", "--to-moe", "--model.width", "8"], "model.width must be left out with a network of your own"
     " (--model), got 8"),
    (["--model=own.py:net", "--to-moe", "--model.kind", "moe"], "model.kind must be left out with a network of your"),
    (["--model", "own.py:net", "--to-moe", "--model.skip", "stam"], "model.source own.py:net: skip must name layers to "
     "convert of the network (did you mean stem.0?), got 'stam'"),
    (["--model", "own.py:few", "--to-moe"], "model.source must make logits of the data's 10 classes, got 3"),
    (["--model", "own.py:coloured", "--to-moe"], "model.source own.py:coloured: module must take images (3, 1, 8, 8) "
     "without an error, got RuntimeError: "),
    (["--model", "own.py:function", "--to-moe"], "own.py:function must return a torch.nn.Module, got an object of type "
     "function"),
    (["--model", "own.py:Talkative", "--to-moe"], "model.source own.py:Talkative: module must make logits (N, K) in "
     "train mode too, got tuple"),
    (["--model", "own.py:Nervous", "--training.method", "at"], "in train mode too, got AssertionError: never in train"),
    (["--model", "own.py:ready", "--to-moe"], "module must have no MoE layers yet"),
    (["--model", "own.py:twice"], "must be numbered 0, 1, 2, ... (`layer`), each number once, got 0, 0, 1"),
    (["--model", "own.py:gap"], "must be numbered 0, 1, 2, ... (`layer`), each number once, got 0, 2, 3"),
    (["--model", "own.py:net", "--to-moe=perhaps"], "model.to_moe must be true or false, got 'perhaps'"),
    (["--model"], "expected one argument"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda each: " ".join(each)[:40])
def test_a_mistake_is_one_line_and_creates_nothing(place, words, message, capsys):
    before = set(place.iterdir())
    assert cli.main([*TRAIN, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("advmoe: error: ") and err.count("\n") == 1 and message in err, err
    assert set(place.iterdir()) - before <= {place / "executed", place / "__pycache__"}


def test_mistakes_of_the_other_commands(place, capsys):
    Config().dump("config.yaml")

    def message(*words):
        assert cli.main(list(words)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "--model must go with a run (FILE.py:FACTORY is one itself), got 'own.py:net'" in message(
        "evaluate", "own.py:net", "--model", "own.py:net", "--data.name", "digits"
    )
    Path("manifest.json").write_text('{"name": "run", "command": null, "devices": 1, "threads": 1}')
    assert "must be left out for a run of a model of advmoe's own, got own.py:net" in message(
        "train", "--resume", ".", "--model", "own.py:net"
    )
    assert "--resume must be without" in message("train", "--resume", ".", "--model", "own.py:net", "--to-moe")


def test_no_recipe_is_needed(place, capsys):
    assert cli.main(["train", "--model", "own.py:net", "--to-moe", "--print_config"]) == 0
    config = Config.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert config == Config(model=ModelConfig(source="own.py:net", to_moe=True))
    assert cli.main(["train", "--model", "own.py:net", "--to-moe", "--accelerator", "cpu"]) == 2
    assert "data" in capsys.readouterr().err and not Path("runs").exists()

"""A network taught by another: the loss by hand, the attack's ascent, whole runs, and teachers that do not fit."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from advmoe import cli
from advmoe.attacks import trades_attack
from advmoe.config import Config
from advmoe.data import load_dataset
from advmoe.errors import InputError
from advmoe.models import create_model, save_model
from advmoe.threat import ThreatModel
from advmoe.training.methods import learning
from advmoe.training.objectives import distillation
from advmoe.training.run import resume, train
from advmoe.training.teacher import Teacher, load_teacher, teacher_of

TINY = {
    "model": {"name": "wrn-10-1", "width": 4, "experts_init": "shared"},
    "data": {"name": "digits", "image_size": 8, "val_fraction": 0.2, "train_examples": 80},
    "threat": {"eps": "0.1"},
    "training": {
        "epochs": 2, "batch_size": 20, "step_size": 0.06, "val_attack_steps": 1, "attack_steps": 1,
        "alternation": "both",
    },
}  # fmt: skip
THREADS = {"accelerator": "cpu", "threads": 1}
OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))

def net():
    return Net()

def few():
    return Net(3)

def function():
    return lambda x: x.flatten(1)[:, :10]

class Odd(Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))

def probabilities():
    return Odd(lambda z: z.softmax(1))

def nan():
    return Odd(lambda z: z * float("nan"))

def several():
    return Odd(lambda z: (z, z))

def random():
    return Odd(lambda z: z + torch.randn_like(z))
"""


def tiny(training, **groups):
    groups = {**groups, "training": dict(training)}
    return Config.from_dict({name: {**fields, **groups.get(name, {})} for name, fields in TINY.items()})


def data():
    return load_dataset("digits", image_size=8, val_fraction=0.2, train_examples=80)


@pytest.fixture(scope="module")
def taught_by(tmp_path_factory):
    """A run of another kind and width, to learn from."""
    config = tiny({"method": "at", "epochs": 1}, model={"kind": "s-dense", "width": 8})
    return train(config, run_dir=tmp_path_factory.mktemp("runs") / "teacher", **THREADS)


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


class Fixed(nn.Module):
    """Logits (0, s) with s the image's pixel times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)))

    def forward(self, x):
        s = self.weight * x.flatten(1)
        return torch.cat([torch.zeros_like(s), s], 1)


def test_the_loss_by_hand():
    # The teacher says (1/4, 3/4); the student (1/2, 1/2) of the clean image, whose pixel is 0, and (1/3, 2/3) of the
    # attacked one, whose logits are (0, log 2).
    taught = torch.tensor([[0.0, math.log(3)]])
    x, x_adv = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), math.log(2))
    terms, _, _, logits = distillation(student := Fixed(1), x, x_adv, taught, weight=0.75)
    clean = 1 / 4 * math.log(2 / 4) + 3 / 4 * math.log(3 * 2 / 4)
    attacked = 1 / 4 * math.log(3 / 4) + 3 / 4 * math.log(3 / 4 * 3 / 2)
    assert {name: term.item() for name, term in terms.items()} == {
        "clean_kl": pytest.approx(0.25 * clean, rel=1e-5), "adv_kl": pytest.approx(0.75 * attacked, rel=1e-5),
    }  # fmt: skip
    assert torch.equal(logits, torch.zeros(1, 2))
    sum(terms.values()).backward()
    # d KL / d s is the student's probability less the teacher's, s being the weight times the pixel.
    assert student.weight.grad.item() == pytest.approx(0.75 * (2 / 3 - 3 / 4) * math.log(2), rel=1e-5)


def test_a_teacher_is_fixed_and_computes_a_batch_once():
    network = create_model("wrn-10-1", kind="moe", width=4, num_classes=10, input_size=8, in_channels=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher, x = Teacher(network), torch.rand(4, 1, 8, 8)
    logits, calls = teacher(x), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(x) is logits and not calls and teacher(x.clone()) is not logits
        torch.testing.assert_close(teacher(x.clone()), logits)  # not of bf16, and not by the batch's statistics
    assert len(calls) == 2 and not logits.requires_grad and logits.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


def test_the_attack_leads_away_from_the_teacher_s_prediction():
    threat, x = ThreatModel("linf", 0.1), torch.full((1, 1, 1, 1), 0.5)
    for taught, end in (([4.0, 0.0], 0.6), ([0.0, 4.0], 0.4)):  # the student says (0, s), which is less with the pixel
        x_adv = trades_attack(Fixed(1), x, threat=threat, steps=3, step_size=0.05, target=torch.tensor([taught]))
        assert x_adv.item() == pytest.approx(end)


@pytest.mark.parametrize("routing", ["straight-through", "mixed"])
def test_training_s_attack_ascends_what_the_loss_descends(taught_by, routing):
    from lightning_fabric import Fabric

    from advmoe.training.trainer import Trainer, build_model

    config = tiny({"teacher": str(taught_by), "attack_steps": 4, "step_size": 0.03, "attack_routing": routing})
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    trainer = Trainer(config, build_model(config, data()), data(), fabric)
    x = trainer.train_set.pixels(slice(0, 20)).contiguous(memory_format=torch.channels_last)
    y = trainer.train_set.labels[:20]

    def divergence(images):
        trainer.model.eval()
        with torch.no_grad():
            answers = trainer.model(images).log_softmax(1)
        trainer.model.train()
        return F.kl_div(answers, trainer.teacher(x).log_softmax(1), reduction="batchmean", log_target=True)

    x_adv = trainer.attack(x, torch.Generator().manual_seed(0))
    noise = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()).clamp(0, 1)
    assert divergence(x_adv) > divergence(x) and divergence(x_adv) > divergence(noise)
    weights = {name: value.clone() for name, value in trainer.teacher.network.state_dict().items()}
    with learning(trainer.model, "all", record=False), torch.no_grad():
        expected = distillation(trainer.model, x, x_adv, trainer.teacher(x), 5 / 6)[0]
    terms = trainer.step(trainer.levels[1], x, y, torch.Generator(), x_adv)
    torch.testing.assert_close(terms, expected)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.teacher.network.state_dict().items())


def assert_same(run, whole):
    for name in ("last/model.safetensors", "model.safetensors"):
        there, expected = load_file(run / name), load_file(whole / name)
        assert all(torch.equal(there[key], expected[key]) for key in expected)


FIELDS = [
    "--config", "digits-advmoe", "--data.image_size", "8", "--data.train_examples", "80", "--model.width", "4",
    "--model.name", "wrn-10-1", "--training.epochs", "2", "--training.batch_size", "20", "--training.attack_steps", "1",
    "--training.val_attack_steps", "1", "--accelerator", "cpu", "--threads", "1",
]  # fmt: skip


@pytest.mark.slow
def test_a_student_is_trained_and_goes_on_bit_identical(taught_by, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["train", *FIELDS, "--training.teacher", str(taught_by), "--run-dir", str(whole)]) == 0
    manifest = json.loads((whole / "manifest.json").read_text())
    teacher = load_teacher(Config.load(whole / "config.yaml").training, data())
    assert manifest["teacher_sha256"] == teacher.digest == teacher.network.origin.digest
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all({"clean_kl", "adv_kl"} <= set(line["train"]["experts"]) for line in lines)
    assert all("ce" not in line["train"]["experts"] for line in lines)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "last")  # as if stopped after the best of the epochs
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert_same(run, whole)

    # A teacher that lies elsewhere by now is the same one; another is not.
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(taught_by, moved)
    resume(run, teacher=str(moved))
    shutil.copytree(whole, other)
    with pytest.raises(InputError, match=r"training.teacher must be what the run began with \(SHA-256 \w+\), got \w+$"):
        resume(run, teacher=str(other))
    with pytest.raises(InputError, match=r"training.teacher must be left out for a run without a teacher"):
        resume(taught_by, teacher=str(moved))


@pytest.mark.parametrize("method", ["at", "at-routers", "at-experts", "sparse"])
def test_every_method_that_is_attacked_can_be_taught(taught_by, tmp_path, method):
    training = {"method": method, "teacher": str(taught_by), "epochs": 1}
    model = {"kind": "sparse"} if method == "sparse" else {}
    if method == "sparse":
        training |= {"prune_epochs": 1, "finetune_epochs": 1}
    if method.startswith("at-"):
        start = train(tiny({"method": "standard", "epochs": 1}), run_dir=tmp_path / "start", **THREADS)
        training["init_from"] = str(start)
    run = train(tiny(training, model=model), run_dir=tmp_path / "run", **THREADS)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == (3 if method == "sparse" else 1)
    assert all({"clean_kl", "adv_kl"} <= set(next(iter(line["train"].values()))) for line in lines)


def test_a_network_of_the_user_s_own_teaches_and_is_never_executed_unasked(own, tmp_path):
    torch.manual_seed(1)
    network = nn.Linear(64, 10)
    save_file({f"fc.{name}": value for name, value in network.state_dict().items()}, tmp_path / "w.safetensors")
    training = {"method": "at", "epochs": 1, "teacher": f"{own}:net"}
    config = tiny({**training, "teacher_weights": str(tmp_path / "w.safetensors")})
    teacher = teacher_of(config.training, data(), torch.device("cpu"))
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(teacher(x), network(x.flatten(1)))
    run = train(tiny(training), run_dir=tmp_path / "run", **THREADS)
    with pytest.raises(InputError, match=r"training.teacher must be given again for .*own.py:net .*got nothing"):
        resume(run)
    resume(run, teacher=f"{own}:net")
    with pytest.raises(
        InputError, match="teacher_weights must be left out for a run whose teacher has no file of weig"
    ):
        resume(run, teacher=f"{own}:net", teacher_weights="w.safetensors")


def test_a_teacher_and_its_weights_may_lie_elsewhere_when_a_run_goes_on(own, tmp_path, capsys):
    torch.manual_seed(1)
    save_file({f"fc.{n}": value for n, value in nn.Linear(64, 10).state_dict().items()}, tmp_path / "w.safetensors")
    training = {
        "method": "at",
        "epochs": 1,
        "teacher": f"{own}:net",
        "teacher_weights": str(tmp_path / "w.safetensors"),
    }
    run = train(tiny(training), run_dir=tmp_path / "run", **THREADS)
    Path(own).rename(tmp_path / "moved.py")
    (tmp_path / "w.safetensors").rename(tmp_path / "v.safetensors")
    words = ["--training.teacher", f"{tmp_path / 'moved.py'}:net"]
    words += ["--training.teacher_weights", str(tmp_path / "v.safetensors")]
    assert cli.main(["train", "--resume", str(run), *words]) == 0
    script = tmp_path / "job.sh"
    assert cli.main(["train", "--resume", str(run), *words, "--sbatch", str(script)]) == 0
    assert " ".join(words) in script.read_text()


def test_teachers_that_do_not_fit_are_refused_in_one_line(own, taught_by, tmp_path):
    for name in ("coloured", "few", "named", "small"):
        (tmp_path / name).mkdir()
    coloured = create_model("wrn-10-1", kind="dense", width=4, num_classes=10, input_size=8, in_channels=3)
    save_model(coloured, tmp_path / "coloured")
    few = create_model("wrn-10-1", kind="dense", width=4, num_classes=3, input_size=8, in_channels=1)
    save_model(few, tmp_path / "few")
    named = create_model("wrn-10-1", kind="dense", width=4, num_classes=10, input_size=8, in_channels=1)
    named.spec["classes"] = ["zero", *"123456789"]
    save_model(named, tmp_path / "named")
    small = create_model("wrn-10-1", kind="dense", width=4, num_classes=10, input_size=16, in_channels=1)
    save_model(small, tmp_path / "small")
    for name, message in {
        str(tmp_path / "nothing"): "training.teacher .*nothing: ",
        "zoo:nothing": "training.teacher zoo:nothing: zoo:NAME must be one of ",
        str(tmp_path / "coloured"): r"must be of the data's \(classes, channels\) \(10, 1\), got \(10, 3\) of ",
        str(tmp_path / "few"): r"must be of the data's \(classes, channels\) \(10, 1\), got \(3, 1\) of ",
        str(tmp_path / "named"): "must be of the data's classes in their order, got 'zero' for '0' in ",
        str(tmp_path / "small"): "must be of the data's images, 8x8, got one of 16x16: ",
        f"{own}:probabilities": "must make finite logits, the same each time, got probabilities of ",
        f"{own}:nan": "must make finite logits, the same each time, got NaN or infinite ones of ",
        f"{own}:random": "must make finite logits, the same each time, got others at each call of ",
        f"{own}:several": "must make logits of the data's 10 classes, got a tuple of ",
        f"{own}:few": r"must make logits of the data's 10 classes, got \(3,\) of ",
        f"{own}:function": "must be a torch.nn.Module, got a function of ",
        f"{own}:none": "training.teacher .*own.py:none: ",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load_teacher(tiny({"teacher": name}).training, data())
        assert "training.teacher" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="of the data's"):
        train(tiny({"teacher": str(tmp_path / "few")}), run_dir=tmp_path / "run", **THREADS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"teacher": "run", "method": "standard"}, "training.method must be one that trains against attacks when tr"),
        ({"teacher": "run", "objective": "pgd-at"}, "training.objective must be trades when training.teacher is given"),
        ({"teacher": "run", "label_smoothing": 0.1}, "training.label_smoothing must be 0 when training.teacher is giv"),
        ({"teacher": "run", "attack_loss": "ce"}, "training.attack_loss must be kl, or left out, when training.tea"),
        ({"teacher_weights": "w.safetensors"}, "training.teacher_weights must be left out unless training.teacher is"),
        ({"teacher": "run", "teacher_weights": "w"}, "training.teacher_weights must be left out unless training.teach"),
        ({"teacher": "run", "distill_weight": 1.5}, "training.distill_weight must be >= 0 and <= 1, got 1.5"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(training, message):
    with pytest.raises(InputError, match=message):
        tiny(training)


def test_what_says_nothing_with_or_without_a_teacher():
    assert "training.distill_weight" in tiny({}).idle() and "training.beta" not in tiny({}).idle()
    taught = tiny({"teacher": "run"}).idle()
    assert "training.beta" in taught and "training.distill_weight" not in taught

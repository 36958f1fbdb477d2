"""`advmoe train`: what the command line passes on, and makes of the outcome. Runs themselves are replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from advmoe import cli
from advmoe.config import Config
from advmoe.recipes import recipe

TRAIN = ("train", "--config", "digits-advmoe")


def fake(monkeypatch: pytest.MonkeyPatch, target: str, outcome: BaseException | None = None) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Path:
        seen.update(kwargs, args=args)
        if outcome is not None:
            run_dir = kwargs.get("run_dir", args[0])
            run_dir.mkdir(exist_ok=True)
            (run_dir / "config.yaml").write_text("model: {}\n")
            raise outcome
        return Path("run")

    monkeypatch.setattr(target, call)
    return seen


def test_print_config_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["--threat.eps", "4/255", "--training.weight_decay", "1e-3", "--data.augment", "true"]
    argv = [*TRAIN, *overrides, "--training.epochs=7", "--data.image_size", "null", "--print_config"]
    assert cli.main(argv) == 0
    first = capsys.readouterr()
    assert first.err == ""
    config = Config.from_dict(yaml.safe_load(first.out))
    expected = Config.from_dict(recipe("digits-advmoe"))
    expected.threat.eps = config.threat.eps
    expected.training.weight_decay, expected.training.epochs = 0.001, 7
    expected.data.augment, expected.data.image_size = True, None
    assert config == expected
    assert str(config.threat.eps) == "4/255"

    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.yaml").write_text(first.out)
    assert cli.main(["train", "--config", "mine.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == first.out


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group, fields in Config().to_dict().items():
        for name in fields:
            assert f"--{group}.{name} " in text
    assert "--training.lr NUMBER Peak learning rate, annealed to 0 by a cosine" in text
    assert "(default: 8/255)" in text


def test_train_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen = fake(monkeypatch, "advmoe.training.run.train")
    monkeypatch.chdir(tmp_path)
    argv = [*TRAIN, "--training.seed", "3", "--devices", "2", "--threads", "1", "--accelerator", "cpu", "--tensorboard"]
    argv += ["--max-hours", "0.5"]
    argv += ["--training.attack_start", "uniform", "--training.attack_loss", "null", "--training.router_lr", "0.01"]
    assert cli.main(argv) == 0
    (config,) = seen.pop("args")
    assert config.training.seed == 3 and config.model.width == 16
    assert config.training.inner == ("uniform", "kl") and config.training.router_lr == 0.01
    assert seen == {
        "run_dir": Path("runs/digits-advmoe-3"),
        "name": "digits-advmoe",
        "devices": 2,
        "num_nodes": None,
        "accelerator": "cpu",
        "threads": 1,
        "max_hours": 0.5,
        "command": ["advmoe", *argv],
        "tensorboard": True,
    }
    assert "advmoe evaluate runs/digits-advmoe-3" in capsys.readouterr().out


def test_training_tells_which_experts_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = [{"layer": 0, "dead_experts": [1]}, {"layer": 1, "dead_experts": []}, {"layer": 2, "dead_experts": [0]}]
    last = [{"layer": 0, "dead_experts": []}, {"layer": 1, "dead_experts": []}, {"layer": 2, "dead_experts": [0, 3]}]

    def train(config: Config, *, run_dir: Path, **_: Any) -> None:
        run_dir.mkdir()
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"layers": each}) + "\n" for each in lines))

    monkeypatch.setattr("advmoe.training.run.train", train)
    lines = [earlier, last]
    assert cli.main([*TRAIN, "--run-dir", "routed"]) == 0
    told = "note  experts chosen for no image in the last epoch, in 1 of 3 layers (layer 2: 0 3)"
    assert capsys.readouterr().out.splitlines()[0] == told
    lines = [earlier, [{"layer": 0, "dead_experts": []}]]
    assert cli.main([*TRAIN, "--run-dir", "alive"]) == 0
    assert capsys.readouterr().out.startswith("run ")


def test_resume_keeps_the_run_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Config().dump(tmp_path / "config.yaml")
    seen = fake(monkeypatch, "advmoe.training.run.resume")
    assert cli.main(["train", "--resume", str(tmp_path), "--threads", "2"]) == 0
    # What is not named is left to the run's manifest.
    unnamed = dict.fromkeys(["source", "devices", "num_nodes", "max_hours"])
    assert seen == {"args": (tmp_path,), "tensorboard": False, "threads": 2, **unnamed}
    assert cli.main(["train", "--resume", str(tmp_path), "--accelerator", "cpu"]) == 0
    assert seen["accelerator"] == "cpu"


def test_how_training_can_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from advmoe.training import run

    def end(name: str, outcome: BaseException) -> tuple[int, str]:
        fake(monkeypatch, "advmoe.training.run.train", outcome)
        try:
            code = cli.main([*TRAIN, "--run-dir", str(tmp_path / name)])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        return code, capsys.readouterr().err

    code, text = end("a", KeyboardInterrupt())
    assert (code, text) == (130, f"advmoe: error: interrupted; to continue: advmoe train --resume {tmp_path / 'a'}\n")
    code, text = end("b", run.TrainingDiverged("step 3: the loss\nis nan"))
    assert (code, text) == (1, "advmoe: error: step 3: the loss is nan\n")
    # An error that this package did not raise is a bug, and is not dressed up as a mistake of the user's.
    with pytest.raises(ValueError, match="a library's"):
        end("c", ValueError("a library's"))

"""Run directories of strangers, and damaged ones."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from advmoe import load_run, save_pretrained
from advmoe.cli import main
from advmoe.evaluation.runs import dissect_run, evaluate_run
from advmoe.evaluation.subject import open_subject
from advmoe.hub.card import Record
from advmoe.models import create_model, save_model
from advmoe.models.state import digest
from advmoe.report.results import load_results
from advmoe.rundir import (
    Epochs,
    config_note,
    damaged,
    digest_at,
    is_put_away,
    put_away,
    require_plain,
    sealed,
    stale,
    stored_digest,
    unsealed,
)
from advmoe.training.run import resume

FAST = {"num_examples": 12, "accelerator": "cpu", "threads": 1}
OPTIONS = ["--num-examples", "4", "--accelerator", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, make_digits_run):
    """A run that was evaluated and dissected."""
    run = make_digits_run(tmp_path_factory.mktemp("runs") / "run")
    evaluate_run(run, workers=1, **FAST)
    dissect_run(run, **FAST)
    return run


@pytest.fixture
def run(measured, tmp_path):
    return Path(shutil.copytree(measured, tmp_path / "run"))


@pytest.fixture
def elsewhere(tmp_path):
    """What a stranger's links point to."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "token.json").write_text('{"name": "x", "command": [], "devices": 1, "threads": 1, "token": "SECRET"}')
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def spoil(path, how, elsewhere):
    """Put a link, or a pipe, in the place of `path`."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere if how == "folder" else elsewhere / how)


PLACES = [
    (".evaluation", "folder"), ("manifest.json", "token.json"), ("metrics.jsonl", "new.jsonl"), ("last", "folder"),
    ("dissection-pgd-2.svg", "thesis.tex"), ("tensorboard", "folder"), ("model.safetensors", "pipe"),
    ("best/state.pt", "thesis.tex"), ("gallery.npz", "pipe"), ("evaluation.json", "dangling"),
]  # fmt: skip


def refused(words, path, capsys):
    """The command ends with one line that names `path`, and waits for nothing."""

    def hang(number, frame):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        code = main(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1, (words, code, said)
    assert f"{path} must be a plain file or folder" in said[0]


@pytest.mark.parametrize(("place", "how"), PLACES, ids=[place for place, _ in PLACES])
def test_nothing_in_a_run_is_reached_through_a_link_or_waited_for(run, elsewhere, tmp_path, capsys, place, how):
    spoil(run / place, how, elsewhere)
    before = contents(elsewhere)
    refused(["report", str(run), "-o", str(tmp_path / "page.html")], run / place, capsys)
    for call in (load_run, resume, Record.read, lambda path: save_pretrained(path, tmp_path / "other")):
        with pytest.raises(ValueError, match="must be a plain file or folder"):
            call(run)
    assert contents(elsewhere) == before and not (tmp_path / "page.html").exists() and not (tmp_path / "other").exists()


COMMANDS = {
    "evaluate": OPTIONS, "dissect": OPTIONS, "sweep-eps": [*OPTIONS, "--eps", "0,0.1"], "pathways": OPTIONS,
    "cost": ["--batch", "1"], "export": ["--format", "torch-export"], "report": [], "push": ["somebody/something"],
}  # fmt: skip


@pytest.mark.parametrize("command", [*COMMANDS, "train", "against"])
def test_every_command_refuses_links_in_a_run(run, elsewhere, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (run / "last" / "deep").mkdir(parents=True)
    spoil(run / "last" / "deep" / "down", "folder", elsewhere)
    before = contents(elsewhere), sorted(tmp_path.rglob("*"))
    if command == "against":
        sound = shutil.copytree(run, tmp_path / "sound", symlinks=True)
        shutil.rmtree(sound / "last")
        before = contents(elsewhere), sorted(tmp_path.rglob("*"))
        words = ["pathways", str(sound), *OPTIONS, "--against", str(run)]
    elif command == "train":
        words = ["train", "--resume", str(run), "--accelerator", "cpu"]
    else:
        words = [command, str(run), *COMMANDS[command]]
    refused(words, run / "last" / "deep" / "down", capsys)
    assert (contents(elsewhere), sorted(tmp_path.rglob("*"))) == before


def test_a_place_for_results_may_hold_links_of_its_owner_but_not_where_batches_are_kept(run, elsewhere, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "data").symlink_to(elsewhere)
    (out / "evaluation.json").symlink_to(elsewhere / "thesis.tex")
    before = contents(elsewhere)
    evaluate_run(run, out=out, workers=1, **FAST)
    assert not (out / "evaluation.json").is_symlink() and contents(elsewhere) == before
    (out / ".evaluation").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"\.evaluation must be a plain file or folder"):
        evaluate_run(run, out=out, workers=1, **FAST)
    assert contents(elsewhere) == before


def test_plain_is_what_lies_below_not_the_name_that_leads_there(tmp_path, run):
    (tmp_path / "short").symlink_to(run)
    require_plain(tmp_path / "short")
    require_plain(tmp_path / "nothing there", itself=True)
    for itself in (tmp_path / "short", run / "model.json"):
        with pytest.raises(ValueError, match="must be a plain file or folder"):
            require_plain(itself, itself=True)
    assert load_run(tmp_path / "short").routed


def test_files_that_come_and_go_are_no_links(tmp_path):
    """Training writes into a run while others look."""
    stop = threading.Event()

    def write():
        while not stop.is_set():
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "file").write_text("x")
            shutil.rmtree(tmp_path / "folder")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            require_plain(tmp_path)
    finally:
        stop.set()
        writer.join()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link must be a plain file or folder"):
        require_plain(tmp_path)


# Which weights


def flip(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def first_weight(path):
    """Where the numbers begin in a weights file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("at", [0, 3, 1001, -1])
def test_one_flipped_bit_of_the_weights_is_noticed(run, at):
    weights = run / "model.safetensors"
    flip(weights, at if at < 0 else first_weight(weights) + at)
    with pytest.raises(ValueError, match=r"model\.safetensors and model\.json must be as they were written together"):
        load_run(run)


def test_weights_are_those_of_their_description(run):
    """The number of experts shows in the shapes; pixel statistics are weights too, but the scale's name is not."""
    spec = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(spec | {"experts_init": "shared"}))
    with pytest.raises(ValueError, match="must be as they were written together"):
        load_run(run)


def test_a_digest_is_of_values_names_and_shapes_alone(run):
    model = load_run(run)
    known = digest(model)
    assert known == model.origin.digest == stored_digest(run / "model.safetensors")
    assert digest(model.to(memory_format=torch.channels_last)) == known
    assert digest(load_run(run)) == known
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert digest(model) != known
    one, other = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        one.weight.zero_(), other.weight.zero_()
    assert digest(one) != digest(other)  # the same bytes


def test_weights_without_a_digest_are_read_as_before(run):
    state = load_file(run / "model.safetensors")
    save_file(state, run / "model.safetensors")
    assert stored_digest(run / "model.safetensors") is None
    assert digest_at(run) == digest(load_run(run))  # made from the files, and from the model
    assert load_run(run).origin.digest == digest(load_run(run))


def test_weights_are_damaged_where_they_are_not_of_their_digest(run):
    weights = run / "model.safetensors"
    assert not damaged(run)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert damaged(run)
    weights.write_bytes(content[:-1])
    assert damaged(run)
    weights.unlink()
    assert damaged(run)


def other_weights(run):
    """Put other weights in the place of a run's, as training on does."""
    model = load_run(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    save_model(model, run)


def test_results_say_of_which_weights_they_are_and_stale_ones_are_left_out(run, tmp_path):
    known = stored_digest(run / "model.safetensors")
    assert json.loads((run / "evaluation.json").read_text())["model_sha256"] == known
    assert json.loads((run / "dissection.json").read_text())["pgd-2"]["model_sha256"] == known
    (fresh,) = load_results([run])
    assert fresh.evaluation and fresh.dissection and fresh.notes == ()
    save_pretrained(run, tmp_path / "fresh")
    assert "worst case over all" in (tmp_path / "fresh" / "README.md").read_text()
    assert stored_digest(tmp_path / "fresh" / "model.safetensors") == known

    other_weights(run)
    (late,) = load_results([run])
    assert not late.evaluation and not late.dissection
    assert late.notes == tuple(
        f"{name}.json is of other weights than these, and left out" for name in ("evaluation", "dissection")
    )
    save_pretrained(run, tmp_path / "late")
    card = (tmp_path / "late" / "README.md").read_text()
    assert "**Not evaluated.** The evaluation beside the run is of other weights than these." in card
    assert not (tmp_path / "late" / "evaluation.json").exists()


def test_a_loaded_model_knows_its_run_until_it_is_changed(run, tmp_path):
    model = load_run(run)
    save_pretrained(model, tmp_path / "same")
    assert (tmp_path / "same" / "evaluation.json").is_file()
    assert "worst case over all" in (tmp_path / "same" / "README.md").read_text()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save_pretrained(model, tmp_path / "changed")
    assert not (tmp_path / "changed" / "evaluation.json").exists()
    assert "**Not evaluated.**" in (tmp_path / "changed" / "README.md").read_text()


def test_a_model_that_changes_while_it_is_measured_is_refused(run):
    """Each process loads it for itself: numbers of two models are numbers of none."""
    given = open_subject(run, num_examples=4)
    given.load(torch.device("cpu"))
    other_weights(run)
    with pytest.raises(ValueError, match="must make the same weights every time it is loaded"):
        given.load(torch.device("cpu"))


def test_a_factory_that_draws_other_weights_each_time_is_refused(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "import os, torch\n"
        "def net():\n"
        "    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))\n"
        "    with torch.no_grad():\n"
        "        layer[1].bias.copy_(torch.frombuffer(bytearray(os.urandom(10)), dtype=torch.uint8))\n"
        "    return layer\n"
    )
    given = open_subject(f"{file}:net", overrides={"data": {"name": "digits"}}, num_examples=4, writes=False)
    with pytest.raises(ValueError, match="must make the same weights every time"):
        given.load(torch.device("cpu"))


# Damage that shows


@pytest.mark.parametrize("edit", [('"epoch": 2', '"epoch": 3'), ("0.5", "0.6"), ("}\n", "}}\n"), ('"kl"', '"k\x00"')])
def test_a_damaged_epoch_is_named_and_so_is_the_gap(tmp_path, edit):
    path = tmp_path / "metrics.jsonl"
    lines = [{"epoch": epoch, "train": {"kl": 0.5 * epoch}, "seconds": 1.0} for epoch in (1, 2, 3)]
    Epochs(lines).write(path)
    assert Epochs.read(path) == Epochs(lines)
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + (second.replace(*edit) if edit[1] != "0.6" else second.replace("1.0", "1.5")) + third)
    found = Epochs.read(path)
    assert found.lines == [lines[0], lines[2]]
    assert found.problems == [f"{path} is damaged in line 2, left out", f"{path} lacks epoch 2"]
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold JSON in every line, got .* in line 2"):
        Epochs.read(path, strict=True)


def test_lines_of_metrics_that_are_none_of_ours_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n[]\n3\n{"lr": 1}\n{"epoch": null}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    epochs = Epochs.read(path).upto(2)
    assert epochs.lines == [{"epoch": 1}, {"epoch": 2}]
    assert epochs.problems == [f"{path} is damaged in line 2, 3, 8, left out"]
    epochs.write(path)
    assert Epochs.read(path) == Epochs([{"epoch": 1}, {"epoch": 2}])


def test_the_same_numbers_have_the_same_checksum_however_long_they_took():
    result = {"clean": 0.5, "attacks": {"pgd": {"robust": 0.25, "seconds": 3.0}}, "cost": {"ms_per_image": 2.0}}
    later = {"clean": 0.5, "attacks": {"pgd": {"robust": 0.25, "seconds": 4.0}}, "cost": {"ms_per_image": 5.0}}
    assert sealed(result)["checksum"] == sealed(later)["checksum"]
    assert unsealed(sealed(result), "it") == result
    for changed in ({"clean": 0.6}, {"attacks": {"pgd": {"robust": 0.3, "seconds": 3.0}}}, {"more": 1}):
        with pytest.raises(ValueError, match="it must be as it was written"):
            unsealed(sealed(result) | changed, "it")
    assert unsealed(result, "it") == result
    with pytest.raises(ValueError, match="it must be as it was written"):
        unsealed(result, "it", required=True)


def test_a_result_that_was_edited_is_refused(run, tmp_path):
    evaluation = run / "evaluation.json"
    found = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(found | {"clean_accuracy": 0.99}))
    for call in (lambda: load_results([run]), lambda: save_pretrained(run, tmp_path / "card")):
        with pytest.raises(ValueError, match=r"evaluation\.json must be as it was written"):
            call()


def test_stale_is_what_is_known_to_be_of_other_weights():
    assert stale({"model_sha256": "a"}, "b")
    assert not any(stale(*each) for each in (({"model_sha256": "a"}, "a"), ({}, "b"), ({"model_sha256": "a"}, None)))


def test_a_configuration_that_is_not_the_one_it_began_with_is_said(tmp_path):
    (tmp_path / "manifest.json").write_text('{"config_sha256": "a"}')
    assert config_note(tmp_path, "a") is None
    assert config_note(tmp_path, "b") == f"{tmp_path / 'config.yaml'} is not what the run began with"
    (tmp_path / "manifest.json").write_text("{}")
    assert config_note(tmp_path, "b") is None and config_note(tmp_path / "none", "b") is None


def test_a_run_whose_weights_are_put_away_keeps_the_rest(tmp_path):
    model = create_model("wrn-10-1", num_classes=3, width=4)
    save_model(model, tmp_path)
    for name in ("best", "last", "last-previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "best-of-all.txt").write_text("the user's")
    size, known = (tmp_path / "model.safetensors").stat().st_size, digest_at(tmp_path)
    assert not is_put_away(tmp_path)
    assert put_away(tmp_path) == size + 3 * 4 and is_put_away(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "best-of-all.txt",
        "manifest.json",
        "model.json",
        "put-away.json",
    ]
    assert json.loads((tmp_path / "put-away.json").read_text()) == {"model_sha256": known}
    assert put_away(tmp_path) == 0 and json.loads((tmp_path / "put-away.json").read_text()) == {"model_sha256": known}
    save_model(model, tmp_path)  # trained again
    assert not is_put_away(tmp_path)

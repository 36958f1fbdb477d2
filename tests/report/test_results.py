import json
import os

import numpy as np
import pytest

from advmoe.report.results import RunFolder, StudyFolder, load_results, with_gallery


def loaded(path):
    (run,) = load_results([path])
    return run


def commands(run):
    return {each.title: each.command for each in run.result_states()}


def states(run):
    return {each.title: each.state for each in run.result_states()}


def test_a_run_with_everything(make_run):
    path = make_run("advmoe")
    run = loaded(path)
    assert (run.label, run.method, run.routed) == ("advmoe", "AdvMoE", True)
    assert run.model == "resnet18, r = 0.5, N = 2"
    assert [each["epoch"] for each in run.epochs] == [1, 2]
    assert run.gallery["clean"].shape == (2, 1, 8, 8)
    assert run.config_text == (path / "config.yaml").read_text()
    assert states(run) == dict.fromkeys(states(run), "there") | {"pathways": "missing"}


def test_a_plain_run_has_no_pathways(make_run):
    run = loaded(make_run("at", routed=False))
    assert (run.method, run.model, run.routed) == ("AT (Dense)", "resnet18", False)
    assert set(states(run)) == {"training", "accuracy under attack", "sweep over eps", "gallery"}


def test_a_run_with_nothing_but_its_configuration(make_run):
    path = make_run("bare", only=set())
    run = loaded(path)
    assert run.evaluation == run.manifest == {} and run.epochs == [] and run.gallery is None
    assert set(states(run).values()) == {"missing"}
    shown = commands(run)
    assert shown["training"] == f"advmoe train --config {path}/config.yaml --run-dir {path}-again"
    assert shown["accuracy under attack"] == f"advmoe evaluate {path}"
    assert shown["sweep over eps"] == f"advmoe sweep-eps {path} --eps 0,2/255,4/255,8/255,16/255"
    assert shown["dissection of the attack"] == f"advmoe dissect {path}"
    assert shown["gallery"] == f"advmoe report {path}"


def test_a_run_in_progress_is_continued(make_run):
    path = make_run("running", only={"manifest", "metrics"}, manifest={"command": ["advmoe", "train"]})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tra')
    run = loaded(path)
    assert len(run.epochs) == 2
    assert states(run)["training"] == "2 epochs so far"
    assert commands(run)["training"] == f"advmoe train --resume {path}"


def test_commands_repeat_the_measurements_that_are_there(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run("a run")
    shown = commands(loaded("runs/a run"))
    assert shown["training"] == "advmoe train --run-dir 'runs/a run'"
    assert shown["accuracy under attack"] == "advmoe evaluate 'runs/a run' --attacks pgd-10,routed --num-examples 40"
    eps = "--eps 0,4/255,8/255"
    assert shown["sweep over eps"] == f"advmoe sweep-eps 'runs/a run' {eps} --attacks pgd-10 --num-examples 40"
    assert shown["dissection of the attack"] == "advmoe dissect 'runs/a run' --attacks pgd-10 --num-examples 40"


def test_the_command_of_pathways(make_run):
    result = {
        "attack": {"name": "pgd-10"}, "num_examples": 20, "threat": {"norm": "linf", "eps": 0.1}, "seed": 3,
        "against": {"run": "runs/a mask"},
    }  # fmt: skip
    run = loaded(make_run("a", pathways=result))
    options = "--against 'runs/a mask' --attacks pgd-10 --num-examples 20 --threat.eps 0.1 --seed 3"
    assert commands(run)["pathways"] == f"advmoe pathways {run.path} {options}"
    assert set(states(run).values()) == {"there"}


def test_commands_name_what_is_not_the_runs_own(make_run):
    changed = {
        "robust_accuracy": {"pgd-20": 0.5}, "num_examples": 10, "threat": {"norm": "l2", "eps": 0.5},
        "attack": {"steps": 20, "step_size": 2 / 255, "restarts": 3, "pathways": 4, "batch_size": 20, "seed": 7},
        "checks": [{"name": "pixels", "passed": True}, {"name": "determinism", "passed": False}],
    }  # fmt: skip
    run = loaded(make_run("other", evaluation=changed))
    options = "--attacks pgd-20 --num-examples 10 --threat.norm l2 --threat.eps 0.5 --attack.steps 20"
    options += " --attack.restarts 3 --attack.pathways 4 --seed 7 --batch-size 20 --allow determinism"
    expected = f"advmoe evaluate {run.path} {options}"
    assert commands(run)["accuracy under attack"] == expected


def test_a_network_of_the_users_own_is_named_in_every_command(make_run):
    path = make_run("own", only={"metrics"})
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("source: null", "source: net.py:make net").replace("resnet18", "null"))
    run = loaded(path)
    assert run.model.startswith("a network of the user's")
    assert all(" --model 'net.py:make net'" in command for command in commands(run).values())


def test_plugins_are_named_in_every_command(make_run, monkeypatch):
    monkeypatch.setenv("ADVMOE_PLUGINS", os.pathsep.join(["a.py", "my plugin.py"]))
    shown = commands(loaded(make_run("a", only={"metrics"})))
    assert all(" --plugin a.py --plugin 'my plugin.py'" in command for command in shown.values())


def test_a_study(make_study):
    path = make_study()
    (study,) = load_results([str(path)])
    assert isinstance(study, StudyFolder) and study.title == "The paper's table1 (smoke)"
    assert study.content == json.loads((path / "study.json").read_text())


def test_studies_of_one_name_are_told_apart(make_study):
    paths = [make_study("table1"), make_study("table1-32", title="The paper's table1"), make_study("fig2")]
    titles = [each.title for each in load_results(paths)]
    assert titles == [
        "The paper's table1 (smoke, table1)", "The paper's table1 (smoke, table1-32)", "The paper's fig2 (smoke)"
    ]  # fmt: skip


def test_labels_tell_directories_apart_and_each_is_there_once(make_run, tmp_path):
    paths = [make_run(name, only=set()) for name in ("x/seed-0", "y/seed-0")]
    (tmp_path / "link").symlink_to(paths[0])
    results = load_results([paths[0], paths[1], f"{paths[1]}/.", tmp_path / "link"])
    assert [each.label for each in results] == ["x/seed-0", "y/seed-0"]
    assert [each.path for each in results] == paths


def test_a_gallery_that_was_made_in_the_meantime(make_run):
    run = loaded(make_run("late", only={"metrics"}))
    assert with_gallery(run, "no data").no_gallery == "no data"
    np.savez(run.path / "gallery.npz", **dict(loaded(make_run("other")).gallery))
    assert isinstance(with_gallery(run), RunFolder) and with_gallery(run).gallery["eps"] == pytest.approx(8 / 255)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "a: [1", "config.yaml must be valid YAML, got: "),
        ("config.yaml", "- 1", "config.yaml must hold fields by name, got list"),
        ("config.yaml", b"\xff\xfe", "config.yaml must be valid YAML, got: bytes that are not UTF-8"),
        ("evaluation.json", "{", "evaluation.json must be JSON, got"),
        ("sweep.json", "[]", "sweep.json must hold a JSON object, got a list"),
        ("metrics.jsonl", "{\n{}\n", "metrics.jsonl must hold JSON in every line, got .* in line 1"),
        ("gallery.npz", "no", "gallery.npz must be a gallery, got"),
        ("study.json", "1", "study.json must hold a JSON object, got a int"),
    ],
)
def test_what_cannot_be_read(make_run, name, text, message):
    path = make_run("damaged", only=set())
    (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_results([path])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": None}, "must be a gallery, got KeyError.*labels"),
        ({"labels": [1]}, "as many of each thing as images"),
        ({"clean": np.zeros((2, 8, 8))}, "must hold the arrays of a gallery, got clean of 3 axes"),
        ({"adversarial_pathway": np.zeros((2, 5), int)}, "as many of each thing as images"),
        ({"eps": np.array("x")}, "must hold the arrays of a gallery, got eps of 0 axes of <U1"),
        ({"clean": np.zeros((2, 1, 0, 8))}, "must hold images, got arrays of shape"),
        ({"index": np.zeros(40_000_000, np.int64)}, "must be a gallery, got .*arrays of more than 256000000"),
        ({"clean_pathway": np.zeros((2, 5000), int)}, "at most 1000 images and 4096 layers, got 2 and 5000"),
        ({"attack": np.array({}, dtype=object)}, "must be a gallery, got "),
    ],
)
def test_a_gallery_that_is_none(make_run, changed, message):
    path = make_run("damaged", only=set())
    arrays = dict(loaded(make_run("whole")).gallery) | changed
    np.savez_compressed(path / "gallery.npz", **{name: each for name, each in arrays.items() if each is not None})
    with pytest.raises(ValueError, match=message):
        load_results([path])


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_directory_that_is_neither(tmp_path, name):
    with pytest.raises(ValueError, match=r"RUN_OR_STUDY must be a run directory .* or a study .*, got "):
        load_results([tmp_path / name])

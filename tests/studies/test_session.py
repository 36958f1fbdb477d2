"""A whole study as its user runs it: real workers train and measure, and what is there already is not done again."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from advmoe.config import Config
from advmoe.report.pictures import Picture
from advmoe.studies.catalogue import STUDIES
from advmoe.studies.comparisons import ordering
from advmoe.studies.plan import PlannedMeasure, put_away_source
from advmoe.studies.results import Results, best_validation, point
from advmoe.studies.rows import Measure, Row
from advmoe.studies.session import Session, StudyOptions, plan_study, put_away_runs, run_study
from advmoe.studies.study import Study, StudyFindings
from advmoe.studies.tables import RA, SA, table

SMALL = {
    "model": {"width": 4},
    "data": {"image_size": 8},
    "training": {"epochs": 2, "batch_size": 640, "attack_steps": 1, "val_attack_steps": 1},
    "attack": {"steps": 2},
}
PGD = Measure("evaluate", {"attacks": ["pgd"], "num_examples": 30})


def first_stage(scale, _):
    return [Row(scale.run("AT (S-Dense)"), {"accuracy": PGD})]


def second_stage(scale, results):
    """One more run where the first has told how it went: robust routers, and so the standard MoE they start from."""
    told = [row.values(best_validation) for row in results]
    return [Row(scale.run("router-robustified MoE"), {"accuracy": PGD})] if told and told[0] else []


def show(scale, results):
    series = {row.name: [point(row, RA.value, 1)] for row in results}
    labels = {"xlabel": "x", "ylabel": "RA (%)"}
    figures = [
        Picture("lines", "tiny-ra", "RA", series, labels, "A caption."),
        Picture("lines", "tiny-none", "Nothing", {}, labels, "A caption."),
    ]
    shown = table("Tiny", results, ["method"], [RA, SA])
    return StudyFindings(tables=[shown], figures=figures, claims=[ordering(results)], notes=["A note."])


TINY = Study(
    name="tiny", title="A tiny study", shows="That it works.", stages=(first_stage, second_stage), show=show,
    varies=("training.lr",),
)  # fmt: skip


@pytest.fixture(scope="module")
def studies():
    """The catalogue with the study `tiny` in it, and one whose second row cannot be measured."""

    def broken(scale, results):
        plain = scale.run("AT (S-Dense)")
        return [*first_stage(scale, results), Row(plain, {"dissection": Measure("dissect", {"attacks": ["pgd"]})})]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDIES, "tiny", TINY)
        patch.setitem(STUDIES, "broken", replace(TINY, name="broken", stages=(broken, second_stage)))
        yield


def options(root, **changes):
    return StudyOptions(root=root, accelerator="cpu", overrides=SMALL, command=["advmoe", "study", "tiny"], **changes)


@pytest.fixture(scope="module")
def done(studies, tmp_path_factory):
    """The study run for the first time: its root, what was heard meanwhile, its folder, the content of `study.json`."""
    root, heard = tmp_path_factory.mktemp("studies"), []
    home, content = run_study("tiny", options(root), lambda word, task: heard.append((word, task)))
    return root, heard, home, content


def names(heard):
    return [
        (word, task.run.name if isinstance(task, PlannedMeasure) else task.name, getattr(task, "kind", "train"))
        for word, task in heard
    ]


DENSE, ROUTED, START = (
    f"{name}, ResNet-18 of width 4, digits at 8 pixels"
    for name in ("AT (S-Dense)", "router-robustified MoE", "standard MoE")
)


@pytest.mark.slow
def test_a_study_trains_and_measures_stage_by_stage(done):
    root, heard, home, _ = done
    expected = [(DENSE, "train"), (DENSE, "evaluate"), (START, "train"), (ROUTED, "train"), (ROUTED, "evaluate")]
    assert names(heard) == [(word, *each) for each in expected for word in ("starts", "done")]
    assert home == root / "tiny-smoke"
    keys = {task.key for _, task in heard if not isinstance(task, PlannedMeasure)}
    assert {path.name for path in (root / "runs").iterdir() if path.is_dir()} == keys
    assert {task.state() for _, task in heard} == {"finished"}


@pytest.mark.slow
def test_study_json_holds_what_was_found_and_what_made_it(done):
    root, heard, home, content = done
    assert json.loads((home / "study.json").read_text()) == content
    assert (content["study"], content["title"], content["scale"]) == ("tiny", "A tiny study", "smoke")
    assert content["seeds"] == [0] and content["command"] == "advmoe study tiny"
    assert content["settings"]["training"]["epochs"] == 2 and content["settings"]["threat"]["eps"] == 0.1
    assert content["settings"]["model"]["width"] == 4
    assert "kind" not in content["settings"]["model"]  # what all runs share, and nothing else
    machine = content["made_on"]
    assert machine["torch"] == [content["shown_by"]["versions"]["torch"]] and machine["device"] == ["cpu"]
    assert machine["threads"] == [1] and len(machine["git_commit"]) <= 1

    (shown,) = content["tables"]
    assert [row["method"] for row in shown["rows"]] == ["AT (S-Dense)", "router-robustified MoE"]
    (evaluation,) = (
        task.result for word, task in heard if word == "done" and task.id.startswith(f"{key(content, DENSE)}/")
    )
    evaluated = json.loads(evaluation.read_text())
    assert evaluated["num_examples"] == 30 and list(evaluated["robust_accuracy"]) == ["pgd-2"]
    assert shown["rows"][0]["ra_pgd"]["mean"] == 100 * evaluated["robust_accuracy"]["pgd-2"]

    (figure,) = content["figures"]
    # From the settings, whatever the scale says; the routed run alone has experts.
    size = "2 epochs, 320 training images, linf, eps 0.1, K = 1, r = 0.5, N = 2; PGD of 2 steps, 30 test images"
    assert content["size"] == size
    assert shown["caption"] == f"Tiny. {size}."
    assert (figure["id"], figure["kind"], figure["caption"]) == ("tiny-ra", "lines", f"A caption. {size}.")
    assert figure["alt"].startswith("Lines of RA (%) against x. ") and set(figure["data"]) == {DENSE, ROUTED}
    for suffix in ("svg", "png"):
        assert figure[suffix] == f"figures/tiny-ra.{suffix}" and (home / figure[suffix]).is_file()
    assert content["notes"] == ["A note.", "Nothing was measured for the figure 'Nothing'."]
    assert [claim["name"] for claim in content["claims"]] == ["ordering"]

    assert [(run["name"], run["status"], run["error"]) for run in content["runs"]] == [
        (name, "finished", None) for name in (DENSE, START, ROUTED)
    ]
    for run in content["runs"]:
        assert run["path"] == str(root / "runs" / run["key"]) and run["seed"] == 0 and run["seconds"] > 0
    assert content["seconds"] >= sum(run["seconds"] for run in content["runs"])
    # The run started from the one of the same seed.
    config = Config.load(root / "runs" / key(content, ROUTED) / "config.yaml")
    assert config.training.init_from == str(root / "runs" / key(content, START))


def key(content, name):
    return next(run["key"] for run in content["runs"] if run["name"] == name)


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(done):
    root, _, home, content = done
    heard = []
    again, second = run_study("tiny", options(root), lambda word, task: heard.append(word))
    assert (again, heard) == (home, [])
    assert {**second, "created": 0} == {**content, "created": 0}


@pytest.mark.slow
def test_an_interrupted_run_is_continued_and_what_fails_is_reported_and_tried_once(done, tmp_path):
    root, _, _, content = done
    shutil.copytree(root, tmp_path / "studies")
    # The states of the run between its epochs, as an interruption there leaves it.
    run = tmp_path / "studies" / "runs" / key(content, DENSE)
    whole, metrics = load_file(run / "model.safetensors"), (run / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(run / "last")
    (run / "last-previous").rename(run / "last")
    shutil.rmtree(run / "measures")
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "finished": None}))

    heard = []
    _, second = run_study(
        "broken",
        options(tmp_path / "studies"),
        lambda word, task: heard.append((word if word in ("starts", "done") else "failed", task)),
    )
    assert names(heard) == [
        ("starts", DENSE, "train"), ("done", DENSE, "train"), ("starts", DENSE, "evaluate"),
        ("done", DENSE, "evaluate"), ("starts", DENSE, "dissect"), ("failed", DENSE, "dissect"),
    ]  # fmt: skip
    # The first epoch was not trained again, and the second ends where it did.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and lines[0] == metrics[0]
    again = load_file(run / "model.safetensors")
    assert again.keys() == whole.keys() and all(again[name].equal(whole[name]) for name in whole)

    (failed,) = [each for each in second["runs"] if each["status"] != "finished"]
    assert (failed["name"], failed["status"]) == (DENSE, "failed")
    assert failed["error"].startswith("a model to dissect must have MoE layers")
    # It costs no other number.
    assert second["tables"][0]["rows"][0] == content["tables"][0]["rows"][0]


@pytest.mark.slow
def test_a_plan_holds_later_stages_once_the_earlier_are_finished(done, tmp_path):
    root, _, _, content = done
    tasks = plan_study("tiny", options(root))
    assert {task.state() for task in tasks.values()} == {"finished"} and len(tasks) == 5
    fresh = plan_study("tiny", options(tmp_path / "new", seeds=2))
    assert [task.state() for task in fresh.values()] == ["missing"] * 4 and not (tmp_path / "new").exists()
    assert key(content, DENSE) in fresh  # the same run, wherever it will lie
    part = options(root, only=["s-dense", "N = 2+r = 0.5"])
    assert Session(STUDIES["tiny"], part).home == root / "tiny-smoke-s-dense-N_2+r_0.5"  # beside the whole one's
    planned = plan_study("tiny", options(root, only=["s-dense"]))
    assert list(planned) == [name for name in tasks if name.split("/")[0] == key(content, DENSE)]


@pytest.mark.slow
def test_a_run_that_lies_there_and_was_trained_otherwise_is_refused(done, tmp_path):
    _, _, _, content = done
    run = tmp_path / "runs" / key(content, DENSE)
    run.mkdir(parents=True)
    Config.from_dict(SMALL).dump(run / "config.yaml")
    for call in (plan_study, run_study):
        with pytest.raises(ValueError, match=rf"^{run} must hold the run {key(content, DENSE)}, got "):
            call("tiny", options(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "--scale must be one of smoke, cpu, paper, got 'huge'"),
        ({"seeds": 0}, "--seeds must be >= 1, got 0"),
        ({"seeds": 21}, "--seeds must be <= 20, got 21"),
        ({"num_examples": 0}, "--num-examples must be >= 1, got 0"),
        ({"jobs": 0}, "--jobs must be >= 1, got 0"),
        ({"threads": -1}, "--threads must be >= 1, got -1"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError) as error:
        StudyOptions(**options)
    assert str(error.value) == message


def test_results_go_to_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--out must be a folder, or new, got '.*file'$"):
        StudyOptions(root=tmp_path / "file")


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("model", "kind", "dense"), ("model", "name", "vgg16"), ("model", "source", "a.py:b"),
        ("model", "to_moe", True), ("data", "name", "cifar10"), ("training", "method", "at"), ("training", "seed", 3),
        ("training", "init_from", "x"), ("training", "lr", 0.3),
    ],
)  # fmt: skip
def test_what_a_study_sets_or_varies_is_left_to_it(studies, tmp_path, group, field, value):
    with pytest.raises(ValueError) as error:
        plan_study("tiny", StudyOptions(root=tmp_path, overrides={group: {field: value}}))
    assert str(error.value) == f"{group}.{field} must be left to the study tiny, got {value!r}"


def test_a_field_that_no_row_can_use_is_refused(tmp_path):
    options = StudyOptions(scale="smoke", root=tmp_path, overrides={"training": {"finetune_lr": 0.01}})
    with pytest.raises(ValueError, match=r"^training.method must be sparse when training.finetune_lr is 0.01, got "):
        plan_study("fig2", options)


def test_only_must_leave_something(studies, tmp_path):
    with pytest.raises(ValueError) as error:
        plan_study("tiny", options(tmp_path, only=["VGG", "AdvMoE"]))
    assert str(error.value) == f"--only must be words of a run's name ({DENSE}), got VGG, AdvMoE"


def test_a_study_is_sized_by_its_scale_and_its_user():
    sized = StudyOptions(scale="cpu").sized()
    assert (sized.seeds, sized.examples, sized.autoattack[2]) == (5, 500, 100)
    sized = StudyOptions(scale="cpu", seeds=2, num_examples=7, overrides={"training": {"lr": 1.0}}).sized()
    assert (sized.seeds, sized.examples, sized.autoattack) == (2, 7, ("RA AutoAttack %", "autoattack", 7))
    assert sized.overrides == {"training": {"lr": 1.0}}
    assert sized.accuracy(sized.run("AT (MoE)")).options["num_examples"] == 7
    session = Session(TINY, StudyOptions(seeds=4))
    assert list(session.planner.seeds) == [0, 1, 2, 3] and session.home.name == "tiny-smoke"
    assert Results.read([]).rows == []


@pytest.mark.slow
def test_weights_are_put_away_and_the_study_stays_what_it_was(done, tmp_path):
    root, _, _, content = done
    shutil.copytree(root, tmp_path / "studies")
    here = options(tmp_path / "studies")
    tasks = plan_study("tiny", here).values()
    measured = next(task for task in tasks if isinstance(task, PlannedMeasure) and task.run.name == ROUTED)
    result = (measured.path / "done.json").read_text()
    (measured.path / "done.json").unlink()
    # What stages to come need is not known before the last is done, but for rows that are named.
    with pytest.raises(ValueError, match="--put-away must be of a study, or a part of it by --only, with no task left"):
        put_away_runs("tiny", here)
    weights = set((tmp_path / "studies" / "runs").glob("*/model.safetensors"))
    assert len(weights) == 3
    assert [run.name for run, _ in put_away_runs("tiny", replace(here, only=["S-Dense"]))] == [DENSE]
    assert len([path for path in weights if path.exists()]) == 2
    (measured.path / "done.json").write_text(result)
    assert {run.name for run, freed in put_away_runs("tiny", here) if freed} == {ROUTED, START}
    heard = []
    _, second = run_study("tiny", here, lambda word, task: heard.append(word))
    assert heard == []
    for part in ("tables", "claims", "figures"):
        assert second[part] == content[part]
    # What would need the weights says so, and how to have them again.
    (measured.path / "done.json").unlink()
    left = [task for task in plan_study("tiny", here).values() if task.state() == "missing"]
    assert [(task.id, put_away_source(task)) for task in left] == [(measured.id, measured.run)]
    _, third = run_study("tiny", here)
    (failed,) = [each for each in third["runs"] if each["status"] != "finished"]
    assert "must hold its weights, which --put-away dropped: remove the folder" in failed["error"]

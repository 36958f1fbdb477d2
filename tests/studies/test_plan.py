"""From rows to tasks: what comes first, what is one, what is there already."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from advmoe.config import Config
from advmoe.studies.plan import PlannedMeasure, PlannedRun, Planner, only
from advmoe.studies.results import Results
from advmoe.studies.rows import Measure, Row, TrainingRun
from advmoe.studies.scales import scale_named

COST = Measure("cost", {"batches": [1]})


def evaluate(*attacks, **more):
    return Measure("evaluate", {"attacks": list(attacks), **more})


def test_starts_and_what_is_compared_with_come_first(planner, tiny_run):
    grand = tiny_run("grand")
    start = tiny_run("start", start=grand, training={"lr": 0.2})
    run = tiny_run("run", start=start, training={"lr": 0.3})
    other = tiny_run("other", start=grand, training={"lr": 0.4})
    planned = planner.rows([Row(run, {"a": Measure("pathways", {}, other), "b": COST})])
    tasks = planner.tasks(planned)
    runs = {each.name: planner.run(each, 0) for each in (grand, start, run, other)}
    measures = planned[0].measures[0]
    assert list(tasks) == [
        *(runs[name].id for name in ("grand", "start", "run", "other")), measures["a"].id, measures["b"].id,
    ]  # fmt: skip
    assert runs["run"].needs == (runs["start"].id,) and runs["grand"].needs == ()
    assert measures["a"].needs == (runs["run"].id, runs["other"].id) and measures["b"].needs == (runs["run"].id,)
    assert runs["run"].config["training"]["init_from"] == str(runs["start"].path)
    for number, task in enumerate(tasks.values()):
        assert set(task.needs) <= set(list(tasks)[:number])


def test_the_same_run_is_one_task_whatever_it_is_called(planner, tiny_run):
    start, again = tiny_run("start"), tiny_run("start again")
    run = tiny_run("run", start=start, training={"lr": 0.3})
    twin = tiny_run("twin", start=again, training={"lr": 0.3, "momentum": 0.9})  # a default, spelt out
    other = tiny_run("other", start=start, training={"lr": 0.4})
    rows = planner.rows([Row(run, {"x": COST}), Row(twin, {"y": COST, "z": evaluate("pgd")}), Row(other, {"x": COST})])
    tasks = planner.tasks(rows)
    assert [task.name for task in tasks.values() if not isinstance(task, PlannedMeasure)] == ["start", "run", "other"]
    assert rows[0].measures[0]["x"].id == rows[1].measures[0]["y"].id != rows[2].measures[0]["x"].id
    assert len(tasks) == 3 + 3

    # So it is for another study, of another session.
    later = Planner(planner.root, [0])
    assert later.run(tiny_run("later", start=tiny_run("its start"), training={"lr": 0.3}), 0).id == rows[0].runs[0].id


def test_runs_of_studies_are_shared():
    scale = scale_named("smoke")
    planner = Planner(Path("runs"), [0])

    def key(method="AdvMoE", **settings):
        return planner.run(scale.run(method, **settings), 0).key

    assert key() == key(variant="both", more={"training": {"alternation": "both"}})
    assert key() == key(experts=2, scale=0.5, more={"model": {"num_experts": 2, "scale": 0.5}})
    assert key("AT (Dense)") == key("AT (Dense)", more={"model": {"scale": 0.8}})
    assert key("AT (MoE)") == key("AT (MoE)", more={"training": {"alternation": "both"}})  # says nothing about AT
    assert len({key(), key("AT (MoE)"), key("AT (S-Dense)"), key("AT (Dense)"), key(backbone="VGG-16")}) == 5
    # The same model trained from another start is another run.
    settings = {"training": {"lr": 0.3}}
    starts = [TrainingRun("a", scale.run("AT (MoE)").settings), TrainingRun("b", scale.run("AdvMoE").settings), None]
    keys = {
        planner.run(TrainingRun("x", scale.run("AT (MoE)", more=settings).settings, {}, start), 0).key
        for start in starts
    }
    assert len(keys) == 3


def test_every_seed_has_its_own_chain(tmp_path, tiny_run):
    start = tiny_run("start")
    run = tiny_run("run", start=start)
    planner = Planner(tmp_path, [0, 1])
    (row,) = planner.rows([Row(run, {"cost": COST, "accuracy": evaluate("pgd")})])
    assert list(row.runs) == [0, 1]
    assert {seed: list(measures) for seed, measures in row.measures.items()} == {
        0: ["cost", "accuracy"],
        1: ["accuracy"],
    }
    assert [row.runs[seed].config["training"]["seed"] for seed in (0, 1)] == [0, 1]
    assert row.runs[1].start is planner.run(start, 1) and planner.run(start, 1).key != planner.run(start, 0).key
    assert len(planner.tasks([row])) == 2 * (2 + 1) + 1


def test_a_measurement_says_how_the_run_is_attacked_unless_it_is_of_time(planner, tiny_run):
    plain, attacked = tiny_run("plain"), tiny_run("attacked", attack={"steps": 7})
    measured = [planner.measure(evaluate("pgd"), planner.run(run, 0)) for run in (plain, attacked)]
    assert measured[0].run.key == measured[1].run.key and measured[0].key != measured[1].key
    assert measured[1].options["overrides"]["attack"]["steps"] == 7
    more = planner.measure(evaluate("pgd", overrides={"threat": {"eps": 0.2}}), planner.run(plain, 0))
    assert more.options["overrides"]["threat"] == {"eps": 0.2} and more.options["overrides"]["attack"]["steps"] == 2
    times = [planner.measure(COST, planner.run(run, 0)) for run in (plain, attacked)]
    assert times[0].id == times[1].id and times[0].options == COST.options
    assert [each.alone for each in (*measured, *times)] == [False, False, True, True]
    paced = Measure("pace", {"rounds": 1}, plain)
    assert planner.measure(paced, planner.run(attacked, 0)).alone
    names = {
        "evaluate": "evaluation",
        "sweep": "sweep",
        "dissect": "dissection",
        "pathways": "pathways",
        "cost": "cost",
    }
    for kind, name in names.items():
        planned = planner.measure(Measure(kind), planner.run(plain, 0))
        assert planned.result == planner.root / planned.run.key / "measures" / planned.key / f"{name}.json"


def test_states(planner, tiny_run, write_weights):
    run = planner.run(tiny_run("run"), 0)
    measure = planner.measure(COST, run)
    assert (run.state(), measure.state()) == ("missing", "missing")
    run.path.mkdir(parents=True)
    assert run.state() == "interrupted"
    for manifest in ("{", "{}", json.dumps({"finished": None})):
        (run.path / "manifest.json").write_text(manifest)
        write_weights(run.path)
        assert run.state() == "interrupted"
    (run.path / "manifest.json").write_text(json.dumps({"finished": "2026-01-01"}))
    assert run.state() == "finished"
    (run.path / "model.safetensors").unlink()
    assert run.state() == "interrupted"
    measure.path.mkdir(parents=True)
    measure.result.touch()  # written, but the measurement went on
    assert measure.state() == "missing"
    (measure.path / "done.json").touch()
    assert measure.state() == "finished"
    # Of weights that were put away the digest stays, and says whose measurements count.
    (run.path / "put-away.json").write_text(json.dumps({"model_sha256": "a" * 64}))
    for digest, state in (("a", "finished"), ("b", "missing")):
        (measure.path / "done.json").write_text(json.dumps({"model_sha256": digest * 64}))
        assert measure.state() == state


def test_a_run_trained_with_another_configuration_is_refused_by_name(planner, tiny_run):
    run = planner.run(tiny_run("run"), 0)
    run.require_same()  # there is nothing yet
    run.path.mkdir(parents=True)
    run.require_same()
    config = Config.from_dict(run.config)
    config.dump(run.path / "config.yaml")
    run.require_same()
    config.attack.steps += 1  # not of training
    config.dump(run.path / "config.yaml")
    run.require_same()
    config.training.lr = 0.7
    config.dump(run.path / "config.yaml")
    with pytest.raises(ValueError, match=rf"^\S+{run.key} must hold the run {run.key}, got \w{{12}} .*move it away$"):
        run.require_same()


def test_a_run_whose_images_were_moved_is_still_the_same(tmp_path, planner, tiny_run):
    def planned(name):
        return planner.run(tiny_run("run", data={"name": "folder", "root": str(tmp_path / name)}), 0)

    (tmp_path / "before" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "before" / "train" / "cat" / "1.png").touch()
    before = planned("before")
    before.path.mkdir(parents=True)
    Config.from_dict(before.config).dump(before.path / "config.yaml")
    (tmp_path / "before").rename(tmp_path / "after")
    after = planned("after")
    assert after.key == before.key
    after.require_same()


def test_only():
    names = ["AdvMoE, ResNet-18, digits", "AT (MoE), ResNet-18, digits", "AdvMoE, VGG-16, digits"]
    rows = [Row(TrainingRun(name, {})) for name in names]

    def chosen(*wanted):
        return [names.index(row.run.name) for row in only(rows, wanted)]

    assert chosen() == [0, 1, 2]
    assert chosen("advmoe") == [0, 2]
    assert chosen("AT (MoE)", "vgg") == [1, 2]
    assert chosen("AdvMoE+VGG") == chosen("vgg + advmoe") == [2]
    assert chosen("MoE", "digits") == [0, 1, 2]  # each once, in their order
    assert chosen("WRN", "AdvMoE+AT") == []


def test_settings_that_cannot_be_name_the_field(planner, tiny_run):
    with pytest.raises(ValueError, match=r"^training.lr must be > 0, got -1.0$"):
        planner.rows([Row(tiny_run("run", training={"lr": -1.0}))])


def test_results_read_what_is_finished_alone(planner, tiny_run, write_weights):
    rows = planner.rows([Row(replace(tiny_run("run"), labels={"method": "AT"}), {"cost": COST})])
    (result,) = Results.read(rows)
    assert (result.name, result.labels, result.by_seed) == ("run", {"method": "AT"}, {})
    run = rows[0].runs[0]
    run.path.mkdir(parents=True)
    (run.path / "manifest.json").write_text(json.dumps({"finished": "now"}))
    write_weights(run.path)
    (result,) = Results.read(rows)
    assert list(result.by_seed) == [0] and result.by_seed[0].run is run
    assert result.by_seed[0].measurement("cost") is None and result.by_seed[0].measurement("accuracy") is None


def test_a_teacher_is_planned_trained_first_and_part_of_the_key(tmp_path, tiny_run):
    planner = Planner(tmp_path / "runs", [0, 1, 2])
    start, teacher = tiny_run("start"), tiny_run("teacher", training={"lr": 0.4, "method": "at"})
    taught = replace(tiny_run("taught", start=start, training={"lr": 0.3, "method": "at"}), teacher=teacher)
    alone = replace(taught, teacher=None)
    (row,) = planner.rows([Row(taught, {"accuracy": Measure("evaluate")}, seeds=2)])
    assert list(row.runs) == list(row.measures) == [0, 1]  # of the first seeds alone
    for seed, run in row.runs.items():
        whom = planner.run(teacher, seed)
        assert run.config["training"]["teacher"] == str(whom.path) and whom.seed == seed
        assert run.needs == (planner.run(start, seed).id, whom.id)
        assert run.key != planner.run(alone, seed).key
        run.require_same()
    names = [task.name for task in planner.tasks([row]).values() if isinstance(task, PlannedRun)]
    assert names == ["start", "teacher", "taught"] * 2
    # The key does not change once the teacher is there, whose weights tell any other one apart.
    key, whom = row.runs[0].key, planner.run(teacher, 0)
    row.runs[0].path.mkdir(parents=True)
    Config.from_dict(row.runs[0].config).dump(row.runs[0].path / "config.yaml")
    whom.path.mkdir(parents=True)
    row.runs[0].require_same()
    assert Planner(tmp_path / "runs", [0]).run(taught, 0).key == key

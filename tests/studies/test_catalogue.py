"""Every study: its rows can be run at every scale, and it copes with whatever results there are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advmoe.studies.catalogue import STUDIES, study_named
from advmoe.studies.paper_claims import PAPER_CLAIMS
from advmoe.studies.plan import PlannedMeasure, PlannedRow, PlannedRun, Planner, only
from advmoe.studies.results import Results
from advmoe.studies.scales import scale_named
from advmoe.studies.study import StudyFindings
from advmoe.studies.tables import text

SCALES = ("smoke", "cpu", "paper")
EVERY = pytest.mark.parametrize("name", STUDIES)


def test_every_study_is_there_by_its_name():
    assert list(STUDIES) == [
        "table1", "table2", "table3", "fig1b", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "attack-steps",
        "convergence", "efficiency", "recipes", "pathway",
    ]  # fmt: skip
    assert all(study.name == name and study.title and study.shows.endswith(".") for name, study in STUDIES.items())
    assert study_named("fig2") is STUDIES["fig2"]
    with pytest.raises(
        ValueError,
        match=rf"^NAME must be one of list, claims, {', '.join(STUDIES)}, got 'fig9' \(did you mean fig8\?\)$",
    ):
        study_named("fig9")


@pytest.mark.parametrize("scale", SCALES)
@EVERY
def test_every_row_is_a_configuration_that_can_be(name, scale):
    sized = scale_named(scale)
    rows = STUDIES[name].stages[0](sized, Results())
    names = [row.run.name for row in rows]
    assert len(set(names)) == len(names)  # what --only and a reader tell rows by
    planned = Planner(Path("runs"), [0]).rows(rows)
    keys = [(row.runs[0].key, *sorted(each.key for each in row.measures[0].values())) for row in planned]
    assert len(set(keys)) == len(keys)  # no row twice
    assert only(rows, [names[0]]) and not only(rows, ["nothing is called so"])
    json.dumps([each.options for row in planned for each in row.measures[0].values()])


@EVERY
def test_studies_make_something_of_nothing(name):
    scale, study = scale_named("smoke"), STUDIES[name]
    planned = Planner(Path("nowhere"), [0]).rows(study.stages[0](scale, Results()))
    for results in (Results(), Results.read(planned)):
        outcome = study.show(scale, results)
        assert all(not figure.data and "nothing was measured" in figure.alt.lower() for figure in outcome.figures)
        for claim in outcome.claims:
            assert {each["verdict"] for each in claim["verdicts"]} <= {"undecided"}
        for shown in outcome.tables:
            text(shown)
        json.dumps(plain(outcome), allow_nan=False)


def plain(outcome: StudyFindings) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in ("tables", "claims", "notes")} | {
        "figures": [vars(figure) for figure in outcome.figures]
    }


# Made-up results: of 24 images, some right and some wrong


def levels(run: PlannedRun) -> dict[str, dict[str, float]]:
    parts = ("routers", "experts") if run.config["training"]["method"] == "advmoe" else ("all",)
    return {part: {"ce": 1.0, "kl": 0.5, "accuracy": 0.6} for part in parts}


def made_up(task: PlannedRun | PlannedMeasure, evaluated: Any) -> tuple[Any, dict[str, Any]]:
    """Content and arrays; what is right depends on the run alone, so that attacks and measurements agree."""
    run = task if isinstance(task, PlannedRun) else task.run
    number = int(run.key, 16) % 7
    marks = "".join("1" if (image * 5 + run.seed) % 11 < 9 - number else "0" for image in range(24))
    share = marks.count("1") / 24
    if isinstance(task, PlannedRun):
        lines = [
            {"epoch": epoch, "seconds": 2.0, "train": levels(run), "val": {"robust_accuracy": share * epoch / 2}}
            for epoch in (1, 2)
        ]
        return lines, {}
    steps = run.config["attack"]["steps"]
    names = [name.replace("pgd", f"pgd-{steps}") for name in task.options.get("attacks", ["pgd"])]
    match task.kind:
        case "evaluate":
            _, content, arrays = evaluated("1" * 24, dict.fromkeys(names, marks), cost={"gmacs": 0.1})
            return content, arrays
        case "sweep":
            points = [{"eps": eps, "robust_accuracy": share} for eps in task.options["epsilons"]]
            curve = {"points": points, "masking": {"reasons": ["It rises."]}}
            return {"curves": {name: curve for name in (*names, "worst case")}}, {}
        case "dissect":
            parts = dict.fromkeys(("both_survive", "only_routing_fails", "only_prediction_fails", "both_fail"), 0.25)
            arrays = {name: [1, 2, 3, 4] for name in names}
            return {name: {"categories": parts} for name in names}, {"dissection_examples": arrays}
        case "pathways":
            overlap = {"mean": 0.4, "std": 0.1, "histogram": {"edges": [0.0, 0.5, 1.0], "shares": [0.75, 0.25]}}
            content = {
                "clean": {"distinct": 5, "entropy": 1.5}, "attack": {"unchanged": share},
                "against": dict.fromkeys(("clean", "adversarial", "random_pathways", "random_masks"), overlap),
            }  # fmt: skip
            unchanged = [mark == "1" for mark in marks]
            return content, {"pathways_examples": {"index": list(range(24)), "unchanged": unchanged}}
        case "cost":
            kind = run.config["model"]["kind"]
            return {"models": {kind: {"gmacs": 0.1}}, "batches": [{"batch": 1, "ms_per_image": {kind: 2.0}}]}, {}
        case "pace":
            timed = {"median": 1.0, "least": 0.9, "most": 1.2}
            return {"ratio": 1.1, "seconds": {"ours": timed, "theirs": timed}}, {}
        case _:
            raise AssertionError(task.kind)


def stages(name: str, planner: Planner, evaluated: Any, record: Any) -> Iterator[list[PlannedRow]]:
    """The rows of a study up to each stage, all of them finished with made-up results."""
    scale, rows = scale_named("smoke"), list[PlannedRow]()
    for stage in STUDIES[name].stages:
        rows = [*rows, *planner.rows(stage(scale, Results.read(rows)))]
        for task in planner.tasks(rows).values():
            if task.state() != "finished":
                content, arrays = made_up(task, evaluated)
                record(task, content, **arrays)
                assert task.state() == "finished"
        yield rows


@EVERY
def test_studies_show_full_results_and_those_with_gaps(name, tmp_path, evaluated, record):
    scale, study = scale_named("smoke"), STUDIES[name]
    *_, rows = stages(name, Planner(tmp_path / "runs", range(3)), evaluated, record)
    complete = study.show(scale, Results.read(rows))
    for key, number in assert_tables(complete):
        of_all = number == 3 or (name == "pathway" and number == 1)  # whose first stages are of one seed
        assert number == 1 if key in ("ms", "ratio", "ratio_least", "ratio_most") else of_all  # a time is measured once
    assert_figures(complete, tmp_path)
    assert_claims(complete)
    assert_listed(name, complete)

    for measure in max(rows, key=lambda row: len(row.runs)).measures[1].values():
        (measure.path / "done.json").unlink(missing_ok=True)
    (rows[-1].runs[0].path / "model.safetensors").unlink()
    partial = study.show(scale, Results.read(rows))
    assert {2} <= {number for _, number in assert_tables(partial)} <= {0, 1, 2, 3}
    assert_claims(partial)
    for part in ("tables", "figures", "claims"):
        assert len(getattr(partial, part)) == len(getattr(complete, part))
    json.dumps([plain(complete), plain(partial)], allow_nan=False)


def assert_tables(outcome: StudyFindings) -> list[tuple[str, int]]:
    """The column of each number, and how many seeds it is the mean of."""
    numbers = []
    assert outcome.tables
    for shown in outcome.tables:
        keys = [column["key"] for column in shown["columns"]]
        assert len(set(keys)) == len(keys) and shown["rows"]
        for line in shown["rows"]:
            assert set(line) == set(keys)
            cells = {key: value for key, value in line.items() if isinstance(value, dict)}
            assert all((cell["n"] > 1) == (cell["std"] is not None) for cell in cells.values())
            numbers += [(key, cell["n"]) for key, cell in cells.items()]
        lines = text(shown).splitlines()
        assert len(lines) >= 2 + len(shown["rows"]) and max(map(len, lines)) <= 80
    return numbers


def assert_figures(outcome: StudyFindings, folder: Path) -> None:
    ids = [figure.name for figure in outcome.figures]
    assert ids and len(set(ids)) == len(ids)
    for figure in outcome.figures:
        assert figure.name.replace("-", "").isalnum() and figure.title
        assert figure.alt.endswith(".") and "othing was measured" not in figure.alt
        figure.draw(folder / f"{figure.name}.svg")


def assert_claims(outcome: StudyFindings) -> None:
    for claim in outcome.claims:
        assert claim["name"] and claim["statement"].endswith(".") and claim["source"] and claim["verdicts"]
        for each in claim["verdicts"]:
            assert each["verdict"] in ("holds", "does not hold", "undecided")
            assert each["p_value"] is None or 0 <= each["p_value"] <= 1


def assert_listed(name: str, outcome: StudyFindings) -> None:
    """What the list of the paper's claims looks for in a study is there."""
    there: dict[str, set[str]] = {}
    for claim in outcome.claims:
        word, _, _ = claim["name"].partition(", ")
        there.setdefault(word, set()).update(*(each["numbers"] for each in claim["verdicts"]))
    wanted = [each for each in PAPER_CLAIMS if each.study == name and each.claim != "ineffective-regime"]  # N >= 8
    assert wanted and all(each.claim in there for each in wanted)
    assert all({*each.comparisons} <= there[each.claim] for each in wanted)

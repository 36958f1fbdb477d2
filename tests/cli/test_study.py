"""`advmoe study`: what it prints, what it passes on, and mistakes as one line."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from advmoe import cli
from advmoe.engines import EngineOptions, Ledger
from advmoe.studies.catalogue import STUDIES


@pytest.fixture
def advmoe(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return call


def test_list_says_of_every_study_what_it_shows(advmoe, tmp_path):
    code, out, err = advmoe("study", "list")
    assert (code, err, list(tmp_path.iterdir())) == (0, "", [])
    lines = re.sub(r"\n {4,}", " ", out).splitlines()  # those that go on
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(line.endswith(f"  {study.shows}") for line, study in zip(lines, STUDIES.values(), strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig9"], "NAME must be one of list, claims, table1, "),
        (["list", "--only", "VGG"], "`study list` must have no options, got --only"),
        (["fig2", "--put-away", "--status"], " must stand without --"),
        (["fig2", "--only", "AdvMoE,VGG"], "got VGG"),
        (["fig2", "--scale", "huge"], "--scale must be one of smoke, cpu, paper, got 'huge'"),
        (["fig2", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["fig2", "--seeds", "99"], "--seeds must be <= 20, got 99"),
        (["fig2", "--seeds", "two"], "--seeds must be a whole number, got 'two'"),
        (["fig2", "--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["fig2", "--num-examples", "0"], "--num-examples must be >= 1, got 0"),
        (["fig2", "--accelerator", "tpu"], "--accelerator must be one of auto, cpu, cuda, got 'tpu'"),
        (
            ["fig2", "--only", "VGG"],
            "--only must be words of a run's name (AT (S-Dense), ResNet-18 of width 8, digits at 16 pixels; ",
        ),
        (["fig2", "--model.kind", "dense"], "model.kind must be left to the study fig2, got 'dense'"),
        (["fig2", "--training.seed", "1"], "training.seed must be left to the study fig2, got 1"),
        (["fig7", "--model.scale", "0.3"], "model.scale must be left to the study fig7, got 0.3"),
        (["efficiency", "--training.alternation", "both"], "training.alternation must be left to the study efficiency"),
        (["fig2", "--training.lr", "-1"], "training.lr must be > 0, got -1"),
        (["fig2", "--training.lr", "fast"], "training.lr must be a number, got 'fast'"),
        (["fig2", "--training.epoch", "1"], "--training.epoch is no option of study: did you mean --training.epochs?"),
        (["fig2", "--page", "a.md"], "--page must be left out of a study, as it is of `claims`, got 'a.md'"),
        (["claims", "--seeds", "5"], "`study claims` must have no options but --out and --page, got --seeds"),
        (["claims", "--training.lr", "1"], "`study claims` must have no options but --out and --page, got "),
        ([], "NAME"),
    ],
    ids=lambda given: "" if isinstance(given, str) else " ".join(given),
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_mistake_is_one_line_and_creates_nothing(advmoe, tmp_path, words, message, dry):
    code, out, err = advmoe("study", *words, *dry)
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith("advmoe: error: ") and err.count("\n") == 1 and message in err


def test_missing_images_are_one_line_and_create_nothing(advmoe, tmp_path):
    code, out, err = advmoe("study", "fig2", "--scale", "cpu")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith("advmoe: error: data.root must ") and err.count("\n") == 1 and "cifar10-jpeg" in err


def test_results_cannot_go_to_a_file(advmoe, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = advmoe("study", "fig2", "--out", "file")
    assert (code, out, err) == (2, "", "advmoe: error: --out must be a folder, or new, got 'file'\n")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_dry_run_prints_the_plan_and_creates_nothing(advmoe, tmp_path):
    code, out, err = advmoe("study", "fig5", "--dry-run", "--seeds", "2", "--jobs", "2")
    assert (code, err, list(tmp_path.iterdir())) == (0, "", [])
    *lines, last = out.splitlines()
    assert last == "26 tasks, 26 to do, by 2 processes"
    found = [
        re.fullmatch(
            r"missing +(\w+) +(.*), ResNet-18 of width 8, digits at 16 pixels, seed (\d)  (\w{12})", line
        ).groups()
        for line in lines
    ]
    expected = []
    for statistics in ("refresh", "keep"):
        routers, experts = (
            f"router-robustified MoE{then}, statistics = {statistics}" for then in ("", ", then its experts")
        )
        start = [("train", "standard MoE")] if statistics == "refresh" else []  # the same for both
        first = [*start, ("train", routers), ("evaluate", routers), ("dissect", routers)]
        second = [(what, experts) for what in ("train", "evaluate", "dissect")]
        expected += [(*each, seed) for row in (first, second) for seed in "01" for each in row]
    assert [each[:3] for each in found] == expected
    assert len({key for *_, key in found}) == 10  # a run of each method and seed
    code, out, _ = advmoe("study", "fig5", "--dry-run", "--only", "then its experts")
    assert code == 0 and out.endswith("9 tasks, 9 to do, by 1 process\n")


def test_with_times_of_here_a_dry_run_tells_how_long(advmoe, tmp_path):
    words = ["study", "fig5", "--dry-run", "--accelerator", "cpu", "--out", "there", "--jobs", "2"]
    plan = advmoe(*words)[1]
    code, out, _ = advmoe(*words, "--calibrate")
    assert code == 0 and out.startswith(plan) and [each.name for each in (tmp_path / "there").iterdir()] == [
        "calibration.json"
    ]  # fmt: skip
    told = [line.split()[:2] for line in out.removeprefix(plan).splitlines()[2:]]
    kinds = Counter(line.split()[1] for line in plan.splitlines()[:-1])
    assert told == [*([kind, str(n)] for kind, n in kinds.items()), ["total", str(kinds.total())], ["2", "processes"]]
    assert advmoe(*words) == (0, out, "")  # by the times that are kept
    assert advmoe("study", "fig5", "--calibrate")[0] == 2


CONTENT = {
    "size": "3 epochs",
    "tables": [{"title": "Ours", "columns": [{"key": "a", "title": "A"}], "rows": [{"a": 1.5}]}],
    "claims": [
        {
            "statement": "It is so.",
            "verdicts": [
                {"measure": "PGD", "verdict": "holds", "p_value": 0.03125},
                {"measure": "worst case", "verdict": "undecided", "p_value": None},
            ],
        }
    ],
    "notes": ["A note."],
    "runs": [
        {"name": "good", "seed": 0, "status": "finished", "error": None},
        {"name": "bad", "seed": 1, "status": "failed", "error": "so far"},
        {"name": "left", "seed": 2, "status": "missing", "error": None},
    ],
}


def test_everything_is_passed_on_and_what_was_found_is_printed(advmoe, monkeypatch):
    seen = []
    monkeypatch.delenv("ADVMOE_LOG_FORMAT")

    def run_study(name, options, told):
        from advmoe.studies.plan import PlannedMeasure, PlannedRun
        from advmoe.studies.task_pool import Step

        run = PlannedRun("abc", "AdvMoE, ResNet-18, digits", 3, {}, Path("abc"), None)
        told(Step("starts"), run)
        told(Step("so far"), PlannedMeasure(run, "evaluate", {}, None, "evaluate-1"))
        seen.append((name, options))
        return Path("home"), CONTENT

    monkeypatch.setattr("advmoe.studies.session.run_study", run_study)
    argv = ["study", "fig2", "--scale", "cpu", "--seeds", "5", "--only", "AdvMoE+ResNet, S-Dense", "--jobs", "2"]
    argv += ["--num-examples", "50", "--threads", "2", "--accelerator", "cpu", "--out", "there"]
    argv += ["--training.epochs", "3", "--threat.eps", "4/255", "--data.root", "7"]
    code, out, err = advmoe(*argv)
    ((name, options),) = seen
    assert name == "fig2" and vars(options) == {
        "scale": "cpu", "seeds": 5, "only": ["AdvMoE+ResNet", "S-Dense"], "jobs": 2, "num_examples": 50, "threads": 2,
        "accelerator": "cpu", "root": Path("there"), "command": ["advmoe", *argv], "engine": EngineOptions(),
        "overrides": {"training": {"epochs": 3}, "threat": {"eps": "4/255"}, "data": {"root": "7"}},
    }  # fmt: skip
    assert code == 1  # as something failed
    assert err.splitlines() == [
        "starts  train     AdvMoE, ResNet-18, digits, seed 3  abc",
        "failed: so far  evaluate  AdvMoE, ResNet-18, digits, seed 3  abc",
    ]
    assert out.splitlines() == [
        "3 epochs", "", "Ours", "A", "1.5", "", "It is so.", "  PGD: holds at this size (p = 0.0312)",
        "  worst case: undecided at this size", "A note.", "failed: bad, seed 1: so far",
        "missing: left, seed 2: not done", "", "written to home/study.json",
        "next  advmoe report home -o home/report.html",
    ]  # fmt: skip

    monkeypatch.setitem(CONTENT, "runs", CONTENT["runs"][:1])
    assert advmoe("study", "fig2")[0] == 0
    _, defaults = seen[-1]
    assert (defaults.scale, defaults.seeds, defaults.jobs, defaults.threads) == ("smoke", None, 1, 1)
    assert defaults.root == Path("runs/studies") and defaults.overrides == {} and defaults.only == []


def test_claims_are_listed_and_written_as_a_page(advmoe, tmp_path):
    home = tmp_path / "studies" / "fig1b-cpu"
    home.mkdir(parents=True)
    (home / "study.json").write_text('{"study": "fig1b", "seeds": [0], "command": "c"}')
    code, out, err = advmoe("study", "claims", "--out", "studies", "--page", "claims.md")
    assert (code, err) == (0, "") and out.endswith("written to claims.md\n") and "fig1b-cpu not judged" in out
    assert (tmp_path / "claims.md").read_text().startswith("# Claims\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "studies").rename(tmp_path / "runs" / "studies")
    assert advmoe("study", "claims")[:2] == (0, out.removesuffix("\nwritten to claims.md\n"))
    code, _, err = advmoe("study", "claims", "--out", "nowhere")
    assert code == 2 and "--out must be a folder of studies (a study.json in each), got 'nowhere'" in err
    assert advmoe("study", "claims", "--page", "some/where.md")[0] == 0 and (tmp_path / "some/where.md").is_file()
    (tmp_path / "file").touch()
    code, _, err = advmoe("study", "claims", "--page", "file/claims.md")
    assert code == 2 and "--page must be where files can be written" in err


def test_a_plan_and_the_list_need_no_torch(tmp_path):
    code = (
        "import sys\nfrom advmoe.cli import main\n"
        "assert main(['study', 'fig2', '--dry-run']) == 0\nassert main(['study', 'list']) == 0\n"
        "sys.exit(bool({'torch', 'lightning_fabric'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []


def test_the_status_tells_each_task_s_state_and_log_and_creates_nothing(advmoe, tmp_path):
    words = ["study", "fig5", "--status", "--out", "there"]
    code, out, err = advmoe(*words)
    assert (code, err, list(tmp_path.iterdir())) == (0, "", [])
    *lines, last = out.splitlines()
    assert last == "13 tasks: 13 waiting" and all(line.startswith("waiting    ") for line in lines)
    key, ledger = lines[0].split()[-1], Ledger(tmp_path / "there" / "logs")
    ledger.submitted(key, "12_3")
    with pytest.raises(OSError), ledger.doing(lines[1].split()[-1], log=Path("a.log")):
        raise OSError("no disk")
    code, out, _ = advmoe(*words)
    first, second, *_, last = out.splitlines()
    assert first.startswith("queued       train     standard MoE") and "  job 12_3  log there/logs/" in first
    assert second.startswith("failed  ") and second.endswith("  OSError: no disk  log a.log")
    assert last == "13 tasks: 1 queued, 1 failed, 11 waiting"


def test_where_a_cluster_s_tasks_print_is_told(advmoe, monkeypatch):
    monkeypatch.delenv("ADVMOE_LOG_FORMAT")
    monkeypatch.setattr(EngineOptions, "require", lambda self: None)
    seen = []

    def run_study(name, options, told):
        seen.append(options)
        return Path("home"), CONTENT | {"runs": []}

    monkeypatch.setattr("advmoe.studies.session.run_study", run_study)
    words = ["study", "fig5", "--engine", "slurm", "--out", "there", "--task-hours", "2"]
    code, _, err = advmoe(*words)
    status = f"advmoe {' '.join(words)} --status"
    assert (code, err) == (0, f"tasks print into there/logs; how far they are: {status}\n")
    assert seen[0].engine == EngineOptions(engine="slurm", hours=2.0) and seen[0].jobs == 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "cloud"], "--engine must be one of local, slurm, ray, got 'cloud'"),
        (["--partition", "gpu"], "--partition must go with --engine slurm, got 'gpu' with local"),
        (["--task-gpus", "1"], "--task-gpus must go with --engine slurm or ray, got 1 with local"),
        (["--engine", "slurm", "--task-hours", "-1"], "--task-hours must be "),
        (["--engine", "ray", "--task-cpus", "0"], "--task-cpus must be "),
    ],
)
def test_a_mistake_about_the_engine_is_one_line_and_creates_nothing(advmoe, tmp_path, words, message):
    code, out, err = advmoe("study", "fig5", *words)
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith(f"advmoe: error: {message}") and err.count("\n") == 1

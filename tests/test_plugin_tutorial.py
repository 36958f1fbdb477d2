"""What docs/how-to/extend.md says of plugins: its parts are examples/plugin.py's, and studies, reports and help know
their names. Training and evaluation of these are in test_plugins.py.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe.attacks.pgd import LOSSES, Loss
from advmoe.cli.arguments import measuring_parser
from advmoe.errors import InputError
from advmoe.evaluation.suite import ATTACKS, FunctionAttack
from advmoe.studies.session import StudyOptions, plan_study
from advmoe.tables import BACKBONES, DATASETS, Backbone, DataSet, plugins

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "plugin.py"
PAGE = ROOT / "docs" / "how-to" / "extend.md"
NAMES = {"tiny", "brightness", "shifted-digits", "logit", "corner", "experts-twice"}


def advmoe(cwd, *words):
    environment = {**os.environ, "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "advmoe", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_shows_the_example_part_by_part():
    parts = [block for block in blocks("python") if "register_" in block]
    defined = [
        ast.unparse(node)
        for text in ("".join(parts), PLUGIN.read_text())
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) or "register_method" in ast.unparse(node)[:15]
    ]
    assert len(defined) == 12 and defined[:6] == defined[6:]
    registered = set(re.findall(r'register_\w+\(\s*"([\w-]+)"', "".join(parts)))
    assert registered == NAMES


STAND_INS = ["--data.name", "shifted-digits", "--model.name", "tiny", "--model.router", "brightness"]
FEW = ["--training.epochs", "1", "--data.train_examples", "64", "--num-examples", "10", "--accelerator", "cpu"]
CALLED = "Tiny CNN of width 8, digits, inverted at 16 pixels"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A row of table 1 with the plugin's data set, backbone and router, and a page of it: the study's folder."""
    home = tmp_path_factory.mktemp("study")
    advmoe(home, "study", "table1", "--only", "AT (MoE)", "--plugin", PLUGIN, *STAND_INS, *FEW, "--out", "out")
    (folder,) = (home / "out").glob("table1-smoke-*")
    advmoe(home, "report", folder)  # made of results alone
    return folder


@pytest.mark.slow
def test_a_study_trains_and_measures_what_a_plugin_has(study):
    content = json.loads((study / "study.json").read_text())
    assert [(run["name"], run["status"]) for run in content["runs"]] == [(f"AT (MoE), {CALLED}", "finished")]
    ((row,),) = [table["rows"] for table in content["tables"]]
    assert f"{row['backbone']}, {row['dataset']}" == CALLED
    # Multiplications by layer: of the network from 1 to 4 channels, to 8, to 10 classes; of the router from 1 to 8, to
    # 16, to 32, to 2 experts. The images are 16x16, then 8x8, at last 4x4.
    network = 256 * 4 * 9 + 64 * 8 * 4 * 9 + 8 * 10
    router = 256 * 8 * 9 + 64 * 16 * 8 * 9 + 16 * 32 * 16 * 9 + 32 * 2
    assert row["gmacs"]["mean"] == pytest.approx((network + router) / 1e9, abs=5e-7)
    assert 0 <= row["worst"]["mean"] <= row["ra_pgd"]["mean"] <= row["sa"]["mean"] <= 100


@pytest.mark.slow
def test_a_report_of_the_study_calls_them_by_their_labels(study):
    page = (study.parents[1] / "report.html").read_text()
    assert "Tiny CNN of width 8" in page and "digits, inverted at 16 pixels" in page


@pytest.fixture
def registered():
    """Entries as a plugin registers them, for one test."""
    for table, name, entry in (
        (BACKBONES, "mine", Backbone(lambda layers, **sizes: None, 8, "Mine")),
        (DATASETS, "ours", DataSet(lambda request: None, "Ours")),
    ):
        table.add(name, entry)
    yield
    del BACKBONES["mine"], DATASETS["ours"]


def planned(name, tmp_path, **overrides):
    """The names of a study's runs."""
    tasks = plan_study(name, StudyOptions(root=tmp_path, overrides=overrides))
    return list(dict.fromkeys(task.name for task in tasks.values() if not hasattr(task, "run")))


def test_one_row_is_left_of_each_method_where_a_backbone_stands_in_for_all(registered, tmp_path):
    methods = ["AT (Dense)", "AT (S-Dense)", "AT (Sparse)", "AT (MoE)", "AdvMoE"]
    names = planned("table1", tmp_path, model={"name": "mine", "width": 4})
    assert names == [f"{method}, Mine of width 4, digits at 16 pixels" for method in methods]
    names = planned("table1", tmp_path, data={"name": "ours"})
    assert len(names) == 20 and all(name.endswith(", Ours at 16 pixels") for name in names)
    scale = StudyOptions(scale="paper", overrides={"data": {"name": "ours"}}).sized()
    labels = scale.run("AdvMoE").labels  # of which the paper has no number
    assert (labels["paper_dataset"], labels["paper_backbone"]) == (None, "ResNet-18")


def test_names_of_the_package_s_own_are_left_to_the_study(registered, tmp_path):
    for group, name in (("model", "vgg16"), ("data", "cifar10"), ("model", "mime")):
        with pytest.raises(InputError, match=rf"^{group}.name must be left to the study table1, got '{name}'$"):
            planned("table1", tmp_path, **{group: {"name": name}})


def test_help_names_attacks_and_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setitem(ATTACKS, "corner", FunctionAttack("corner", print))
    monkeypatch.setitem(LOSSES, "logit", Loss.of(print))

    def told():
        return " ".join(measuring_parser("").format_help().split())

    monkeypatch.setattr(plugins, "_executed", set())
    assert "routed (default" in told()  # where there is no plugin
    (tmp_path / "mine.py").touch()
    monkeypatch.setenv(plugins.PLUGINS, "")
    plugins.add_plugin(tmp_path / "mine.py")
    assert "pgd-50-margin, pgd-50-logit, autoattack," in told() and "routed, corner (default" in told()


FEWER = {
    "train": ["--training.epochs", "1", "--data.train_examples", "64"],
    "evaluate": ["--num-examples", "10"],
    "study": FEW,
    "report": ["--no-gallery"],
}


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path):
    (tmp_path / "examples").symlink_to(PLUGIN.parent)
    (text,) = blocks("bash")
    commands = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in commands] == list(FEWER)
    for _, command, *words in commands:
        advmoe(tmp_path, command, *words, *FEWER[command])
    page = (tmp_path / "report.html").read_text()
    assert all(each in page for each in ("experts-twice", "corner", "pgd-50-logit", "AT (Sparse)", "Tiny CNN"))

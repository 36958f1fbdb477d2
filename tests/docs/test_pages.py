"""The README and the pages in docs/: their code runs, their commands parse, their links lead somewhere, their figures
are those that are stored.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import hooks
import numpy as np
import pytest
import torch
import yaml
from pages import BESIDE, DOCS, PAGES, ROOT, blocks, prose

import advmoe
from advmoe.cli import COMMANDS, main
from advmoe.config import Config, field_names
from advmoe.models import create_model, save_model
from advmoe.recipes import recipe_names
from advmoe.studies.catalogue import study_named
from advmoe.studies.paper import numbers
from advmoe.tables import DATASETS
from advmoe.tables.plugins import add_plugin

TRAINING = [DOCS / "tutorials" / "own-loop.md"]
"""Pages whose Python trains: test_notebooks.py runs it."""
MADE = {DOCS / page for page in (*hooks.BESIDE, *hooks.GENERATED)}


def with_blocks(language: str) -> list:
    """The pages that have such blocks, as a test's parameters."""
    skipped = TRAINING if language == "python" else []
    found = [page for page in [*BESIDE, *PAGES] if page not in skipped and blocks(page, language)]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a run, as somebody who reads the pages has."""
    settings = {"width": 4, "kind": "moe"}
    values = {"data": {"name": "digits", "image_size": 16}, "threat": {"eps": "0.1"}}
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    Config.from_dict({"model": settings, **values}).dump(folder / "config.yaml")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = create_model("resnet18", num_classes=10, in_channels=1, input_size=16, **settings)
        for _ in range(4):
            model(torch.rand(32, 1, 16, 16))
    save_model(model.eval(), folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_code_runs(page, workplace) -> None:
    names: dict = {"__name__": "__main__"}
    shown = [block for block in blocks(page, "python") if block.title is not None]
    for block in shown:
        (workplace / block.title).write_text(block.text)
    try:
        with torch.random.fork_rng(devices=[]):
            for block in blocks(page, "python"):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    finally:
        for block in shown:  # another page may show another file of that name
            sys.modules.pop(Path(block.title).stem, None)


STUB = """#!/bin/bash
printf '%s\\x1f' "${0##*/}" "$@" >>"$CALLS"
printf '\\x1e' >>"$CALLS"
"""
PROGRAMS = ("advmoe", "git", "make", "pip", "python", "python3")


def calls(text: str, folder: Path) -> list[list[str]]:
    """What a block of Bash would call, of the programs that there are in pages; it calls no other."""
    (folder / "bin").mkdir(exist_ok=True)
    for program in PROGRAMS:
        (folder / "bin" / program).write_text(STUB)
        (folder / "bin" / program).chmod(0o755)
    record = folder / "calls"
    record.write_text("")
    script = "set -euo pipefail\ncd() { :; }\nsource() { :; }\n" + text
    environment = {"PATH": str(folder / "bin"), "CALLS": str(record)}
    done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [call.split("\x1f")[:-1] for call in record.read_text().split("\x1e")[:-1]]


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_parse(page, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("data: {name: digits}\n")
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    titled = {block.title for block in blocks(page, "python")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks(page, "bash"):
        for program, *words in calls(block.text, tmp_path):
            if program == "advmoe":
                require_command(words, capsys)
            elif program == "make":
                assert all(word in targets for word in words if "=" not in word), words
            elif program.startswith("python") and words[0].endswith(".py"):
                assert words[0] in titled or (ROOT / words[0]).is_file(), words


def require_command(words: list[str], capsys) -> None:
    """Fail unless advmoe has the command, its options, and the fields, recipes and studies that these name."""
    assert words[0] in COMMANDS, words
    while "--plugin" in words:
        at = words.index("--plugin")
        add_plugin(words[at + 1])
        words = [*words[:at], *words[at + 2 :]]
    found, unknown = COMMANDS[words[0]].parser().parse_known_args(words[1:])
    assert not unknown, words
    if words[0] == "train" and "resume" not in found:
        assert main([*words, "--print_config"]) == 0, f"{words}: {capsys.readouterr().err}"
    elif words[0] == "study" and found.name not in ("list", "claims"):
        study_named(found.name)
    fields: dict = {}
    for name, text in vars(found).items():
        group, dot, field = name.partition(".")
        if dot and words[0] in ("evaluate", "sweep-eps", "dissect", "pathways", "study"):
            fields.setdefault(group, {})[field] = yaml.safe_load(text)
    Config.from_dict(fields)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in [*BESIDE, *PAGES]])
def test_links_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page).replace("[`", "["))):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        known = file.is_file() or (file in MADE and page.is_relative_to(DOCS))
        assert known, f"{target} is no file"
        assert not page.is_relative_to(DOCS) or file.is_relative_to(DOCS), f"{target} is no part of the site"
        if anchor and file.suffix == ".md" and file.is_file():
            assert anchor in slugs(file), f"{target} is no heading"


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in [BESIDE[0], *PAGES]])
def test_files_that_pages_name_are_there(page) -> None:
    for named in re.findall(r"`((?:advmoe|benchmarks|docs|tests)/[\w./-]+)`", prose(page)):
        assert (ROOT / named).exists(), named


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/-]+\.md", json.dumps(yaml.safe_load(text)["nav"]))
    assert len(listed) == len(set(listed))
    assert {DOCS / name for name in listed} == {*PAGES, *MADE}


def test_pages_made_of_the_code_name_all_of_it() -> None:
    made = {name: make() for name, make in hooks.GENERATED.items()}
    assert re.findall(r"^### `(\S+)`", made["reference/configuration.md"], re.MULTILINE) == field_names()
    assert re.findall(r"^## advmoe (\S+)$", made["reference/commands.md"], re.MULTILINE) == list(COMMANDS)
    named = re.findall(r"^\| `(\S+)` ", made["reference/recipes.md"], re.MULTILINE)
    assert all(any(recipe == f"{a}-{b}" for a in named for b in named) for recipe in recipe_names())
    assert re.findall(r"^\| `(\S+)` ", made["reference/data-sets.md"], re.MULTILINE)[1:] == list(DATASETS)
    assert made["reference/api.md"].count("::: ") == len(advmoe.__all__) - 1  # but `__version__`


METHODS = DOCS / "results/methods.md"
RUNS = ("at-s-dense", "at-moe", "advmoe-image-mod", "advmoe", "advmoe-embedding-random")


def stored(run: str, which: str) -> dict:
    """An evaluation of a zoo's model: `all` is of every test image under PGD-50, `strong` of 1,000 under everything."""
    return json.loads((DOCS / "results/zoo" / run / which / "evaluation.json").read_text())


def rows(page: Path, heading: str) -> list[list[str]]:
    """The rows of models in the section of a page with that heading, without the models' names."""
    section = re.split(r"^##+ ", page.read_text().split(f"## {heading}\n")[1], flags=re.MULTILINE)[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| (AT|AdvMoE)", line)]
    return [[cell.strip() for cell in line[1:]] for line in lines]


def agrees(shown: str, share: float | None) -> bool:
    """Whether a cell shows a share in percent, to a tenth, or that there is none."""
    return shown == "-" if share is None else abs(float(shown) - 100 * share) < 0.0501


@pytest.mark.parametrize("page", [ROOT / "README.md", METHODS], ids=["README", "methods"])
def test_results_of_the_zoos_models_are_the_stored_ones(page: Path) -> None:
    for run, shown in zip(RUNS, rows(page, "Results"), strict=True):
        usual, strong = stored(run, "all"), stored(run, "strong")
        assert (usual["num_examples"], strong["num_examples"]) == (10_000, 1000)
        accuracies = (usual["clean_accuracy"], usual["robust_accuracy"]["pgd-50"])
        assert all(map(agrees, shown, (*accuracies, strong["worst_case"], strong["masking_gap"])))
        assert float(shown[4]) == pytest.approx(1000 * usual["cost"]["gmacs"], abs=0.0501)


def test_the_readme_is_a_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    gaps = [100 * stored(run, "strong")["masking_gap"] for run in RUNS]
    assert f"it lies {min(gaps):.2g} to {max(gaps):.3g} points under PGD-50" in text


def test_results_attack_by_attack_are_the_stored_ones() -> None:
    for run, shown in zip(RUNS, rows(METHODS, "Attack by attack"), strict=True):
        found = stored(run, "strong")
        robust = found["robust_accuracy"]
        second, last = ("pgd-50-margin", "restarts-1550") if run == "at-s-dense" else ("pgd-50-soft", "routed")
        broken = [found["clean_accuracy"], *(robust[name] for name in ("pgd-50", second, "autoattack", last))]
        assert all(map(agrees, shown, [*broken, found["worst_case"]])) and len(robust) == 4
        assert shown[-1] == f"{found['gradient_passes']['worst_case']:,}"


def test_what_one_attack_leaves_to_the_other_is_what_is_stored() -> None:
    for run, shown in zip(RUNS, rows(METHODS, "What one leaves to the other"), strict=True):
        with np.load(DOCS / "results/zoo" / run / "strong/evaluation-examples.npz") as examples:
            ours, autoattack = (
                examples[f"robust/{name}"]
                for name in ("restarts-1550" if run == "at-s-dense" else "routed", "autoattack")
            )
        counts = autoattack.sum(), (autoattack & ~ours).sum(), ours.sum(), (ours & ~autoattack).sum()
        assert shown == list(map(str, counts))


def test_margins_on_a_page_are_those_of_the_stored_results() -> None:
    places = [
        ("at-s-dense", ""),
        *((run, how) for run in ("at-moe", "advmoe-embedding-random") for how in ("", "-soft")),
    ]
    folder = DOCS / "results/probability-margin"
    for (run, how), (_, *shown) in zip(places, rows(METHODS, "The margin of probabilities"), strict=True):
        with np.load(folder / run / "evaluation-examples.npz") as examples:
            margin, pma = (examples[f"robust/pgd-50-{loss}{how}"] for loss in ("margin", "pma"))
        robust = json.loads((folder / run / "evaluation.json").read_text())["robust_accuracy"]
        assert agrees(shown[0], robust[f"pgd-50-margin{how}"]) and agrees(shown[1], robust[f"pgd-50-pma{how}"])
        assert shown[2:] == [str((~margin & pma).sum()), str((margin & ~pma).sum())]


def test_what_attacks_broke_on_a_page_is_what_is_stored() -> None:
    routed = [run for run in RUNS if run != "at-s-dense"]
    for run, (*shown, pathways) in zip(routed, rows(METHODS, "What fails"), strict=True):
        found = json.loads((DOCS / "results/zoo" / run / "dissection.json").read_text())["pgd-50"]
        shares = [*found["categories"].values(), found["robust_accuracy"], found["router_robustness"]]
        assert all(map(agrees, shown, shares)) and int(pathways) == found["distinct_pathways"]["clean"]


def test_the_papers_numbers_stand_beside_ours() -> None:
    for line in (DOCS / "results/studies.md").read_text().splitlines():
        if line.startswith("| A") and "±" in line:
            method, *_, paper = (cell.strip() for cell in line.strip("|").split("|"))
            assert float(paper) == numbers("table1", "CIFAR-10", "ResNet-18", method)["ra_pgd50"]


@pytest.mark.parametrize(
    ("page", "studies", "keys", "count"),
    [
        ("studies.md", ("table1",), ("sa", "ra_pgd", "worst"), 5),
        ("price.md", ("efficiency-32", "efficiency"), ("ra_pgd", "worst", "sa"), 15),
        ("recipes.md", ("recipes",), ("ra_pgd", "worst", "sa"), 15),
    ],
)
def test_means_on_pages_are_those_of_stored_studies(page, studies, keys, count) -> None:
    tables = [json.loads((DOCS / "results/studies" / name / "study.json").read_text())["tables"][0] for name in studies]
    found = [[row[key][part] for key in keys for part in ("mean", "std")] for table in tables for row in table["rows"]]
    lines = [re.findall(r"([\d.]+) ± ([\d.]+)", line) for line in (DOCS / "results" / page).read_text().splitlines()]
    shown = [[float(number) for pair in line for number in pair] for line in lines if line]
    assert len(shown) == count
    for row in shown:
        assert any(row == pytest.approx(each, abs=0.0501) for each in found), row

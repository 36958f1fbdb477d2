"""Tests mirror the package: a module `advmoe/PATH/NAME.py` is tested in `tests/PATH/test_NAME.py`, and a package's own
`__init__.py` in `tests/PATH/NAME/test_NAME.py` or, of a package without other modules, `tests/PATH/test_NAME.py`.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

WITHOUT: dict[str, str] = {
    "__init__.py": "the package as it is imported: test_package.py",
    "__main__.py": "hands over to cli: every test that starts a process",
    "attacks/base.py": "records without behaviour, which tests of every attack make",
    "cli/zoo.py": "the command of zoo: zoo/test_zoo.py and zoo/test_entry.py",
    "models/__init__.py": "what makes and keeps models: models/test_create.py, models/test_model_files.py",
    "studies/rows.py": "records without behaviour, which every test of studies makes",
    "studies/study.py": "records without behaviour, which studies/test_catalogue.py reads",
    "tables/kinds.py": "a table of constants: models/test_create.py and contracts/",
    "training/__init__.py": "names of its modules, which a loop of one's own needs: training/test_own_loop.py",
    "training/midway.py": "checkpoints within an epoch, from which runs go on in training/test_preemption.py",
}
"""Modules without a test file of their own, and why. One that only passes names on needs none."""

BEYOND: dict[str, str] = {
    "contracts": "every entry of every table, whichever module it is of",
    "cuda": "every path of GPUs, on devices of host memory",
    "docs": "the pages of docs/",
    "slurm": "runs, studies and evaluations on a real SLURM",
    "soak": "hours of kills and damage, on whole commands",
    "test_benchmarks.py": "benchmarks/",
    "test_demo.py": "`make demo`",
    "test_modes.py": "permissions of all that is written",
    "test_mirror.py": "this file",
    "test_package.py": "the package as it is imported",
    "test_reimplementation.py": "AdvMoE, dissection, IoU and costs, written a second time",
    "test_plugin_tutorial.py": "what docs/how-to/extend.md says",
    "cli/test_nearest.py": "mistyped names, in every command",
    "cli/test_to_run.py": "what commands print to be run next",
    "cli/test_width.py": "what every command prints, in 80 columns",
    "evaluation/test_callables.py": "attacks and data of the user's own, through a whole evaluation",
    "hub/test_card_classes.py": "names of classes on cards",
    "models/test_backbones.py": "what holds for every CNN",
    "models/test_create.py": "create_model, of models/__init__.py",
    "models/test_model_files.py": "save_model and load_model, of models/__init__.py",
    "models/test_timm.py": "networks of timm, converted",
    "moe/test_token_routing.py": "one choice per token, through layers, attacks and counts",
    "report/test_browser.py": "the page in a real browser",
    "report/test_classes.py": "names of classes on pages",
    "studies/test_smoke.py": "every study, run",
    "training/test_data_notes.py": "what was left out of the images, from the reader to the results",
    "training/test_own_loop.py": "the loop of docs/tutorials/own-loop.md, of many modules' pieces",
    "training/test_own_models.py": "a network of the user's own, through every command",
    "training/test_own_pictures.py": "a folder of pictures, from training to predictions",
}
"""Test files, and folders of them, that are about more than one module, and about what."""


def passes_names_on(file: Path) -> bool:
    """Whether a package holds nothing but its docstring, imports, and the list of its names."""
    return file.name == "__init__.py" and all(
        isinstance(each, ast.Import | ast.ImportFrom)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        or (isinstance(each, ast.Assign) and [ast.unparse(target) for target in each.targets] == ["__all__"])
        for each in ast.parse(file.read_text(encoding="utf-8")).body
    )


def places(module: Path) -> list[Path]:
    """Where the tests of a module may lie, below tests/."""
    folder = module.parent
    if module.name != "__init__.py":
        return [folder / f"test_{module.name}"]
    return [folder / f"test_{folder.name}.py", folder.parent / f"test_{folder.name}.py"] if folder.name else []


def compared(root: Path) -> tuple[set[str], set[str]]:
    """The modules of a repository that have no test file, and the test files that have no module."""
    modules = {file.relative_to(root / "advmoe"): file for file in (root / "advmoe").rglob("*.py")}
    tests = {file.relative_to(root / "tests") for file in (root / "tests").rglob("test_*.py")}
    wanted = {module for module, file in modules.items() if not passes_names_on(file)}
    missing = {module.as_posix() for module in wanted if not tests & {*places(module)}}
    strays = tests - {place for module in modules for place in places(module)}
    return missing, {test.as_posix() for test in strays}


def test_every_module_has_its_test_file() -> None:
    missing, _ = compared(ROOT)
    assert sorted(missing - {*WITHOUT}) == [], "give each a test file, or a reason in WITHOUT"
    assert sorted({*WITHOUT} - missing) == [], "these have one, or are gone: take them off the list"


def test_every_test_file_has_its_module() -> None:
    _, strays = compared(ROOT)
    beyond = {test: {test, test.partition("/")[0]} & {*BEYOND} for test in strays}
    assert [test for test in beyond if not beyond[test]] == [], "name each for its module, or say in BEYOND"
    assert sorted({*BEYOND} - set().union(*beyond.values())) == [], "these have a module, or are gone: take them off"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository whose tests mirror it, but for one module and one test file."""
    files = {
        "advmoe/__init__.py": '"""All."""\n', "advmoe/a.py": "", "advmoe/b/__init__.py": "def f() -> None: ...\n",
        "advmoe/b/c.py": "", "advmoe/b/d.py": "", "advmoe/e/__init__.py": "X = 1\n",
        "advmoe/g/__init__.py": '"""Passed on."""\n\nfrom advmoe.b import f\n\n__all__ = ["f"]\n',
        "tests/test_a.py": "", "tests/b/test_b.py": "", "tests/b/test_c.py": "", "tests/test_d.py": "",
        "tests/test_e.py": "", "tests/b/conftest.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_test_file_elsewhere_is_not_the_module_s(tree: Path) -> None:
    assert compared(tree) == ({"b/d.py"}, {"test_d.py"})
    (tree / "tests/test_d.py").rename(tree / "tests/b/test_d.py")
    assert compared(tree) == (set(), set())


def test_a_package_that_does_more_than_pass_names_on_needs_one(tree: Path) -> None:
    (tree / "advmoe/g/__init__.py").write_text("from advmoe.b import f\n\nf()\n")
    assert compared(tree)[0] == {"b/d.py", "g/__init__.py"}


@pytest.mark.parametrize("target", ["lowest", "test-plain", "cuda", "triton"])
def test_what_the_makefile_tests_is_there(target: str) -> None:
    """pytest given a file that was renamed runs nothing at all."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    named = set(re.findall(r"tests/[\w./-]+", done.stdout))
    assert named and [each for each in sorted(named) if not (ROOT / each).exists()] == []

import re
import tomllib
from pathlib import Path

import pathspec
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, HATCH = PYPROJECT["project"], PYPROJECT["tool"]["hatch"]
RELATIVE = r"(?:\]\(|\]: |(?:src|href|srcset)=\"?)(?!https?:|#)(\S+)"
"""What a page of an index, which has no files beside it, cannot follow."""
BLOCK, SPAN = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE), re.compile(r"`[^`\n]*`")


def test_changelog_citation_and_project_name_the_same_version_of_the_same_day():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, day = headings[1]
    assert version == PROJECT["version"] == citation["version"]
    assert day == str(citation["date-released"])


def test_the_citation_is_of_the_software_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what CFF 1.2.0 asks for
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["license"] == PROJECT["license"]
    [paper] = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_no_file_of_the_package_is_one_that_the_build_leaves_out():
    assert HATCH["build"]["targets"]["wheel"] == {"packages": ["advmoe"]}
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text().splitlines())
    files = [path for path in (ROOT / "advmoe").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} >= {".py", ".yaml", ".json", ".cpp", ".h", ".css", ".js", ".typed"}
    assert not [path for path in files if ignored.match_file(path.relative_to(ROOT))]


def test_the_sdist_names_what_there_is():
    names = HATCH["build"]["targets"]["sdist"]["include"]
    assert "/advmoe" in names and all((ROOT / name.removeprefix("/")).exists() for name in names)


def as_shown(text: str) -> str:
    """The README as an index shows it: what hatch-fancy-pypi-readme makes of it."""
    for each in HATCH["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_the_long_description_links_to_no_file():
    text = (ROOT / "README.md").read_text()
    shown = as_shown(text)
    assert not re.findall(RELATIVE, SPAN.sub("", BLOCK.sub("", shown)))
    for kept in (re.compile(r"\]\((?:https?:|#)\S+"), BLOCK, SPAN):
        assert kept.findall(shown) == kept.findall(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see [the map](docs/map.md), [below](#end)", "see the map, [below](#end)"),
        ("![A picture](docs/a.svg)\n[paper](https://a.org/b)", "*A picture*\n[paper](https://a.org/b)"),
        ("`TABLE[name](x)` and `f[0][1](y)`", "`TABLE[name](x)` and `f[0][1](y)`"),
    ],
)
def test_of_links_to_files_the_text_stays_and_code_is_left_alone(text, shown):
    assert as_shown(text) == shown


def test_the_workflow_runs_everything_on_each_python_that_the_project_names():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["run"]
    named = [each.removeprefix("Programming Language :: Python :: ") for each in PROJECT["classifiers"]]
    assert job["strategy"]["matrix"]["python"] == [each for each in named if re.fullmatch(r"3\.\d+", each)]
    assert job["steps"][-1] == {"run": ".ci/run"}


def test_what_make_dist_builds_with_is_pinned():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = {re.split("[<>=]", each)[0] for each in PYPROJECT["build-system"]["requires"]}
    assert pinned >= asked | {"build", "twine"}

"""Tutorials as notebooks: what becomes of a page, and each of them run to its end by a Jupyter kernel."""

import json
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from notebooks import notebook
from pages import PAGES, ROOT

TUTORIALS = {page.stem: page for page in PAGES if page.parent.name == "tutorials"}

PAGE = """# A page

See [another](other.md#part) and [a site](https://example.com).

```text
drawn
```

```python title="one.py"
print(1)
```

## Run it

```bash
python one.py
advmoe recipes  # all
```

It prints:

```text
1
```

```python
1 + 1
```
"""


def test_prose_becomes_markdown_and_blocks_become_code_without_what_they_print() -> None:
    cells = json.loads(notebook(PAGE))["cells"]
    assert [(cell["cell_type"], cell["source"]) for cell in cells] == [
        (
            "markdown",
            "# A page\n\nIt needs advmoe where the notebook's kernel runs, and leaves its files in the notebook's "
            "folder.\n\nSee another and [a site](https://example.com).\n\n```text\ndrawn\n```",
        ),
        ("code", "%%writefile one.py\nprint(1)"),
        ("markdown", "## Run it"),
        ("code", "%run one.py\n!advmoe recipes  # all"),
        ("markdown", "It prints:"),
        ("code", "1 + 1"),
    ]


@pytest.mark.parametrize("page", TUTORIALS.values(), ids=TUTORIALS)
def test_every_tutorial_makes_a_valid_notebook(page) -> None:
    nbformat.validate(nbformat.reads(notebook(page.read_text()), 4))


FEWER = {
    "train": ["--training.epochs", "1", "--model.width", "4", "--data.train_examples", "128"],
    "evaluate": ["--attacks", "pgd-50", "--attack.steps", "2", "--num-examples", "20"],
    "dissect": ["--attack.steps", "2", "--num-examples", "20", "--no-figure"],
    "pathways": ["--attack.steps", "2", "--num-examples", "20"],
    "export": ["--num-examples", "2"],
}
"""What makes a command quick; of an option given twice the last counts."""

ADVMOE = f"""#!{sys.executable}
import json, subprocess, sys

words = sys.argv[1:]
fewer = {FEWER!r}.get(words[0], [])
if words[0] == "train" and "--model" in words:  # a network of one's own has its own width
    fewer = [word for word in fewer if word not in ("--model.width", "4")]
code = subprocess.run([sys.executable, "-m", "advmoe", *words, *fewer]).returncode
with open("calls.jsonl", "a") as file:
    print(json.dumps([code, *words]), file=file)
sys.exit(code)
"""
"""What the notebooks call: `advmoe`, made quick, its exit status kept (a cell goes on where a command failed)."""


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS.values(), ids=TUTORIALS)
def test_a_kernel_runs_every_tutorial(page, tmp_path, monkeypatch) -> None:
    for folder in ("bin", "work", "jupyter", "ipython"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "advmoe").write_text(ADVMOE)
    (tmp_path / "bin" / "advmoe").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ADVMOE_LOG_FORMAT", "text")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.reads(notebook(page.read_text()), 4)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path / "work")}}).execute()

    told = [output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])]
    asked = [line for cell in book.cells for line in cell.source.splitlines() if line.startswith("!advmoe ")]
    record = tmp_path / "work" / "calls.jsonl"
    calls = [json.loads(line) for line in record.read_text().splitlines()] if asked else []
    assert len(calls) == len(asked)
    assert all(code == 0 for code, *_ in calls), "".join(told)
    # What is told is lines alone: a notebook would keep all states of a bar.
    assert not re.search(r"\r(?!\n)|\x1b", "".join(told))
    assert sum("epoch 1/1" in text for text in told) == sum(words[0] == "train" for _, *words in calls)

"""A user's own classifier is loaded as its file says, and every mistake is one line that names it."""

import copy
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advmoe.evaluation.targets import is_source
from advmoe.models.sources import load_classifier

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(x.flatten(1))

def build():
    return Net(2)

def wide(width, *, depth=3):
    return Net(width)

def function():
    return lambda x: x.flatten(1)[:, :2]

def broken():
    raise KeyError("no such layer")

def number():
    return 7

def kind():
    return Net

def leaves():
    raise SystemExit("usage: ...")

instance = Net()
constant = 3
"""


@pytest.fixture
def write(tmp_path):
    """Writes a Python file and returns its path as text."""

    def make(text=NET, name="model.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return make


def message(spec, weights=None):
    path, modules = sys.path.copy(), set(sys.modules)
    with pytest.raises(ValueError) as error:
        load_classifier(spec, weights)
    assert sys.path == path
    assert not [name for name in set(sys.modules) - modules if not name.startswith("_advmoe_source_")]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "classes"), [("Net", 3), ("build", 2)])
def test_a_class_or_a_function_makes_the_module(write, name, classes):
    path, before = sys.path.copy(), torch.get_rng_state()
    model = load_classifier(f"{write()}:{name}")
    assert sys.path == path and torch.equal(torch.get_rng_state(), before)
    assert model(torch.rand(5, 1, 2, 2)).shape == (5, classes)
    assert not any(module.training for module in model.modules())


def test_classes_resolve_and_files_of_one_name_do_not_clash(write):
    first = load_classifier(f"{write()}:Net")
    second = load_classifier(f"{write(NET.replace('classes=3', 'classes=4'), 'other/model.py')}:Net")
    again = load_classifier(f"{write()}:Net")
    assert [model(torch.rand(1, 4)).shape[1] for model in (first, second, again)] == [3, 4, 3]
    for model in (first, second, again):
        assert getattr(sys.modules[type(model).__module__], "Net") is type(model)  # noqa: B009
        assert type(pickle.loads(pickle.dumps(model))) is type(model)
        copy.deepcopy(model)


def test_any_callable_will_do(write):
    x = torch.rand(5, 1, 2, 2)
    assert torch.equal(load_classifier(f"{write()}:function")(x), x.flatten(1)[:, :2])


@pytest.mark.parametrize(
    "statement", ["from layers import SIZE", "from .layers import SIZE", "from parts.sizes import SIZE"]
)
def test_files_beside_it_can_be_imported(write, statement):
    text = f"{statement}\n{NET}".replace("classes=3", "classes=SIZE")
    widths = []
    for folder, size in (("a", 5), ("b", 6)):
        write(f"SIZE = {size}", f"{folder}/layers.py")
        write("", f"{folder}/parts/__init__.py")
        write(f"SIZE = {size}", f"{folder}/parts/sizes.py")
        widths.append(load_classifier(f"{write(text, f'{folder}/model.py')}:Net")(torch.rand(1, 4)).shape[1])
    assert widths == [5, 6]
    assert not {"layers", "parts", "parts.sizes"} & set(sys.modules)


def test_imports_of_a_factory_and_odd_file_names(write):
    write("SIZE = 6", "layers.py")
    text = NET.replace("def build():", "def build():\n    from .layers import SIZE\n    import layers")
    assert load_classifier(f"{write(text, 'my-net.v2.py')}:build")(torch.rand(1, 4)).shape[1] == 2


def test_modules_of_a_folder_on_the_path_stay(write, tmp_path, monkeypatch):
    write("SIZE = 6", "ordinary_neighbour.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    load_classifier(f"{write('import ordinary_neighbour' + NET)}:Net")
    assert sys.modules.pop("ordinary_neighbour").SIZE == 6


ONCE = """
import torch
from torch import nn
runs = torch.__dict__.setdefault("_runs_of_a_test", [])
runs.append(__file__)
if len(runs) > 1 and runs[-1] in runs[:-1]:
    raise KeyError("Net is already registered")
"""


@pytest.fixture
def runs():
    """The files that have been executed, of those that hold `ONCE`."""
    torch.__dict__.pop("_runs_of_a_test", None)
    yield torch.__dict__.setdefault("_runs_of_a_test", [])
    del torch.__dict__["_runs_of_a_test"]


@pytest.mark.parametrize("statement", ["", "import layers", "from .layers import SIZE", "from parts import sizes"])
def test_a_file_is_executed_once_and_its_factory_each_time(write, runs, statement):
    """A class may be registered once in a process, by the file or by one beside it."""
    for name in ("layers.py", "parts/sizes.py"):
        write(f"SIZE = 6\n{ONCE}", name)
    write("", "parts/__init__.py")
    late = NET.replace("def build():", f"def build():\n    {statement or 'pass'}")
    spec, other = f"{write(f'{statement}{ONCE}{late}')}:build", f"{write(statement + NET, 'other.py')}:build"
    first, again, beside = (load_classifier(each) for each in (spec, spec, other))
    assert type(first) is type(again) and type(first) is not type(beside)
    assert first is not again and first.head.weight is not again.head.weight
    assert len(runs) == (2 if statement else 1)
    assert not {"layers", "parts", "parts.sizes"} & set(sys.modules)


@pytest.mark.parametrize("seeds", ["", "torch.manual_seed(7)", "torch.rand(3)"])
def test_instances_start_alike_though_the_file_runs_once(write, seeds):
    """As they do in another process, which executes the file itself."""
    spec, heads = f"{write(NET + seeds)}:Net", []
    for entry in (1, 1, 2):
        torch.manual_seed(entry)
        heads.append(load_classifier(spec).head.weight)
        assert torch.initial_seed() == entry
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2]) == ("seed" in seeds)


def test_a_file_that_has_changed_is_executed_anew(write):
    write("SIZE = 6", "layers.py")
    text = f"from layers import SIZE{NET}".replace("classes=3", "classes=SIZE")

    def outputs():
        return [load_classifier(f"{path}:Net")(torch.rand(1, 4)).shape[1] for path in paths]

    paths = [write(text), write(text, "other.py")]
    assert outputs() == [6, 6]
    write(text.replace("=SIZE", "=   9"))  # as long, and perhaps of the same second
    assert outputs() == [9, 6]
    write(text)
    write("SIZE = 11", "layers.py")
    assert outputs() == [11, 11]


def test_a_file_mended_after_an_error(write):
    spec = f"{write('import torch' + NET + 'raise KeyError(1)')}:Net"
    assert "KeyError" in message(spec)
    write(NET)
    assert load_classifier(spec)(torch.rand(1, 4)).shape[1] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.py:net", True), ("a/b c/model.py:net", True), ("model.py", True), ("model.py:", True),
        ("model.py:no name", True), ("runs/advmoe-0", False), ("model.py:x/run", False), ("model.pyc:net", False),
        ("models.py/run", False), ("model:net", False), ("", False),
    ],
)  # fmt: skip
def test_sources_are_told_from_run_directories(text, expected):
    assert is_source(text) is expected


@pytest.mark.parametrize("spec", ["model.py", "model.py:", "model.py:a.b", "model.txt:net", "runs/x", ":net", ""])
def test_not_a_file_and_a_name(spec):
    assert message(spec) == f"a classifier must be given as FILE.py:NAME, got {spec!r}"


def test_file_missing(tmp_path):
    (tmp_path / "folder.py").mkdir()
    for path in (tmp_path / "nothing.py", tmp_path / "folder.py"):
        assert message(f"{path}:net") == f"a classifier's file must exist, got '{path}'"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        (
            "import torch\nimport nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found' (line 2)",
        ),
        ("\n\nraise RuntimeError('two\\nlines')", "RuntimeError: two lines (line 3)"),
        ("def build(:\n    pass", "SyntaxError: invalid syntax (model.py, line 1)"),
        ("import sys\nsys.exit()", "SystemExit (line 2)"),
        ("from ..above import net", "ImportError: attempted relative import beyond top-level package (line 1)"),
        ("assert 1 == 2", "AssertionError (line 1)"),
    ],
)
def test_a_file_that_fails(write, text, got):
    path, before = write(text), set(sys.modules)
    assert message(f"{path}:build") == f"{path} must run without an error, got {got}"
    assert not [name for name in set(sys.modules) - before if name.startswith("_advmoe_source_")]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("biuld", "must name something in the file (did you mean build?), got 'biuld'"),
        ("xyz", "must name something in the file (it defines Net, build, wide and 6 more), got 'xyz'"),
        ("constant", "must be a function or class that makes the classifier, got an object of type int"),
        ("instance", "must be a function or class that makes the classifier, got an object of type Net"),
        ("wide", "must take no arguments, got wide(width, *, depth=3)"),
        ("broken", "must make the classifier without an error, got KeyError: 'no such layer' (line 23)"),
        ("leaves", "must make the classifier without an error, got SystemExit: usage: ... (line 32)"),
        (
            "number",
            "must return a torch.nn.Module or another callable from pixels to logits, got an object of type int",
        ),
        ("kind", "must return a torch.nn.Module or another callable from pixels to logits, got the class Net"),
    ],
)
def test_names_that_make_no_classifier(write, name, rule):
    path = write()
    assert message(f"{path}:{name}") == f"{path}:{name} {rule}"


# Weights


STATE = {"head.weight": torch.arange(12.0).view(3, 4), "head.bias": torch.tensor([1.0, 2.0, 3.0])}


@pytest.fixture
def weights(tmp_path):
    """Writes tensors as safetensors and returns the path as text."""

    def make(state=STATE, name="net.safetensors"):
        save_file(state, tmp_path / name)
        return str(tmp_path / name)

    return make


def test_weights_are_loaded(write, weights):
    model = load_classifier(f"{write()}:Net", weights())
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    # The rows of the weight, 0..3, 4..7 and 8..11, sum to 6, 22 and 38.
    assert model(torch.ones(1, 1, 2, 2)).tolist() == [[7, 24, 41]]
    assert not model.training


def test_weights_give_a_lazy_module_its_shape(write, weights):
    model = load_classifier(f"{write(NET.replace('nn.Linear(4, classes)', 'nn.LazyLinear(classes)'))}:Net", weights())
    assert model(torch.ones(1, 1, 2, 2)).tolist() == [[7, 24, 41]]


def many(state):
    return {f"block{i}.weight": torch.zeros(1) for i in range(5)} | state


@pytest.mark.parametrize(
    ("state", "got"),
    [
        ({"head.weight": STATE["head.weight"]}, "no head.bias"),
        ({"other": torch.zeros(2)}, "no head.weight, head.bias"),
        (many(STATE), "unexpected block0.weight, block1.weight, block2.weight and 2 more"),
        (STATE | {"head.weight": torch.zeros(3, 5)}, "other shapes: head.weight (3, 5) for (3, 4)"),
        (
            {name: torch.zeros(2) for name in STATE},
            "other shapes: head.weight (2,) for (3, 4), head.bias (2,) for (3,)",
        ),
    ],
)
def test_weights_that_do_not_fit(write, weights, state, got):
    path = weights(state)
    assert message(f"{write()}:Net", path) == f"{path} must hold the weights of Net, got {got}"


def test_weights_that_cannot_be_read(write, weights, tmp_path):
    spec, whole = f"{write()}:Net", (tmp_path / weights()).read_bytes()
    damaged = {"empty": b"", "header": whole[:20], "data": whole[:-4], "pickle": pickle.dumps({"head.bias": [1.0]})}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert message(spec, str(path)).startswith(
            f"{path} must be an undamaged safetensors file, got SafetensorError: "
        )


def test_weights_are_checked_before_the_file_runs(write, tmp_path):
    spec, missing = f"{write('raise RuntimeError')}:Net", str(tmp_path / "missing.safetensors")
    assert message(spec, missing) == f"weights must be a file that exists, got '{missing}'"


class Trap:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_pickle_is_never_read(write, tmp_path, suffix):
    path, sprung = tmp_path / f"net.{suffix}", tmp_path / "sprung"
    torch.save({"head.bias": Trap(str(sprung))}, path)
    text = message(f"{write()}:Net", str(path))
    if suffix == "pt":
        assert text == f"weights must be a .safetensors file (a pickle can run code, so none is read), got '{path}'"
    assert not sprung.exists()


def test_weights_for_what_is_no_module(write, weights):
    path, spec = weights(), f"{write()}:function"
    assert message(spec, path) == f"weights must be left out where {spec} returns no torch.nn.Module, got '{path}'"


def test_a_module_that_refuses_its_weights(write, weights):
    text = NET + "    \nNet.load_state_dict = lambda self, state: 1 / 0\n"
    with pytest.raises(ZeroDivisionError):  # the user's own code, with its traceback
        load_classifier(f"{write(text)}:Net", weights())
    assert isinstance(load_classifier(f"{write(text)}:Net"), nn.Module)


def test_moe_layers_of_one_number_are_refused(write):
    text = """
from torch import nn
from advmoe.moe import MoELinear

def build():
    return nn.Sequential(*(MoELinear(3, 3, bank_rows=6, num_experts=2, layer=0) for _ in range(2)))
"""
    assert message(f"{write(text)}:build").startswith("the MoE layers of a network must be numbered 0, 1, 2, ")

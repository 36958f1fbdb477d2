"""YAML, JSON and arrays of whoever wrote them: what they mean, and what is refused before it grows."""

import io
import json
import math
import zipfile

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.documents import DEEPEST, dump_yaml, parse_json, parse_object, parse_yaml, read_arrays
from advmoe.text import show


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),  # YAML 1.1: 8
        ("0o10", 8),
        ("0x1F", 31),
        ("-12", -12),
        ("1:30", "1:30"),  # 90
        ("1_000", "1_000"),  # 1000
        ("0b1", "0b1"),  # 1
        ("0x_", "0x_"),  # an error of Python's
        ("2001-01-01", "2001-01-01"),  # a date
        ("2001-99-99", "2001-99-99"),  # an error of Python's
        ("yes", "yes"),  # True
        ("off", "off"),  # False
        ("n", "n"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("NULL", None),
        ("5e-4", 0.0005),  # text
        ("1e3", 1000.0),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("'010'", "010"),
        ("<<: {a: 1}", {"<<": {"a": 1}}),  # a merge key
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
    ],
)
def test_yaml_is_read_as_version_1_2_has_it(text: str, value: object) -> None:
    read = parse_yaml(text, "text")
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 3000, f"more than {DEEPEST} levels at line 1"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, f"more than {DEEPEST} levels at line 1"),
        ("9" * 5000, "a number of 5000 digits"),
        ("0x" + "f" * 5000, "a number of 5002 digits"),
        ("!!int x", "a tag ('tag:yaml.org,2002:int') at line 1"),
        ("a: 1\nb: !!timestamp x", "a tag ('tag:yaml.org,2002:timestamp') at line 2"),
        ("!mine 1", "a tag ('!mine') at line 1"),
        ("{a: 1, a: 2}", "a is given twice at line 1"),
        ("{1: 1, 0x1: 2}", "0x1 is given twice at line 1"),
        ("? [a]\n: 1", "a key that is a list or a mapping at line 1"),
        ("\x01", "unreadable characters"),
        ("*a", "found undefined alias 'a' at line 1"),
        ("x" * 2000 + ": [", "..."),
    ],
)
def test_what_yaml_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^text must be valid YAML, got: ") as caught:
        parse_yaml(text, "text")
    assert problem in str(caught.value) or problem == "..."
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_large_yaml_is_not_parsed() -> None:
    with pytest.raises(ValueError, match=r"^text must be at most 100000 characters of YAML, got 100001$"):
        parse_yaml("#" * 100_001, "text")


def test_what_aliases_grow_to_is_never_written_out() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]  # nine lists of ten of the last: ten to the tenth
    lines += [
        f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    value = parse_yaml("\n".join(lines), "text")
    assert len(show(value["i"])) == 83 and show(value["a"]).startswith("['x', 'x'")


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.from_regex(r"[-+0-9.:_eox]{1,8}", fullmatch=True)
)
def test_text_stays_text_whichever_yaml_reads_it(text: str) -> None:
    written = dump_yaml({"a": text})
    assert parse_yaml(written, "text") == yaml.safe_load(written) == {"a": text}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "at most 32 levels"),
        ('{"a": ' * 40 + "1" + "}" * 40, "at most 32 levels"),
        ("NaN", "NaN, which is no number"),
        ('{"a": -Infinity}', "-Infinity, which is no number"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' given twice"),
        ("[" + "9" * 25 + "]", "integers within 64 bits"),
        (str(2**64), "integers within 64 bits"),
        ("9" * 5000, "must be JSON, got"),
        ("[1,", "must be JSON, got"),
    ],
)
def test_what_json_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^file must be JSON") as caught:
        parse_json(text, "file", finite=True)
    assert problem in str(caught.value) and len(str(caught.value)) < 300


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | st.text() | NUMBERS


@settings(deadline=None)
@given(st.recursive(PLAIN, lambda below: st.lists(below) | st.dictionaries(st.text(), below), max_leaves=20))
def test_other_json_is_what_it_was(value: object) -> None:
    assert parse_json(json.dumps(value), "file") == value


def test_results_may_hold_infinity() -> None:
    assert parse_object('{"value": Infinity}', "file") == {"value": math.inf}


def test_an_object_is_asked_for() -> None:
    assert parse_object('{"a": [1]}', "file") == {"a": [1]}
    with pytest.raises(ValueError, match=r"^file must hold a JSON object, got a list$"):
        parse_object("[]", "file")


def npy(shape: tuple[int, ...], *values: int, dtype: str = "<f4") -> bytes:
    """An .npy file that says `shape` and holds `values` of 4 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + np.array(values, "<f4").tobytes()


def npz(path, **files: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_arrays(tmp_path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(6).reshape(2, 3), name=np.array("moe"), one=np.array(1.5))
    read = read_arrays(tmp_path / "a.npz")
    assert {name: array.tolist() for name, array in read.items()} == {
        "x": [[0, 1, 2], [3, 4, 5]], "name": "moe", "one": 1.5,
    }  # fmt: skip
    assert list(read_arrays(tmp_path / "a.npz", ["one", "two"])) == ["one"]
    assert read_arrays(npz(tmp_path / "b.npz", x=npy((2,), 3, 4)))["x"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (npy((10**12,), 1), "an array x.npy that says 4000000000000 bytes and has 4"),
        (npy((1,), 1, 2), "an array x.npy that says 4 bytes and has 8"),
        (npy((1,), 1, dtype="|O"), "x.npy"),
        (npy((250_000,)) + bytes(1_000_000), "arrays of more than 100000 bytes"),  # some 1 kB of file
        (b"\x93NUMPY", "must be an undamaged"),
        (b"", "must be an undamaged"),
    ],
)
def test_sizes_of_arrays_are_looked_at_first(tmp_path, content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=r"x\.npz must be an undamaged \.npz file, got ") as caught:
        read_arrays(npz(tmp_path / "x.npz", x=content), most=100_000)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_archive(tmp_path) -> None:
    path = tmp_path / "x.npz"
    for content in (b"", b"PK", npz(path, x=npy((2,), 3, 4)).read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz must be an undamaged \.npz file, got "):
            read_arrays(path)
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "absent.npz")

"""YAML, JSON and arrays, whoever wrote them, read within bounds of size, depth and number.

What goes beyond the bounds, or is malformed, is a `ValueError` of one line that says where.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from advmoe.errors import InputError
from advmoe.text import cut, one_line, show

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_YAML = 100_000
"""Characters of a YAML text: PyYAML reads some 100,000 a second."""
MOST_JSON = 32_000_000
"""Bytes of a JSON file."""
DEEPEST = 32
"""Levels of lists and mappings in one another."""
MOST_ARRAYS = 1_000_000_000
"""Bytes of all arrays of a file together, unless its reader knows better."""


# YAML


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 (its core schema): `010` is 10, `1:30`, `yes` and dates are text, `5e-4` is a number, `<<` is a key.

    A key given twice is an error rather than the last value, as are tags, which configurations have no use for.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"a tag ({show(event.tag)}){_where(event.start_mark)}")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels{_where(event.start_mark)}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys are of YAML 1.1, and grow without bounds."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key that is a list or a mapping{_where(key.start_mark)}")
            if name in seen:
                raise yaml.YAMLError(f"{cut(key.value, 80)} is given twice{_where(key.start_mark)}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _where(mark: Any) -> str:
    return "" if mark is None else f" at line {mark.line + 1}"


_SCALARS: dict[str, tuple[str, str]] = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Of each type of YAML 1.2's core schema, how it is written and with what it begins. The first that fits counts."""

_MOST_DIGITS = 400
"""More than any float has."""


def _integer(text: str) -> int | float:
    if len(text) > _MOST_DIGITS:
        raise yaml.YAMLError(f"a number of {len(text)} digits")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _decimal(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_VALUES: dict[str, Callable[[str], Any]] = {
    "null": lambda _: None, "bool": lambda text: text.lower() == "true", "int": _integer, "float": _decimal,
}  # fmt: skip


class _YamlDumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for something else."""


def _teach(name: str, pattern: str, first: str) -> None:
    """Have both know how a type is written, and the loader what it means."""
    tag, make = f"tag:yaml.org,2002:{name}", _VALUES[name]
    for each in (_YamlLoader, _YamlDumper):
        each.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), [*first, *[""] * (name == "null")])
    _YamlLoader.add_constructor(tag, lambda _, node: make(node.value))


_YamlLoader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _teach(_name, _pattern, _first)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text, as YAML 1.2 has it; a `ValueError` of one line says where `name` is no YAML."""
    if len(text) > MOST_YAML:
        raise InputError(f"{name} must be at most {MOST_YAML} characters of YAML, got {len(text)}")
    try:
        return yaml.load(text, Loader=_YamlLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        if isinstance(error, yaml.reader.ReaderError):
            problem = "unreadable characters"
        elif isinstance(error, yaml.MarkedYAMLError):
            problem = f"{error.problem}{_where(error.problem_mark)}"
        else:
            problem = str(error)
        raise InputError(f"{name} must be valid YAML, got: {cut(problem, 200)}") from None


def dump_yaml(value: Any) -> str:
    """The YAML text of plain nested dictionaries, lists, text and numbers, the same by YAML 1.1 and 1.2."""
    text: str = yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)
    return text


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """The content of a file. Raises `ValueError` for more than `most` bytes."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path} must be {what} of at most {most} bytes, got more")
    return content


def read_text(path: Path, most: int, what: str) -> str:
    """The text of a file. Raises `ValueError` for more than `most` bytes, or what is no UTF-8."""
    try:
        return read_bytes(path, most, what).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} must be valid {what}, got: bytes that are not UTF-8") from None


# JSON


def parse_json(text: str | bytes, name: str, *, finite: bool = False) -> Any:
    """The value of a JSON text. Raises `ValueError` for what is no JSON, keys given twice, integers of more than 64
    bits, more than `DEEPEST` levels, and, with `finite`, for NaN and infinity, which results may hold.
    """
    constant = _no_number if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=constant)
    except RecursionError:
        raise InputError(f"{name} must be JSON of at most {DEEPEST} levels, got more") from None
    except ValueError as error:
        raise InputError(f"{name} must be JSON, got: {cut(str(error), 200)}") from None
    level, depth = [value], 0
    while level:
        if any(type(each) is int and not -(2**63) <= each < 2**64 for each in level):
            raise InputError(f"{name} must be JSON of integers within 64 bits, got more")
        nested = [each for each in level if isinstance(each, dict | list)]
        depth += bool(nested)
        if depth > DEEPEST:
            raise InputError(f"{name} must be JSON of at most {DEEPEST} levels, got more")
        level = [below for each in nested for below in (each.values() if isinstance(each, dict) else each)]
    return value


def parse_object(text: str | bytes, name: str, *, finite: bool = False) -> dict[str, Any]:
    """The object of a JSON text. Raises `ValueError` for anything else (see `parse_json`)."""
    value = parse_json(text, name, finite=finite)
    if not isinstance(value, dict):
        raise InputError(f"{name} must hold a JSON object, got a {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise InputError(f"{show(twice)} given twice")
    return mapping


def _no_number(name: str) -> NoReturn:
    raise InputError(f"{name}, which is no number of JSON's")


# Arrays


def read_arrays(path: Path, wanted: Iterable[str] | None = None, most: int = MOST_ARRAYS) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file by name, all or those `wanted` that there are.

    Sizes are read first. Raises `ValueError` for arrays of more than `most` bytes, of objects, or of other sizes than
    they say; for a file that is no such file too.
    """
    import numpy as np  # here, as the command line's help does without it

    try:
        with zipfile.ZipFile(path) as file:
            members = {name.removesuffix(".npy"): name for name in file.namelist() if name.endswith(".npy")}
            names = [name for name in (members if wanted is None else wanted) if name in members]
            _require_small(file, [members[name] for name in names], most)
            arrays = {}
            for name in names:
                with file.open(members[name]) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
            return arrays
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, SyntaxError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise InputError(f"{path} must be an undamaged .npz file, got {one_line(error)}") from None


def _require_small(file: zipfile.ZipFile, members: list[str], most: int) -> None:
    """Raise `ValueError` unless the arrays are as large as their entries, and all together no larger than `most`."""
    if sum(file.getinfo(member).file_size for member in members) > most:
        raise InputError(f"arrays of more than {most} bytes")
    for member in members:
        with file.open(member) as opened:
            _require_told(opened, file.getinfo(member).file_size, f"an array {member}")


def read_array(path: Path) -> NDArray[Any]:
    """The array of an `.npy` file. Raises `ValueError` for one of objects, or of another size than it says."""
    import numpy as np

    with path.open("rb") as file:
        _require_told(file, path.stat().st_size, "an array")
        file.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return array


def _require_told(file: Any, size: int, what: str) -> None:
    """Raise `ValueError` unless the header of an array's file of `size` bytes tells of as many, and of no objects."""
    import numpy as np

    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise InputError(f"{what} of version {version}")
    shape, _, dtype = read[version](file)
    told, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if dtype.hasobject or told != actual:
        raise InputError(f"{what} that says {told} bytes and has {actual}")

"""A table: what can be chosen by name, and all that the program asks about each choice. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any, Generic, TypeVar

from advmoe.errors import InputError
from advmoe.tables.plugins import discover
from advmoe.text import nearest, show

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Family(Generic[Entry]):
    """Entries whose names hold a number or words, such as `every-K`."""

    spelling: str
    """How their names are spelt, as messages say it."""
    read: Callable[[str], Entry | None]
    """The entry of a name; None where the name is not of the family, `InputError` where its numbers do not do."""
    example: str = ""
    """A name of the family, for the tests that try every entry: the cheapest."""
    usual: tuple[str, ...] = ()
    """Names that a mistyped one may have meant, with its own numbers in place of theirs."""


class Table(MutableMapping[str, Entry]):
    """The entries of one field by name, in the order in which they are shown."""

    def __init__(self, field: str, entries: Mapping[str, Entry], *families: Family[Entry]) -> None:
        self.field, self.families = field, families
        self._entries = dict(entries)
        self._own = frozenset(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def known(self) -> str:
        """The names that there are, families by their spelling, separated by commas."""
        discover()
        return ", ".join([*self, *(family.spelling for family in self.families)])

    def examples(self) -> list[str]:
        """The names that there are, and one of each family that gives an example."""
        return [*self, *(family.example for family in self.families if family.example)]

    def find(self, name: Any, field: str | None = None) -> Entry:
        """The entry called `name`, of a plugin where no other has it. Raises `InputError`, which names the field and
        lists what there is.
        """
        if isinstance(name, str):
            if (entry := self._named(name)) is not None:
                return entry
            discover()
            if name in self._entries:
                return self._entries[name]
        raise InputError(f"{field or self.field} must be one of {self.known()}, got {show(name)}{self.near(name)}")

    def near(self, name: Any) -> str:
        """A hint at the name that a mistyped one may have meant, to end a message with; empty without any."""
        if not isinstance(name, str):
            return ""
        usual = [each for family in self.families for each in (family.example, *family.usual)]
        return nearest(name, [*self, *filter(self._sound, (_with_numbers_of(name, each) for each in usual))])

    def _sound(self, name: str) -> bool:
        """Whether there is an entry called `name`."""
        try:
            return self._named(name) is not None
        except InputError:
            return False

    def _named(self, name: str) -> Entry | None:
        if name in self._entries:
            return self._entries[name]
        return next((entry for family in self.families if (entry := family.read(name)) is not None), None)

    def require(self, field: str, value: Any) -> None:
        """Raise the `InputError` of `find` unless there is an entry called `value`."""
        self.find(value, field)

    def added(self, name: Any) -> bool:
        """Whether a plugin has added an entry called `name`."""
        discover()
        return name in self._entries and name not in self._own

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry. Raises `InputError` for what is no name, or one that is taken."""
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) is None:
            rule = "a name of letters, digits, _, ., + and -, the first a letter, digit or _"
            raise InputError(f"{self.field} must get {rule}, got {show(name)}")
        if self._named(name) is not None:
            raise InputError(f"{self.field} has {show(name)} already")
        self._entries[name] = entry


def _with_numbers_of(name: str, usual: str) -> str:
    numbers = iter(re.findall(r"\d+", name))
    return re.sub(r"\d+", lambda match: next(numbers, match[0]), usual)


def lazily(path: str, **options: Any) -> Callable[..., Any]:
    """What `module:name` calls with these options, imported at the first call."""
    return partial(_call, path, **options)


def _call(path: str, *args: Any, **options: Any) -> Any:
    return resolve_name(path)(*args, **options)

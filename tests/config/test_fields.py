"""What a field may hold: strengths and their spelling, types, ranges, text and paths."""

import dataclasses
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from advmoe.config.fields import FollowingStep, Pixels, Strict, Within, check_types, require_path, require_text, typed


def test_a_strength_keeps_its_spelling() -> None:
    eps = Pixels("8/255")
    assert eps == 8 / 255
    assert str(eps) == "8/255"
    assert pickle.loads(pickle.dumps(eps)).text == "8/255"
    assert Pixels(0.1) == 0.1


@pytest.mark.parametrize("value", ["x", "1/0", "1/2/3", "/", "", None, True, [1], "1_0/255", "nan", "inf", "\u0663"])
def test_what_is_no_strength(value: object) -> None:
    with pytest.raises(ValueError, match="number or a fraction such as 8/255, got"):
        Pixels(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("eps", "share", "step"),
    [
        ("8/255", 1.25 / 2, "5/255"),  # the paper's: two steps of 5/255 in training, 2/255 in attacks
        ("8/255", 1 / 4, "2/255"),
        ("2/255", 1.25 / 2, "1.25/255"),
        (8 / 255, 1 / 4, "2/255"),  # one value has one step, however it is written
        ("0.5", 1 / 4, "0.125"),
        ("0", 1 / 4, "2/255"),  # of no radius the paper's
    ],
)
def test_a_step_that_follows_the_radius_by_hand(eps: float | str, share: float, step: str) -> None:
    following = FollowingStep.of(Pixels(eps), share)
    assert following.text == step and following == Pixels(step)
    again = pickle.loads(pickle.dumps(following))
    assert type(again) is FollowingStep and again.text == step


def refusal(call: Any, *args: Any) -> str:
    """The one line that refuses, less the name of the field."""
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_range_says_its_bounds() -> None:
    within, share = Within(1, 5), Within(0, 1, open=True)
    for value in (1, 5, 2.5):
        within.require("x", value)
    share.require("x", 1)
    assert refusal(within.require, "x", 0.5) == "x must be >= 1, got 0.5"
    # The upper bound is told to whom it concerns: a bound of sense only where it is crossed.
    assert refusal(within.require, "x", 6) == "x must be >= 1 and <= 5, got 6"
    assert refusal(share.require, "x", 0) == "x must be > 0 and <= 1, got 0"
    assert refusal(share.require, "x", math.nan) == "x must be > 0 and <= 1, got nan"


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3), (float, 3, 3.0), (bool, True, True), (str, "a", "a"), (str, Path("a/b"), "a/b"),
        (int | None, None, None), (int | None, 3, 3), (Literal["a", "b"], "b", "b"), (Pixels, "1/4", 0.25),
        (Annotated[float, Within(0, 1)], 1, 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_takes_the_field_s_type(hint: Any, value: object, expected: object) -> None:
    result = typed("x", hint, value)
    assert result == expected and isinstance(result, type(expected))


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, 3.0, "x must be a whole number, got 3.0"),
        (int, True, "x must be a whole number, got True"),
        (float, "3", "x must be a number, got '3'"),
        (bool, 1, "x must be true or false, got 1"),
        (str, 3, "x must be text, got 3"),
        (int | None, "", "x must be a whole number, got ''"),
        (Literal["a", "b"], "c", "x must be one of a, b, got 'c'"),
        (Literal["a", "b"], ["a"], "x must be one of a, b, got ['a']"),
        (Pixels, "1/0", "x must be a number or a fraction such as 8/255, got '1/0'"),
        (Annotated[float, Within(0, 1)], 10**400, "x must be >= 0 and <= 1, got inf"),
    ],
    ids=str,
)
def test_another_type_is_named(hint: Any, value: object, message: str) -> None:
    assert refusal(typed, "x", hint, value) == message


def test_text_is_what_a_line_of_a_file_holds() -> None:
    require_text("x", "é 猫 '")
    require_text("x", "", empty=True)
    require_text("x", "a" * 4096)
    for value in ("", "a\nb", "a\x00", "\udcff", "a" * 4097):
        assert refusal(require_text, "x", value).startswith("x must be 1 to 4096 characters of UTF-8 without control")
    assert refusal(lambda: require_text("x", "\t", empty=True)).startswith("x must be 0 to 4096 characters")


def test_a_path_is_counted_in_bytes() -> None:
    require_path("x", "/".join(["a" * 255] * 15))  # 15 x 255 and 14 strokes: 3839 bytes
    require_path("x", "é" * 127)  # two bytes each
    for value in ("é" * 128, "/".join(["a" * 255] * 16)):
        assert refusal(require_path, "x", value).startswith("x must be a path of at most 3840 bytes, each of its parts")
    assert refusal(require_path, "x", "abc", 2).startswith("x must be a path of at most 3840 bytes, each of its parts ")


@dataclass(kw_only=True)
class Section(Strict):
    """Two fields."""

    rate: Annotated[float, Within(0, 1)] = 0.5
    name: str = "a"


def test_a_section_is_checked_and_converted_in_place() -> None:
    section = Section(rate=1)
    check_types(section, "group")
    assert dataclasses.asdict(section) == {"rate": 1.0, "name": "a"} and type(section.rate) is float
    assert refusal(check_types, Section(rate=2), "group") == "group.rate must be >= 0 and <= 1, got 2.0"
    assert refusal(check_types, Section(rate=2)) == "rate must be >= 0 and <= 1, got 2.0"


def test_a_section_takes_no_attribute_that_it_lacks() -> None:
    section = Section()
    section.rate = 0.25
    with pytest.raises(AttributeError, match=r"^Section has no field 'rat'.*rate"):
        section.rat = 0.5  # type: ignore[attr-defined]
    assert section == Section(rate=0.25)

"""What the commands share: options made of fields, numbers, runs that exist, and near matches of a misspelt option."""

import argparse

import pytest

from advmoe.cli.arguments import (
    Unfinished,
    add_fields,
    continuable,
    existing_run,
    fail,
    grouped,
    new_parser,
    number,
    radii,
    require_sound,
    split_words,
    unknown_option,
)
from advmoe.config import Config, Count
from advmoe.errors import InputError


def test_a_parser_reports_what_was_given_alone():
    parser = new_parser("what it does")
    add_fields(parser, {"training": ("lr", "epochs")}, defaults=True)
    assert vars(parser.parse_args([])) == {}
    assert grouped(vars(parser.parse_args(["--training.lr", "0.1"]))) == {"training": {"lr": "0.1"}}
    with pytest.raises(InputError, match=r"unrecognized arguments: --training\.l 1"):
        parser.parse_args(["--training.l", "1"])  # no abbreviations
    assert "--training.momentum" not in parser.format_help()


def test_help_says_what_a_field_means_and_its_default():
    parser = new_parser("what it does")
    add_fields(parser, {"training": ("epochs",)}, defaults=True)
    text = " ".join(parser.format_help().split())
    assert f"(default: {Config().training.epochs})" in text and "--training.epochs INT" in text


def test_options_of_a_group_lie_under_its_name():
    assert grouped({"run": "a", "data.root": "b", "data.name": "c"}) == {"run": "a", "data": {"root": "b", "name": "c"}}


def test_numbers_are_read_by_their_type():
    assert number("--n", Count, None) is None and number("--n", Count, "7") == 7
    for text, got in (("0", "0"), ("1.5", "1.5"), ("x", "'x'")):
        with pytest.raises(ValueError, match=rf"^--n must be .*got {got}$"):
            number("--n", Count, text)


def test_words_of_a_list():
    assert split_words(" a, b,,c ,") == ["a", "b", "c"] and split_words("") == []


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--trianing.lr=3", "--trianing.lr is no option of train: did you mean --training.lr?"),
        ("--zzz", "--zzz is no option of train: see advmoe train --help"),
        ("more", "train must get no more than `advmoe train --help` names, got 'more' too"),
    ],
)
def test_an_unknown_word_is_told_with_near_matches(word, hint):
    parser = new_parser("")
    parser.add_argument("--training.lr")
    assert str(unknown_option([word], "train", parser)) == hint


def test_paths_are_looked_at_by_what_stands_for_them():
    parser = new_parser("")
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--title", metavar="TEXT")
    require_sound(parser, {"out": "a/b", "title": "x" * 300})
    for options in ({"out": "x" * 300}, {"out": "a\0b"}, {"title": "a\nb"}):
        (name,) = options
        with pytest.raises(ValueError, match=f"^--{name} must be"):
            require_sound(parser, options)


def test_a_run_is_a_folder_with_a_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"^RUN must be a run directory \(one that holds a config.yaml\), got"):
        existing_run("RUN", str(tmp_path))
    (tmp_path / "config.yaml").write_text("")
    assert existing_run("RUN", str(tmp_path)) == tmp_path


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_can_be_gone_on_with_says_by_which_command(tmp_path, error):
    (tmp_path / "mark").touch()
    with (
        pytest.raises(Unfinished, match=r"to continue: advmoe again$") as caught,
        continuable(tmp_path, "advmoe again", "mark"),
    ):
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(type(error)), continuable(tmp_path, "advmoe again", "absent"):
        raise error


def test_a_mistake_is_one_line_on_stderr(capsys):
    assert fail(InputError("a\n  b"), 2) == 2
    assert capsys.readouterr() == ("", "advmoe: error: a b\n")


def test_parsing_errors_are_mistakes_of_the_input():
    parser = new_parser("")
    parser.add_argument("run")
    assert isinstance(parser, argparse.ArgumentParser)
    with pytest.raises(InputError, match="required: run"):
        parser.parse_args([])


def test_a_list_of_radii_names_its_option():
    assert radii("--eps", "0, 2/255,0.5") == [0, 2 / 255, 0.5]
    for text, told in (("nine", "'nine'"), ("2/255,1/0", "'1/0'")):
        with pytest.raises(ValueError, match=f"^--radii must be a number or a fraction such as 8/255, got {told}$"):
            radii("--radii", text)
    for text in ("", " , ", "-1", "0.1,-2/255"):
        with pytest.raises(ValueError, match=f"^--radii must be at least one radius >= 0, got {text!r}$"):
            radii("--radii", text)

"""What an interrupted evaluation left, where it is damaged."""

import pytest

from advmoe.evaluation.harness import Journal, Task

TASK, RESULT = Task("pgd-4", 0), {"robust": [1, 0]}


@pytest.fixture
def left(tmp_path):
    """A place where one task is done."""
    journal = Journal(tmp_path / "left")
    journal.open({"seed": 0}, resume=False)
    journal.put(TASK, RESULT)
    return tmp_path / "left"


def test_what_is_sound_is_continued(left):
    journal = Journal(left)
    assert journal.open({"seed": 0}, resume=True) == {"fingerprint": {"seed": 0}}
    assert journal.get(TASK) == RESULT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, got a list"),
        ("{", "must be JSON, got"),
        ("{}", "must hold the settings that --resume continues (fingerprint), got None"),
    ],
)
def test_damaged_settings_are_named_and_left_alone(left, text, message):
    head = left / "evaluation.json"
    head.write_text(text)
    with pytest.raises(ValueError) as caught:
        Journal(left).open({"seed": 0}, resume=True)
    assert str(caught.value).startswith(f"{head} {message}")
    assert head.read_text() == text and (left / TASK.file).exists()


@pytest.mark.parametrize("text", ["[]", '{"robust": [1,'])
def test_a_damaged_result_is_of_a_task_yet_to_be_done(left, text):
    (left / TASK.file).write_text(text)
    journal = Journal(left)
    assert journal.get(TASK) is None
    journal.put(TASK, RESULT)
    assert Journal(left).get(TASK) == RESULT

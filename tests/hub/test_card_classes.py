"""A card names the classes, the first of many."""

import pytest

from advmoe.hub.card import Record, _summary

SPEC = {"name": "resnet18", "kind": "dense", "in_channels": 3, "input_size": 32}


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (None, "for 3 classes of images"),
        (["ant", "bee", "cat"], "for 3 classes (ant, bee, cat) of images"),
        ([f"c{k}" for k in range(12)], "for 12 classes (c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 2 more) of images"),
    ],
)
def test_names_of_classes(classes, words):
    spec = SPEC | {"num_classes": len(classes or "abc")} | ({} if classes is None else {"classes": classes})
    assert words in _summary(spec, Record())

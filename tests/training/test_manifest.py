"""A manifest that is damaged."""

import pytest

from advmoe.training import manifest as manifests

WHOLE = {"name": "run", "command": None, "devices": 1, "threads": 2}


def test_a_manifest_comes_back(tmp_path):
    manifests.write(tmp_path, WHOLE)
    assert manifests.read(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object, got a list"),
        ('{"name": "run", "command": null}', "must hold what a run is resumed by, got no devices, threads"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    file = tmp_path / "manifest.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        manifests.read(tmp_path)
    assert str(caught.value) == f"{file} {message}"

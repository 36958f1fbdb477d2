"""From pictures, however they are given, to names."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from advmoe.errors import InputError
from advmoe.models import Classifier, create_model, load_model, save_model
from advmoe.models.predictions import Prediction, predict
from advmoe.moe import pathway

SPEC: dict[str, Any] = {
    "num_classes": 3, "input_size": 8, "in_channels": 3, "classes": ["ant", "bee", "cat"], "cut": "middle-square",
}  # fmt: skip


def redness(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (0, log 2, log mean red / (1 - mean red)), and a pathway of two layers for each image."""
    red = x[:, 0].mean((1, 2)).clamp(1e-6, 1 - 1e-6)
    logits = torch.stack([torch.zeros(len(x)), torch.full((len(x),), 2.0).log(), (red / (1 - red)).log()], 1)
    return logits, torch.stack([(red > 0.5).long(), torch.ones(len(x)).long()], 1)


def test_names_and_probabilities_by_hand() -> None:
    # Red 0.8: odds 1 : 2 : 4.
    x = torch.zeros(3, 8, 8)
    x[0] = 0.8
    told = predict(redness, SPEC, x, 2)
    assert told.classes == ("cat", "bee") and told.pathway == (1, 1)
    assert told.probabilities == pytest.approx((4 / 7, 2 / 7))


def picture(size: tuple[int, int] = (8, 8), red: int = 204) -> Image.Image:
    return Image.new("RGB", size, (red, 0, 0))


def test_every_way_to_give_a_picture_is_one(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    wide = Image.new("RGB", (24, 8))
    wide.paste(picture(), (8, 0))  # its middle square
    x = torch.zeros(3, 8, 8)
    x[0] = 0.8
    ways: list[Any] = [
        tmp_path / "a.png", str(tmp_path / "a.png"), picture(), picture((80, 80)), wide, np.asarray(picture()), x,
        x.numpy(), x.double(), (x * 255).to(torch.uint8), picture().convert("RGBA"),
    ]  # fmt: skip
    told = predict(redness, SPEC, ways, 3)
    assert isinstance(told, list) and len(told) == len(ways)
    for one in told:
        assert one.classes == ("cat", "bee", "ant")
        assert one.probabilities == pytest.approx((4 / 7, 2 / 7, 1 / 7), abs=1e-5)
    assert predict(redness, SPEC, torch.stack([x, x]), 3) == told[6:7] * 2


def test_a_grey_model_takes_coloured_pictures() -> None:
    spec = SPEC | {"in_channels": 1}
    # ITU-R 601: 0.299 of red. 0.299 * 204 = 60.996 -> 61 of 255.
    seen: list[Tensor] = []

    def network(x: Tensor) -> tuple[Tensor, None]:
        seen.append(x)
        return torch.zeros(len(x), 3), None

    assert predict(network, spec, picture(), 1).pathway is None
    assert seen[0].shape == (1, 1, 8, 8) and torch.allclose(seen[0], torch.tensor(61 / 255), atol=1 / 255)


def test_a_picture_one_pixel_high_keeps_its_colours_and_one_without_pixels_is_refused() -> None:
    row = np.tile(np.array([204, 51, 51], np.uint8), (1, 5, 1))
    assert predict(redness, SPEC, row, 3) == predict(redness, SPEC, Image.fromarray(row), 3)
    nothing: list[Any] = [np.zeros((0, 5, 3), np.uint8), np.zeros((0, 5), np.uint8), Image.new("RGB", (0, 5))]
    for each in nothing:
        with pytest.raises(InputError, match=r"^an image must have pixels, got"):
            predict(redness, SPEC, each, 3)


def test_many_pictures_are_as_each_alone() -> None:
    many: list[Any] = [picture(red=level) for level in range(0, 250, 2)]
    together = predict(redness, SPEC, many, 3)
    alone = [predict(redness, SPEC, each, 3) for each in many]
    assert [one.classes for one in together] == [one.classes for one in alone]


def cut_short() -> Image.Image:
    """A picture whose file ends before it does, opened and not yet decoded."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:-100]))


@pytest.mark.parametrize("kind", [">f4", "<f8", "f2", np.longdouble])
def test_numbers_of_any_size_and_order_are_pixels(kind: Any) -> None:
    pixels = np.linspace(0, 1, 3 * 64).reshape(3, 8, 8)
    (expected,), (told,) = (predict(redness, SPEC, [each], 1) for each in (pixels, pixels.astype(kind)))
    assert told.probabilities == pytest.approx(expected.probabilities, abs=1e-3)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ("absent.png", "'absent.png'"),
        ("http://a.b/c.png", "a file on this machine, got 'http://a.b/c.png'"),
        ("", "got ''"),
        (torch.rand(3, 9, 9), "(3, 8, 8)"),
        (torch.rand(8, 8), "(8, 8)"),
        (torch.full((3, 8, 8), 255.0), "in [0, 1], got 255"),
        (torch.full((3, 8, 8), float("nan")), "in [0, 1], got nan"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (7, "got 7"),
        (np.zeros((2, 2, 2, 2, 2)), "(2, 2, 2, 2, 2)"),
        (np.zeros((4, 4, 7), np.uint8), "(4, 4, 7)"),
        (np.zeros((3, 8, 8), object), "an array of object"),
        (np.full((3, 8, 8), "a"), "an array of <U1"),
        (np.zeros((3, 8, 8), complex), "complex128"),
        (cut_short(), "truncated"),
    ],
)
def test_what_is_no_picture_is_named(bad: Any, part: str) -> None:
    with pytest.raises(InputError) as error:
        predict(redness, SPEC, [picture(), bad], 1)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("top", [0, -1, True, 1.5])
def test_top_must_be_a_number(top: Any) -> None:
    with pytest.raises(InputError, match="top must be"):
        predict(redness, SPEC, picture(), top)


@pytest.fixture(scope="module")
def model() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("wrn-10-1", num_classes=3, width=4, input_size=16, classes=("ant", "bee", "cat"))


def test_a_model_predicts_in_eval_mode_and_keeps_its_own(model: Classifier) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(2, 3, 16, 16)
    told = model.predict(x, top=3)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        shares = model(x).softmax(1)
    for i, one in enumerate(told):
        assert isinstance(one, Prediction)
        assert one.pathway == tuple(pathway(model, x)[i].tolist())
        assert one.probabilities == pytest.approx(shares[i].sort(descending=True).values.tolist())
        assert one.classes[0] == ("ant", "bee", "cat")[int(shares[i].argmax())]


def test_names_travel_with_the_weights(model: Classifier, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    assert load_model(tmp_path).predict(picture(), top=3).classes == model.predict(picture(), top=3).classes


@pytest.mark.parametrize(
    ("labels", "part"),
    [({"classes": ["a", "b"]}, "3 names"), ({"classes": "abc"}, "3 names"), ({"classes": [1, 2, 3]}, "3 names"),
     ({"cut": "sideways"}, "middle-square")],
)  # fmt: skip
def test_labels_that_cannot_be_are_refused(labels: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part):
        create_model("wrn-10-1", num_classes=3, width=4, input_size=16, **labels)


def test_a_model_without_names_numbers_its_classes() -> None:
    model = create_model("wrn-10-1", num_classes=3, width=4, input_size=16, kind="dense")
    told = model.predict(picture(), top=9)
    assert sorted(told.classes) == ["0", "1", "2"] and told.pathway is None
    assert "classes" not in model.spec and "cut" not in model.spec


@pytest.mark.parametrize(
    ("x", "part"),
    [(torch.rand(1, 3, 16, 16) * 255, "in [0, 1]"), (torch.rand(1, 3, 24, 24), "16x16 pixels, got 24")],
)
def test_pixels_that_a_model_was_not_made_for_are_pointed_out_once(x: Tensor, part: str) -> None:
    model = create_model("wrn-10-1", num_classes=3, width=4, input_size=16).eval()
    with pytest.warns(UserWarning) as warned:
        model(x)
    assert len(warned) == 1 and part in str(warned[0].message) and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        create_model("wrn-10-1", num_classes=3, width=4, input_size=16).eval()(torch.rand(1, 3, 16, 16))

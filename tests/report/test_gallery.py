import base64
import io

import numpy as np
import pytest
from PIL import Image

from advmoe.report.gallery import gallery
from advmoe.report.results import load_results


@pytest.fixture
def gallery_arrays(make_run):
    """The made-up gallery, as it is loaded."""

    def get(**changed):
        (run,) = load_results([make_run("gallery", only={"gallery"})])
        return dict(run.gallery) | {name: np.asarray(each) for name, each in changed.items()}

    return get


def pixels(address):
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_cards(gallery_arrays, parsed):
    page = parsed(gallery(gallery_arrays()))
    assert page.texts("p")[0].startswith("2 test images under pgd-10 (linf eps 8/255), drawn")
    assert page.texts("h4") == ["cat test image 7", "dog test image 31"]
    assert page.texts("span", "verdict") == ["The prediction survives", "The prediction is broken"]
    said = [text for text in page.texts("p") if "%" in text]
    assert said == ["cat (75 %) \N{RIGHTWARDS ARROW} cat (62 %)", "dog (50 %) \N{RIGHTWARDS ARROW} cat (88 %)"]
    assert page.texts("p", "quiet") == ["Pathway: 1 of 2 layers changed: 1.", "Pathway: None of 2 layers changed."]
    strips = page.attributes("svg", "aria-label")
    assert strips[0] == "Experts of layers 0 to 1, clean 0 0, adversarial 0 1"
    assert page.texts("text")[:4] == ["0", "0", "0", "1"]
    assert page.attributes("rect", "stroke") == ["currentColor"]  # the one changed choice


def test_pictures(gallery_arrays, parsed):
    page = parsed(gallery(gallery_arrays()))
    clean, change, adversarial = map(pixels, page.attributes("img", "src")[:3])
    assert page.attributes("img", "alt")[:3] == [
        "Test image 7, class cat", "The perturbation, enlarged in strength", "The image with the perturbation added",
    ]  # fmt: skip
    assert clean.shape == (8, 8) and clean[3, 3] == 191 and clean[0, 0] == 0  # 0.75 * 255
    assert adversarial[0, 0] == 32 and (adversarial != clean).sum() == 1  # 0.125 * 255
    assert change[0, 0] == 255 and set(np.unique(change)) == {128, 255}  # grey is no change


def test_colours_are_kept(gallery_arrays, parsed):
    image = np.stack([np.full((2, 4, 4), level) for level in (0.0, 0.5, 1.0)], axis=1)
    page = parsed(gallery(gallery_arrays(clean=image, adversarial=image)))
    assert pixels(page.attributes("img", "src")[0])[0, 0].tolist() == [0, 128, 255]


def test_verdicts_on_images_that_were_wrong_before(gallery_arrays, parsed):
    page = parsed(gallery(gallery_arrays(clean_prediction=[1, 0], adversarial_prediction=[1, 1])))
    assert page.texts("span", "verdict") == ["Wrong before and after", "Wrong before, right after"]


def test_a_plain_model_has_no_pathways(gallery_arrays, parsed):
    empty = np.zeros((2, 0), np.int64)
    page = parsed(gallery(gallery_arrays(clean_pathway=empty, adversarial_pathway=empty)))
    assert page.texts("svg") == [] and "Pathway" not in " ".join(page.texts("p"))


def test_many_layers_stand_in_several_rows(gallery_arrays, parsed):
    before = np.zeros((2, 45), np.int64)
    after = before.copy()
    after[0, 41] = 3
    page = parsed(gallery(gallery_arrays(clean_pathway=before, adversarial_pathway=after)))
    assert [label.partition(",")[0] for label in page.attributes("svg", "aria-label")[:3]] == [
        "Experts of layers 0 to 19", "Experts of layers 20 to 39", "Experts of layers 40 to 44",
    ]  # fmt: skip
    assert page.texts("p", "quiet")[0] == "Pathway: 1 of 45 layers changed: 41."


def test_tokens_routed_one_by_one_are_told_in_words(gallery_arrays, parsed):
    before = np.zeros((2, 3, 4), np.int64)
    after = before.copy()
    after[0, 2, 1] = 1
    page = parsed(gallery(gallery_arrays(clean_pathway=before, adversarial_pathway=after)))
    assert page.texts("svg") == []
    assert page.texts("p", "quiet")[0] == "Pathway: 1 of 3 layers changed choice of a token: 2."


def test_names_of_classes_are_escaped_and_may_be_missing(gallery_arrays, parsed):
    html = gallery(gallery_arrays(classes=["<script>alert(1)</script>"]))
    page = parsed(html)
    assert page.texts("script") == [] and "<script>" not in html
    assert [text.partition(" test")[0] for text in page.texts("h4")] == ["<script>alert(1)</script>", "class 1"]

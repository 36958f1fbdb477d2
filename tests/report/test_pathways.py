"""The page's part on pathways, and the pictures of `pathways.json`: that they say what the numbers say."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch

from advmoe.evaluation.dissection import Dissection
from advmoe.evaluation.pathways import statistics
from advmoe.report.album import Album
from advmoe.report.html import joined
from advmoe.report.pathways import draw_pictures, pathways, pictures
from advmoe.report.results import load_results

HALVES = [torch.tensor([[True, True, False, False], [False, False, True, True]])] * 2
CLEAN = [[0, 0], [0, 0], [0, 1], [1, 1], [1, 1]]
MASK = [torch.tensor([[True, True, True, False]]), torch.tensor([[False, False, False, True]])]


def planted(against=None, clean=CLEAN, classes=("cat", "<dog>", "newt")):
    """What `advmoe pathways` writes of five images, which an attack sends where the image before them goes."""
    clean = torch.tensor(clean)
    right = torch.ones(5).bool()
    chosen = Dissection(clean, clean.roll(1, 0), right, right, 2, torch.tensor([0, 0, 0, 1, 1]))
    other = {None: None, "mask": (MASK, None), "pathways": (HALVES, chosen)}[against]
    result = statistics(chosen, HALVES[: clean.shape[1]], num_classes=3, other=other)
    result |= {"classes": list(classes)}
    result["attack"]["name"] = "pgd-7"
    if against is not None:
        result["against"]["run"] = "runs/<other>"
    return result


def section(result, folder, tmp_path):
    """The page's part, of a run directory with this `pathways.json`."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: {kind: moe}\n")
    (run / "pathways.json").write_text(json.dumps(result))
    (loaded,) = load_results([run])
    folder.mkdir()
    return joined(pathways(loaded, Album(folder)))


def text_of(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_a_section_says_what_was_found(tmp_path):
    html = section(planted("mask"), tmp_path / "figures", tmp_path)
    text = text_of(html)
    # 0 0, 0 0, 0 1, 1 1, 1 1 are attacked into 1 1, 0 0, 0 0, 0 1, 1 1.
    assert "pgd-7 leaves the pathways of 40.0 % of 5 test images as they are." in text
    assert "clean 3 1.52 2 0.667 0.111" in text  # the numbers of test_planted_pathways
    assert "00 40.0 cat: 100 %" in text and "11 40.0 &lt;dog&gt;: 100 %" in text and "<dog>" not in html
    assert "IoU with the static mask of runs/&lt;other&gt;" in text
    assert "clean 0.387 0.107 0.333 0.333 0.333 0.333 0.600" in text  # four of 2/6, and 3/5
    names = ("flow", "classes-clean", "classes-adversarial", "class-iou-clean", "class-iou-adversarial")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = [f"run-pathways-{name}" for name in (*names, "iou-attack", "iou-against")]
    assert drawn == {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
    assert html.count("<figure>") == 7 and html.count("<desc") == 7
    ElementTree.fromstring(f"<div>{html}</div>")


@pytest.mark.slow
def test_a_section_of_another_run_s_pathways(tmp_path):
    text = text_of(section(planted("pathways"), tmp_path / "figures", tmp_path))
    assert "IoU with the pathways of runs/&lt;other&gt;" in text and "random masks" not in text
    assert "The mean over pairs of different images is 0.333 (clean) and 0.333 (adversarial)." in text


def test_without_results_there_is_no_section(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {kind: moe}\n")
    (run,) = load_results([tmp_path])
    assert pathways(run, Album(tmp_path)) is None


def test_pictures_in_words():
    by_name = {each.name: each for each in pictures(planted("mask"))}
    assert list(by_name) == [
        "flow", "classes-clean", "classes-adversarial", "class-iou-clean", "class-iou-adversarial", "iou-attack",
        "iou-against",
    ]  # fmt: skip
    # Of equal flows the one between the higher experts is told.
    assert "clean: layer 0 expert 1 to 1 (40 %); adversarial: layer 0 expert 1 to 1 (40 %)" in by_name["flow"].alt
    classes = by_name["classes-clean"]
    assert classes.data["values"][0] == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert classes.data["values"][2] == [None] * 4
    assert "from 0 (class cat, MoE layer 0, expert 1) to 1 (class cat, MoE layer 0, expert 0)" in classes.alt
    assert "0.667 within a class, 0.111 between classes" in by_name["class-iou-clean"].caption
    assert "random masks of the same size" in by_name["iou-against"].caption
    assert "grey" not in by_name["flow"].caption  # of two experts no flow is joined to others


def test_a_single_layer_has_no_flow():
    result = planted(clean=[[0], [0], [0], [1], [1]])
    assert [each.name for each in pictures(result)][:2] == ["classes-clean", "classes-adversarial"]


def test_names_of_classes_may_be_unknown():
    result = planted()
    del result["classes"]
    (classes,) = (each for each in pictures(result) if each.name == "classes-clean")
    assert classes.data["rows"] == ["0", "1", "2"]


@pytest.mark.slow
def test_pictures_are_drawn_beside_the_numbers(tmp_path):
    paths = draw_pictures(planted(), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths) and paths[0].name == "pathways-flow.svg" and len(paths) == 6
    assert "Flow of images through the experts" in paths[0].read_text()


def test_what_is_no_result():
    with pytest.raises(ValueError, match=r"result must be a pathways.json with .* got one without clean, adversarial"):
        list(pictures({"num_experts": 2, "attack": {}, "against": None}))

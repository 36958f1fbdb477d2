"""Classes are called by their names wherever a page speaks of them."""

import json

from advmoe.report import words
from advmoe.report.results import load_results
from advmoe.report.run_sections import dissection, introduction


def entry(number, robust, images=4):
    shares = {"both_survive": robust, "only_routing_fails": 0.25, "only_prediction_fails": 0.125, "both_fail": 0.0}
    return {"class": number, "num_examples": images, "categories": shares}


def test_shares_of_a_class_are_sums_of_categories():
    result = {"per_class": [entry(0, 0.5), entry(2, 0.25)], "classes": ["ant", "bee", "cat"]}
    assert words.class_shares(result) == [
        {"name": "ant", "num_examples": 4, "model": 0.75, "routers": 0.625},
        {"name": "cat", "num_examples": 4, "model": 0.5, "routers": 0.375},
    ]
    assert [each["name"] for each in words.class_shares({"per_class": result["per_class"]})] == ["0", "2"]


def test_of_many_classes_the_weakest_are_shown():
    found = words.class_shares({"per_class": [entry(number, number / 100) for number in reversed(range(30))]})
    assert [each["name"] for each in found] == [str(number) for number in range(words.MOST_CLASSES)]


def test_a_page_names_the_classes(make_run, album):
    path = make_run("run")
    (path / "model.json").write_text(json.dumps({"classes": ["ant", "bee"]}))
    file = path / "dissection.json"
    dissections = json.loads(file.read_text())
    dissections["pgd-10"]["per_class"] = [entry(0, 0.5), entry(1, 0.25)]
    file.write_text(json.dumps(dissections))
    (run,) = load_results([path])
    assert run.classes == ("ant", "bee")
    assert ", 2 classes: ant, bee." in str(introduction(run, "run-1")[0])
    (shown,) = dissection(run, album)
    table = shown[shown.index("What survived pgd-10 in each class") :]
    assert table.index(">ant<") < table.index(">bee<") and "75.0" in table and "37.5" in table
    (path / "model.json").write_text("{")  # damaged: the page is made without
    assert load_results([path])[0].classes == ()

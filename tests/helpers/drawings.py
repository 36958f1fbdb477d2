"""Figures read back from their SVG files, and small results to draw."""

from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"


def words(path):
    """The text elements of an SVG file."""
    tree = ElementTree.fromstring(path.read_text())
    assert tree.tag == f"{_SVG}svg"
    return ["".join(each.itertext()).replace("\N{NO-BREAK SPACE}", " ").strip() for each in tree.iter(f"{_SVG}text")]


def text_places(path):
    """The texts of an SVG file, each with where it stands."""
    elements = ElementTree.fromstring(path.read_text()).iter(f"{_SVG}text")
    return [("".join(each.itertext()).strip(), (float(each.get("x")), float(each.get("y")))) for each in elements]


def marks(path, kind, colour):
    """How many filled or stroked paths of a colour an SVG file has."""
    styles = [each.get("style", "") for each in ElementTree.fromstring(path.read_text()).iter(f"{_SVG}path")]
    return sum(f"{kind}: {colour}" in style for style in styles)


def swept(*accuracies, norm="linf", reasons=()):
    """A sweep's result at the radii 0, 4/255 and 8/255."""

    def point(eps, accuracy):
        return {"eps": eps, "robust_accuracy": accuracy, "interval": [max(0, accuracy - 0.05), accuracy + 0.05]}

    radii = [0, 4 / 255, 8 / 255]
    return {
        "norm": norm,
        "points": [point(*each) for each in zip(radii, accuracies, strict=True)],
        "probe": point(1.0, 0.0),
        "masking": {"suspected": bool(reasons), "reasons": list(reasons)},
    }


def dissected(layers=3, experts=2, right=True):
    """A dissection in which no choice changed; `right`: whether any image is right without an attack."""
    shares = {"both_survive": 0.317, "only_routing_fails": 0.06, "only_prediction_fails": 0.446, "both_fail": 0.177}
    load = [[1 / experts] * experts] * layers
    return {
        "num_examples": 1000,
        "num_clean_correct": 820 if right else 0,
        "categories": shares,
        "categories_of_clean_correct": {**shares, "both_survive": 0.301, "both_fail": 0.193} if right else None,
        "flip_rate": [0.0] * layers,
        "load": {"clean": load, "adversarial": load},
    }


def heat(values, rows=("cat", "dog"), columns=("0", "1"), **members):
    """A heat map's table."""
    return {"rows": list(rows), "columns": list(columns), "values": values, **members}


FLOWS = {"clean": {"load": [[0.75, 0.25], [0.5, 0.5]], "flows": [[[0.5, 0.25], [0.0, 0.25]]]}}
"""Of two layers with two experts each."""

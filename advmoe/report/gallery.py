"""The gallery: images before and after an attack, the prediction on each, and how its pathway changed.

Axes: `N` images, `C` channels, `H W` size, `L` MoE layers, `T` tokens. Pixels and eps are in [0, 1].
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from advmoe.report.drawing import EXPERTS, INK, LIGHT, PAPER
from advmoe.report.html import Html, element, joined
from advmoe.report.results import Arrays
from advmoe.report.tables import percent
from advmoe.report.words import of_threat

_Pixels = np.ndarray[Any, Any]
_IN_A_ROW = 20
"""MoE layers: more would be too small to read on a phone."""


def gallery(arrays: Arrays) -> Html:
    """The cards of all images of a gallery, as `advmoe report` keeps it in a run directory."""
    threat = of_threat({"eps": float(arrays["eps"]), "norm": str(arrays["norm"])})
    cards = [_card(arrays, at) for at in range(len(arrays["labels"]))]
    about = (
        f"{len(cards)} test images under {arrays['attack']} ({threat}), drawn from those that the model "
        "classifies right without an attack, as far as there are any: they show what the attack does and nothing of "
        "accuracy. In the middle the perturbation: grey is no change, and full colour the largest change in the image."
    )
    if arrays["clean_pathway"].shape[1:2] != (0,):
        about += " Below, the expert chosen in each MoE layer, before and after; a framed cell is a changed choice."
    return joined(element("p", about), element("ul", cards, class_="gallery"))


def _card(arrays: Arrays, at: int) -> Html:
    names = arrays["classes"]
    label, before, after = (
        _name(names, arrays[k][at]) for k in ("labels", "clean_prediction", "adversarial_prediction")
    )
    sure = [percent(float(arrays[f"{kind}_confidence"][at]), 0) for kind in ("clean", "adversarial")]
    right = [int(arrays[f"{kind}_prediction"][at]) == int(arrays["labels"][at]) for kind in ("clean", "adversarial")]
    verdict = {
        (True, True): ("holds", "The prediction survives"),
        (True, False): ("fails", "The prediction is broken"),
        (False, False): ("neutral", "Wrong before and after"),
        (False, True): ("neutral", "Wrong before, right after"),
    }[right[0], right[1]]
    clean, adversarial = (arrays[kind][at].astype(np.float32) for kind in ("clean", "adversarial"))
    change = adversarial - clean
    largest = float(np.abs(change).max()) or 1.0
    pictures = [
        _picture(clean, "clean", f"Test image {arrays['index'][at]}, class {label}"),
        _picture(0.5 + change / (2 * largest), "perturbation", "The perturbation, enlarged in strength"),
        _picture(adversarial, "adversarial", "The image with the perturbation added"),
    ]
    return element(
        "li",
        element("h4", label, element("span", f" test image {arrays['index'][at]}", class_="quiet")),
        element("div", pictures, class_="pictures"),
        element("p", element("span", verdict[1], class_=f"verdict {verdict[0]}")),
        element("p", f"{before} ({sure[0]} %) \N{RIGHTWARDS ARROW} {after} ({sure[1]} %)"),
        _pathways(arrays["clean_pathway"][at], arrays["adversarial_pathway"][at]),
        class_="card",
    )


def _name(names: _Pixels, number: Any) -> str:
    return str(names[number]) if 0 <= number < len(names) else f"class {number}"


def _picture(pixels: _Pixels, name: str, alt: str) -> Html:
    image = element("img", src=_png(pixels), alt=alt, width=96, height=96)
    return element("span", image, element("span", name, class_="quiet"))


def _png(pixels: _Pixels) -> str:
    """Pixels (C, H, W) as a data address; other than 1 or 3 channels become their mean."""
    levels = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    if len(levels) == 3:
        image = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    else:
        image = Image.fromarray(np.rint(levels.mean(0)).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _pathways(before: _Pixels, after: _Pixels) -> Html | None:
    """The two pathways (L,) of one image as rows of cells, and the changed layers in words; of (L, T), words alone."""
    layers = len(before)
    if layers == 0:
        return None
    changed = np.flatnonzero((before != after).reshape(layers, -1).any(1)).tolist()
    what = " choice of a token" if before.ndim == 2 else ""
    which = f": {', '.join(map(str, changed))}" if changed else ""
    words = element("p", f"Pathway: {len(changed) or 'None'} of {layers} layers changed{what}{which}.", class_="quiet")
    if before.ndim == 2:
        return words
    rows = [range(first, min(first + _IN_A_ROW, layers)) for first in range(0, layers, _IN_A_ROW)]
    return joined(*(_strip(before, after, row) for row in rows), words)


def _strip(before: _Pixels, after: _Pixels, layers: range) -> Html:
    """The two choices of each of `layers`, one above the other."""
    cells = [
        _cell(column, row, int(path[layer]), framed=row == 1 and before[layer] != after[layer])
        for row, path in enumerate((before, after))
        for column, layer in enumerate(layers)
    ]
    chosen = [" ".join(str(path[layer]) for layer in layers) for path in (before, after)]
    return element(
        "svg", cells, viewBox=f"0 0 {12 * _IN_A_ROW} 27", class_="strip", role="img",
        aria_label=f"Experts of layers {layers[0]} to {layers[-1]}, clean {chosen[0]}, adversarial {chosen[1]}",
    )  # fmt: skip


def _cell(column: int, row: int, expert: int, *, framed: bool) -> Html:
    colour = EXPERTS[expert % len(EXPERTS)]
    ink = INK if colour in LIGHT else PAPER
    x, y = 12 * column + 1, 14 * row + 1
    frame = {"stroke": "currentColor", "stroke_width": "1.8"} if framed else {}
    box = element("rect", x=x, y=y, width=10, height=11, rx=1.5, fill=colour, **frame)
    return joined(box, element("text", expert, x=x + 5, y=y + 8.2, fill=ink, font_size=7, text_anchor="middle"))

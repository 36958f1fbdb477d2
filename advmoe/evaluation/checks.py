"""Checks before a model is attacked: does what the attacks rely on hold for this model and these data?

Axes: `N` images, `C` channels, `H W` size, `K` classes, `L` MoE layers, `E` experts. Pixels are in [0, 1].

An attack that finds nothing looks like robustness. These checks find the common reasons why it finds nothing, or why
its number means nothing: probabilities in place of logits, randomness, answers that depend on the rest of the batch (or
routing that does, which AutoAttack's own flags do not see), gradients that are not there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from advmoe.attacks.pgd import Predict
from advmoe.errors import InputError
from advmoe.evaluation.scoring import answering
from advmoe.faults import integers, label_fault, outside, pixel_fault
from advmoe.moe.routing import Routing, route
from advmoe.text import one_line

CHECKS = ("pixels", "labels", "logits", "deterministic", "batch-independent", "gradients")
"""The checks by name, in their order."""
ALLOWABLE = CHECKS[2:]
"""Those that a user may allow to fail: a number about such a model still means something. With bad data none does."""

GRADIENT_LIMIT = 0.05
"""Largest share of images without a usable gradient. A cross-entropy attack cannot leave the point where such an image
stands, so its robust accuracy may be too high by this share: 5 points is what training methods differ by. It is not 0
because fp32 alone loses some: once a logit leads by about 100, the other probabilities underflow."""
REPEAT_LIMIT = 1e-6
"""Largest difference of logits between two equal passes off the CPU, where sums run in any order; on the CPU 0."""
BATCH_LIMIT = 1e-4
"""Largest difference of an image's logits between batches: other batch sizes take other kernels, which round apart."""
SUM_LIMIT = 1e-5
"""How far from 1 probabilities may sum (and from 0 the log of the sum of log-probabilities' exponentials lie)."""
CHECKED = 128
"""Images that are looked at before an attack."""
ALONE = 12
"""Images that are classified alone, spread evenly over the batch."""


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    """One of `CHECKS`."""
    passed: bool
    value: float
    """The number measured: `check` says which."""
    detail: str
    """The result in words, one line."""
    fatal: bool = False
    """Whether no number could mean anything: never to be allowed."""

    def to_dict(self) -> dict[str, Any]:
        """The record for a JSON file: no infinite `value`, and no `fatal`, as what fails so is not evaluated."""
        value = self.value if math.isfinite(self.value) else None
        return {"name": self.name, "passed": self.passed, "value": value, "detail": self.detail}


def check(predict: Predict, x: Tensor, y: Tensor, *, num_classes: int | None = None) -> list[Check]:
    """Check a classifier on a batch, before it is attacked.

    Args:
        predict: (N, C, H, W) pixels -> (N, K) logits, as it will be attacked: eval mode, frozen, hard routing, fp32.
        x: images, (N, C, H, W) floating-point in [0, 1]. y: their classes, (N,) integers.
        num_classes: how many classes the data have, if known; the logits must have as many.

    Returns the checks in the order of `CHECKS`. After a fatal failure those that need what has failed are left out: bad
    pixels are not shown to the model, and nothing is computed from logits of an unusable shape or from bad labels. By
    name, what is demanded, and what `value` means:

    - `pixels`: finite and in [0, 1]; the images at fault.
    - `labels`: integers in 0..K-1, K from the logits; the images at fault.
    - `logits`: (N, K), K >= 2, finite, and not probabilities (every row in [0, 1] with sum 1): the cross-entropy of
      probabilities is flat and margins saturate, so attacks look weak. Log-probabilities are noted and pass: they are
      logits less a constant per row, which cross-entropy, KL, margins and DLR all ignore. Images at fault.
    - `deterministic`: the same batch again gives the same logits (to the bit on the CPU, within `REPEAT_LIMIT`
      elsewhere) and exactly the same pathways; largest difference. A model that writes into its input fails fatally.
    - `batch-independent`: an image alone (a dozen of them), and in the batch reversed, has the logits that it has in
      the batch, within `BATCH_LIMIT`, and exactly the same pathway; largest difference. A pathway may change without
      fault of the model where two experts' scores tie to within rounding: `detail` says how far apart they were.
    - `gradients`: the cross-entropy's gradient in the pixels is finite and not zero throughout, but for
      `GRADIENT_LIMIT` of the images; the share without.

    Differences of logits are relative to the image's largest finite |logit|, or absolute where that is below 1.
    Pathways are those of the last routed model of ours that ran inside `predict`; a model without has none to compare.

    Raises `ValueError` for a model that does not take the images at all; one that takes them only where they require no
    gradient fails `gradients`.
    """
    n, pixels = len(x), _check_pixels(x)
    if not pixels.passed:
        return [pixels, _check_labels(y, n, num_classes)]
    shown = x.clone()
    with answering(shown):
        logits, routing = _forward(predict, shown)
    usable = _check_logits(logits, n, num_classes)
    labels = _check_labels(y, n, num_classes if usable.fatal else logits.shape[1])
    checks = [pixels, labels, usable]
    if not torch.equal(shown, x):
        detail = "the model must leave the pixels that it is given as they are, got a change in place"
        checks.append(Check("deterministic", False, math.inf, detail, fatal=True))
    elif not usable.fatal:
        checks += [_check_repeat(predict, x, logits, routing), _check_batch(predict, x, logits, routing)]
        if labels.passed:
            checks.append(_check_gradients(predict, x, y))
    return checks


def check_data(images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Check a whole data set, in one pass and without a copy.

    Args:
        images: (N, C, H, W), uint8 or floating-point pixels in [0, 1]. labels: (N,) integers in 0..num_classes-1.

    Raises `ValueError`: one line naming what must hold, and the first image at fault or the range of the values.
    """
    if len(images) == 0 or len(images) != len(labels):
        counts = f"{len(images)} images, {len(labels)} labels"
        raise InputError(f"data must hold at least 1 example, and a class for each, got {counts}")
    for fault in (pixel_fault(images), label_fault(labels, len(images), num_classes)):
        if fault is not None:
            raise InputError(fault)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check the classes of images that are known to be sound, (N,) integers; as `check_data` does."""
    if (fault := label_fault(labels, len(labels), num_classes)) is not None:
        raise InputError(fault)


def require_passed(checks: Sequence[Check], allow: Collection[str] = ()) -> None:
    """Stop unless every check passed or is allowed to fail.

    Args:
        allow: names of checks that may fail, of `ALLOWABLE`. Bad data are in no case allowed (`pixels`, `labels`), nor
            are logits that attacks cannot be run on (no tensor of shape (N, K), fewer classes than the data have).

    Raises `ValueError`: one line with what each failed check says and how to go on, or with the names to choose from.
    """
    allowed = {allow} if isinstance(allow, str) else set(allow)
    for name in sorted(allowed.difference(ALLOWABLE)):
        reason = " (bad data give no result)" if name in CHECKS else ""
        raise InputError(f"allow must name checks of {', '.join(ALLOWABLE)}{reason}, got {name!r}")
    failed = [each for each in checks if not each.passed and (each.fatal or each.name not in allowed)]
    if not failed:
        return
    faults = "; ".join(f"{each.name}: {each.detail}" for each in failed)
    hint = "this must be mended first"
    if not any(each.fatal for each in failed):
        hint = f"to go on all the same: {' '.join(f'--allow {each.name}' for each in failed)}"
        if any(each.name == "deterministic" for each in failed):
            hint += " (evaluate and sweep-eps average a model that draws from PyTorch's generators with --eot K)"
    raise InputError(f"model and data must pass the checks made before an attack, got {faults}; {hint}")


def _check_pixels(x: Tensor) -> Check:
    fault = pixel_fault(x)
    if fault is None and not x.is_floating_point():
        fault = f"pixels must be floating-point in [0, 1], got {x.dtype}"
    if fault is None:
        low, high = x.aminmax()
        return Check("pixels", True, 0, f"from {low.item():g} to {high.item():g}")
    whole = x.ndim == 4 and len(x) > 0 and x.is_floating_point()
    wrong = int((~((x >= 0) & (x <= 1))).flatten(1).any(1).sum()) if whole else len(x)
    return Check("pixels", False, wrong, fault, fatal=True)


def _check_labels(y: Tensor, n: int, num_classes: int | None) -> Check:
    fault = label_fault(y, n, num_classes)
    if fault is None:
        return Check("labels", True, 0, f"{len(y.unique())} classes in {n} images")
    wrong = n if y.shape != (n,) or not integers(y) else int(outside(y, num_classes).sum())
    return Check("labels", False, wrong, fault, fatal=True)


def _forward(predict: Predict, x: Tensor) -> tuple[Tensor, Routing]:
    with torch.no_grad(), route() as routing:
        return predict(x), routing


def _check_logits(logits: Any, n: int, num_classes: int | None) -> Check:
    usable = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 2
    if not usable or logits.shape[0] != n or logits.shape[1] < 2:
        rule = f"logits must be floating-point of shape ({n}, K), K >= 2"
        return Check("logits", False, n, f"{rule}, got {_described(logits)}", fatal=True)
    rows, classes = _wide(logits), logits.shape[1]
    broken = int((~rows.isfinite()).any(1).sum())
    fewer = num_classes is not None and classes < num_classes
    faults: list[str] = []
    if num_classes is not None and classes != num_classes:
        faults.append(f"logits must have the data's {num_classes} classes, got {classes}")
    if broken:
        faults.append(f"logits must be finite, got NaN or inf for {broken} of {n} images")
    if bool((((rows.sum(1) - 1).abs() <= SUM_LIMIT) & ((rows >= 0) & (rows <= 1)).all(1)).all()):
        faults.append("logits must be taken before the softmax, got probabilities that sum to 1")
    if faults:
        return Check("logits", False, broken if len(faults) == 1 and broken else n, "; ".join(faults), fatal=fewer)
    note = " (log-probabilities, as good as logits)" if bool((rows.logsumexp(1).abs() <= SUM_LIMIT).all()) else ""
    return Check("logits", True, 0, f"{classes} classes, from {rows.min().item():.4g} to {rows.max().item():.4g}{note}")


def _described(output: object) -> str:
    if isinstance(output, Tensor):
        return f"{output.dtype} of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"


def _check_repeat(predict: Predict, x: Tensor, logits: Tensor, routing: Routing) -> Check:
    again, taken = _forward(predict, x)
    apart, limit = _distance(logits, again), 0.0 if x.device.type == "cpu" else REPEAT_LIMIT
    changed = _changed(routing, list(range(len(x))), taken)
    detail = f"logits of two equal passes differ by {apart:.3g} (limit {limit:g}){_named(changed)}"
    return Check("deterministic", apart <= limit and not changed, apart, detail)


def _check_batch(predict: Predict, x: Tensor, logits: Tensor, routing: Routing) -> Check:
    n = len(x)
    if n == 1:
        return Check("batch-independent", True, 0, "1 image: no other batch to compare with")
    alone = min(n, ALONE)
    batches = [[i * n // alone] for i in range(alone)] + [list(range(n))[::-1]]
    apart, changed = 0.0, dict[int, float]()
    for batch in batches:
        try:
            answer, taken = _forward(predict, x[batch[0]][None] if len(batch) == 1 else x.flip(0))
        except (RuntimeError, ValueError) as error:  # batch norm in train mode, say, refuses a single image
            detail = f"the model must take every batch, got an error for one of {len(batch)}: {one_line(error)}"
            return Check("batch-independent", False, math.inf, detail)
        if not isinstance(answer, Tensor) or answer.shape != (len(batch), logits.shape[1]):
            detail = f"logits must be (N, K) for every batch, got {_described(answer)} for one of {len(batch)}"
            return Check("batch-independent", False, math.inf, detail)
        apart = max(apart, _distance(logits[batch], answer))
        changed |= _changed(routing, batch, taken)
    detail = f"logits alone and in the batch differ by {apart:.3g} (limit {BATCH_LIMIT:g}){_named(changed)}"
    return Check("batch-independent", apart <= BATCH_LIMIT and not changed, apart, detail)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _distance(expected: Tensor, actual: Tensor) -> float:
    """Largest difference, relative to each row's largest finite |logit| above 1; infinite for other shapes, or NaN."""
    if expected.shape != actual.shape:
        return math.inf
    expected, actual = _wide(expected), _wide(actual)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    scale = expected.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True).clamp(min=1)
    apart = ((expected - actual).abs() / scale).nan_to_num(math.inf, math.inf)
    return apart.masked_fill(same, 0).max().item()


def _changed(routing: Routing, batch: list[int], taken: Routing) -> dict[int, float]:
    """Images of `batch` (positions in `routing`'s pass) whose pathway in `taken` is another.

    With each, how far apart the two experts' scores were in `routing`, in the first layer where the pathways differ.
    """
    if routing.choices.keys() != taken.choices.keys():
        return dict.fromkeys(batch, math.inf)
    changed: dict[int, float] = {}
    for layer in sorted(routing.choices):  # where pathways have parted, later layers see other inputs
        before, after, scores = routing.choices[layer][batch], taken.choices[layer], routing.scores[layer][batch]
        gap = scores.gather(-1, before[..., None]) - scores.gather(-1, after[..., None])
        parted = (before != after).reshape(len(batch), -1).any(1)  # by any token, where tokens are routed one by one
        for image, differs, apart in zip(batch, parted.tolist(), gap.flatten(1).amax(1).tolist(), strict=True):
            if differs and image not in changed:
                changed[image] = apart
    return changed


def _named(changed: dict[int, float]) -> str:
    if not changed:
        return ""
    gap = max(changed.values())
    return f"; images that take another pathway: {len(changed)} (router scores up to {gap:.3g} apart)"


def _check_gradients(predict: Predict, x: Tensor, y: Tensor) -> Check:
    leaf = x.clone().requires_grad_(True)
    try:
        with torch.enable_grad(), answering(leaf), route():
            loss = F.cross_entropy(_wide(predict(leaf)), y.long().to(x.device), reduction="sum")
            gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    except ValueError as error:
        return Check("gradients", False, 1, f"where they require a gradient, {error}")
    if gradient is None:
        return Check("gradients", False, 1, "no gradient reaches the pixels: the model must be differentiable")
    rows = gradient.flatten(1)
    zero, broken = int((rows == 0).all(1).sum()), int((~rows.isfinite()).any(1).sum())
    share = (zero + broken) / len(x)
    counts = f"{zero} of {len(x)} images have a gradient of exactly 0, {broken} one of NaN or inf"
    return Check("gradients", share <= GRADIENT_LIMIT, share, f"{counts} (limit {GRADIENT_LIMIT:.0%} of the images)")

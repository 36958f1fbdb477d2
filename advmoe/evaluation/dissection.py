"""What an attack broke: the prediction, the routing, both or neither (Zhang et al., 2023, sec. 4, figs. 4 and 5).

Axes: `N` examples, `C` channels, `H W` size, `L` MoE layers, `T` tokens, `E` experts. Shares are fractions, except in
`Dissection.table`.

    category                clean image's pathway in all layers    prediction right
    1 both survive          yes                                    yes
    2 only routing fails    no                                     yes
    3 only prediction fails yes                                    no
    4 both fail             no                                     no

1 + 3 is the routers' robustness, 1 + 2 the model's. An example that is wrong without an attack counts as wrong, also
where the attack happens to put it right: so 1 + 2 over all examples is the robust accuracy. As such an example has lost
its prediction before any attack, the categories are counted twice: over all examples, and over those that are right
clean.

Where tokens are routed one by one, pathways are (N, L, T): a layer's choice survives where every token's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import Predict
from advmoe.errors import InputError, require_whole
from advmoe.evaluation.scoring import correct, device_of, measuring
from advmoe.faults import label_fault
from advmoe.moe.routing import route
from advmoe.text import percent, tabular, wrapped

CATEGORIES = ("both_survive", "only_routing_fails", "only_prediction_fails", "both_fail")
"""Names of the categories 1 to 4."""


@dataclass(frozen=True, eq=False)
class Dissection:
    """The outcome of an attack per example, and what follows from it. `merge` joins the dissections of batches.

    Raises `ValueError` for tensors of unequal length, no example, no MoE layer, or an expert outside 0 ... E - 1.
    """

    clean_pathway: Tensor
    """Expert chosen for the clean image, (N, L) or (N, L, T)."""
    adv_pathway: Tensor
    """Expert chosen for the adversarial image, (N, L) or (N, L, T)."""
    clean_correct: Tensor
    """Whether the clean image is classified right, (N,) booleans."""
    adv_correct: Tensor
    """Whether the adversarial image is classified right, (N,) booleans."""
    num_experts: int
    """E."""
    labels: Tensor | None = None
    """True classes (N,), where shares per class are wanted."""

    def __post_init__(self) -> None:
        clean, adv = self.clean_pathway, self.adv_pathway
        if clean.dim() not in (2, 3) or clean.shape != adv.shape or 0 in clean.shape:
            shapes = f"{tuple(clean.shape)} and {tuple(adv.shape)}"
            rule = "(N, L) with N, L >= 1, or (N, L, T)"
            raise InputError(f"clean_pathway and adv_pathway must both be {rule}, got {shapes}")
        for name in ("clean_correct", "adv_correct", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != clean.shape[:1]:
                raise InputError(f"{name} must be (N,) with N = {len(clean)}, got shape {tuple(value.shape)}")
        lowest, highest = (int(torch.stack([clean, adv]).aminmax()[end]) for end in (0, 1))
        if lowest < 0 or highest >= self.num_experts:
            raise InputError(f"experts must lie in 0 ... {self.num_experts - 1}, got {lowest} ... {highest}")

    @classmethod
    def merge(cls, parts: Sequence[Dissection]) -> Dissection:
        """The dissection of all examples of `parts`, in order. Raises `ValueError` for none, or for unlike models."""
        shapes = {(part.clean_pathway.shape[1:], part.num_experts, part.labels is None) for part in parts}
        if len(shapes) != 1:
            raise InputError(
                f"parts must be at least 1, with the same layers, experts and labels, got {len(shapes)} kinds"
            )
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            clean_pathway=torch.cat([part.clean_pathway for part in parts]),
            adv_pathway=torch.cat([part.adv_pathway for part in parts]),
            clean_correct=torch.cat([part.clean_correct for part in parts]),
            adv_correct=torch.cat([part.adv_correct for part in parts]),
            num_experts=parts[0].num_experts,
            labels=torch.cat(labels) if labels else None,
        )

    @property
    def survived(self) -> Tensor:
        """Whether the prediction is right with and without the attack, (N,)."""
        return self.clean_correct.bool() & self.adv_correct.bool()

    @property
    def flipped(self) -> Tensor:
        """Whether a layer chose another expert under attack, (N, L)."""
        changed = self.clean_pathway != self.adv_pathway
        return changed.any(2) if changed.dim() == 3 else changed

    @property
    def categories(self) -> Tensor:
        """The category of each example, (N,) of 1 to 4."""
        return 1 + self.flipped.any(1).long() + 2 * (~self.survived).long()

    @property
    def flip_rate(self) -> list[float]:
        """Per MoE layer, the share of all examples whose choice changed; L numbers."""
        return [_share(layer) for layer in self.flipped.T]

    @property
    def flipped_layers(self) -> list[float]:
        """The share of examples with 0, 1, ... L changed layers; L + 1 numbers."""
        counts = torch.bincount(self.flipped.sum(1), minlength=self.flipped.shape[1] + 1)
        return [count / len(self.flipped) for count in counts.tolist()]

    def shares(self, among: Tensor | None = None) -> dict[str, float] | None:
        """The share of each category, by name, of all examples or those in `among`, (N,) booleans; None of none."""
        categories = self.categories if among is None else self.categories[among.bool()]
        if len(categories) == 0:
            return None
        return {name: _share(categories == number) for number, name in enumerate(CATEGORIES, start=1)}

    def per_class(self) -> list[dict[str, Any]]:
        """The shares of each class that occurs, over its own examples; empty without labels."""
        if self.labels is None:
            return []
        members = {int(label): self.labels == label for label in self.labels.unique()}
        return [
            {"class": label, "num_examples": int(among.sum()), "categories": self.shares(among)}
            for label, among in members.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON, as fractions. `categories_of_clean_correct` is None where no example is right
        clean; `load` is (L, E).
        """
        examples, layers = self.clean_pathway.shape[:2]
        return {
            "num_examples": examples,
            "num_clean_correct": int(self.clean_correct.sum()),
            "num_layers": layers,
            "num_experts": self.num_experts,
            "clean_accuracy": _share(self.clean_correct.bool()),
            "robust_accuracy": _share(self.survived),
            "router_robustness": _share(~self.flipped.any(1)),
            "categories": self.shares(),
            "categories_of_clean_correct": self.shares(self.clean_correct),
            "flip_rate": self.flip_rate,
            "flipped_layers": self.flipped_layers,
            "load": {
                "clean": expert_load(self.clean_pathway, self.num_experts),
                "adversarial": expert_load(self.adv_pathway, self.num_experts),
            },
            "distinct_pathways": {
                "clean": len(self.clean_pathway.unique(dim=0)),
                "adversarial": len(self.adv_pathway.unique(dim=0)),
            },
            "per_class": self.per_class(),
        }

    def table(self) -> str:
        """The dissection as aligned lines for a terminal, in percent."""
        result = self.to_dict()
        pathways, counts = result["distinct_pathways"], result["flipped_layers"]
        spread = ", ".join(f"{flips}: {percent(share)}" for flips, share in enumerate(counts) if share > 0)
        return "\n".join(
            [
                f"{result['num_examples']} images, {result['num_clean_correct']} of them right clean; "
                f"{result['num_layers']} MoE layers of {self.num_experts} experts",
                "",
                *_category_lines(result),
                "",
                *_layer_lines(result),
                "",
                *wrapped(f"layers flipped (% images) {spread}", 26 * " "),
                f"distinct pathways         clean {pathways['clean']}, adversarial {pathways['adversarial']}",
            ]
        )


def _share(chosen: Tensor) -> float:
    return int(chosen.sum()) / len(chosen)


def expert_load(pathways: Tensor, num_experts: int) -> list[list[float]]:
    """The share of `pathways`, (N, L) or (N, L, T), that each layer sends to each expert, L x E."""
    layers = [layer.flatten() for layer in pathways.unbind(1)]
    counts = [torch.bincount(layer, minlength=num_experts).tolist() for layer in layers]
    return [[count / layer.numel() for count in each] for layer, each in zip(layers, counts, strict=True)]


def _category_lines(result: dict[str, Any]) -> list[str]:
    columns = result["categories"], result["categories_of_clean_correct"]
    sums: dict[str, tuple[str, ...]] = {
        f"{number} {name.replace('_', ' ')}": (name,) for number, name in enumerate(CATEGORIES, start=1)
    }
    sums["1 + 2 model robust"] = ("both_survive", "only_routing_fails")
    sums["1 + 3 routers robust"] = ("both_survive", "only_prediction_fails")
    heads, rows = ("share", "of all", "of right clean"), list[tuple[str, ...]]()
    for title, names in sums.items():
        cells = ("-" if part is None else f"{percent(sum(part[name] for name in names))} %" for part in columns)
        rows.append((title, *cells))
    return tabular(heads, rows, "<>")


def _layer_lines(result: dict[str, Any]) -> list[str]:
    loads = [
        [" ".join(f"{percent(e):>5}" for e in layer) for layer in result["load"][k]] for k in ("clean", "adversarial")
    ]
    heads, rows = ("layer", "flipped", "clean load (%)", "adversarial load (%)"), []
    for layer, (rate, clean, adversarial) in enumerate(zip(result["flip_rate"], *loads, strict=True)):
        rows.append((str(layer), f"{percent(rate)} %", clean, adversarial))
    return tabular(heads, rows, ">><")


def dissect(model: Predict, x: Tensor, x_adv: Tensor, y: Tensor, *, batch_size: int = 250) -> Dissection:
    """Dissect an attack on a routed model.

    Args:
        model: routed, (N, C, H, W) pixels -> logits; run under hard routing, in eval mode and fp32, and restored.
        x: clean images, (N, C, H, W) in [0, 1]. x_adv: the caller's adversarial image for each, of the same shape. An
            image left as it is, because it is wrong without an attack, counts as routing that survived: for shares over
            all images attack those too. The shares of images right clean do not depend on it.
        y: true classes, (N,).
        batch_size: images per pass.

    Returns a `Dissection` on the CPU. Raises `ValueError` for a model without MoE layers, or data that do not match.
    """
    if x.shape != x_adv.shape or y.shape != x.shape[:1] or len(x) == 0:
        shapes = f"{tuple(x.shape)}, {tuple(x_adv.shape)}, {tuple(y.shape)}"
        raise InputError(f"x, x_adv and y must be (N, C, H, W) twice and (N,) with N >= 1, got {shapes}")
    require_whole("batch_size", batch_size, 1)
    device = device_of(model) if isinstance(model, nn.Module) else x.device
    with measuring(model, device), torch.no_grad():
        batches = zip(x.split(batch_size), x_adv.split(batch_size), y.split(batch_size), strict=True)
        return Dissection.merge([_dissect_batch(model, *(part.to(device) for part in batch)) for batch in batches])


def _dissect_batch(model: Predict, x: Tensor, x_adv: Tensor, y: Tensor) -> Dissection:
    clean_pathway, clean_correct, num_experts = _run(model, x, y)
    adv_pathway, adv_correct, _ = _run(model, x_adv, y)
    return Dissection(clean_pathway, adv_pathway, clean_correct, adv_correct, num_experts, y.cpu())


def _run(model: Predict, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """The pathway (N, L) or (N, L, T), whether each row is classified right (N,), and E."""
    with route() as routing:
        logits = model(x.contiguous(memory_format=torch.channels_last))
    if not routing.choices:
        raise InputError(f"model must have MoE layers to be dissected, got {type(model).__name__} with none")
    if (fault := label_fault(y, len(x), logits.shape[1])) is not None:
        raise InputError(fault)
    num_experts = max(scores.shape[-1] for scores in routing.scores.values())
    return routing.pathway().cpu(), correct(logits, y).cpu(), num_experts

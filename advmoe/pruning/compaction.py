"""A sparse model's other forms: the Dense backbone that it masks, and what the masks leave of it, without the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from advmoe.errors import InputError
from advmoe.models import Classifier, create_model, find_backbone
from advmoe.models.sparse import SparseBackbone

Module = TypeVar("Module", bound=nn.Module)


def sparse_backbone(model: Classifier) -> SparseBackbone:
    """The masked backbone of a sparse model. Raises `ValueError` for another kind."""
    if not isinstance(model.backbone, SparseBackbone):
        raise InputError(f"model.kind must be sparse, got {model.spec['kind']!r}")
    return model.backbone


def compact(model: Classifier) -> Classifier:
    """What the masks leave of a sparse model, as a model of its own (kind `s-dense`, the same mode): the same logits
    for the cost of S-Dense, whose shapes it has. Nothing is shared. Raises `ValueError` for another kind.
    """
    masked = sparse_backbone(model)
    with torch.device("meta"):  # takes its tensors from below
        small = create_model(**{**model.spec, "kind": "s-dense"})
    state = {f"backbone.{name}": _part(whole, rows, columns) for name, whole, rows, columns in _tensors(masked)}
    state |= {f"normalize.{name}": value.clone() for name, value in model.normalize.state_dict().items()}
    small.load_state_dict(state, assign=True)
    small.origin = model.origin
    return small.train(model.training)


def slimmed(dense: Classifier, scale: float) -> Classifier:
    """What is left of a Dense model, a CNN, of whose channels those with the largest weights are kept, `scale` of each
    layer (kind `s-dense`, the same mode); nothing was trained for it. Raises `ValueError` for another network.
    """
    if dense.spec["kind"] != "dense" or find_backbone(dense.spec["name"]).tokens:
        kind = f"{dense.spec['kind']} {dense.spec['name']}"
        raise InputError(f"training.init_from must be of a dense CNN for experts to have a part of, got a {kind}")
    masked = create_model(**{**dense.spec, "kind": "sparse", "scale": scale})
    adopt(masked, dense)
    return compact(masked.train(dense.training))


def deployed(model: Module) -> Module:
    """The network that runs where `model` is used: a sparse model's compacted form, any other as it is."""
    if isinstance(model, Classifier) and isinstance(model.backbone, SparseBackbone):
        return cast(Module, compact(model))
    return model


@torch.no_grad()
def expand(small: Classifier, model: Classifier) -> Classifier:
    """Put the weights and statistics of `small`, compacted from `model` and trained since, where `model` keeps them;
    what its masks drop stays. Returns `model`.
    """
    state = small.backbone.state_dict()
    for name, whole, rows, columns in _tensors(sparse_backbone(model)):
        value = state[name].to(whole.device)
        if columns is not None:
            every = torch.arange(len(whole), device=whole.device)
            whole[(every if rows is None else rows)[:, None], columns] = value
        elif rows is not None:
            whole[rows] = value
        else:
            whole.copy_(value)
    return model


def dense_form(model: Classifier) -> Classifier:
    """The Dense model that a sparse one masks, as a model of its own."""
    backbone, normalize = copy.deepcopy((sparse_backbone(model).dense, model.normalize))
    return Classifier(normalize, backbone, None, model.spec | {"kind": "dense"})


def adopt(model: Classifier, start: Classifier) -> None:
    """Have a sparse `model` start from another of its backbone: a sparse one's weights and scores, or a Dense one's
    weights, scored anew (`SparseBackbone.reset_scores`).

    Raises `ValueError` for another kind, `RuntimeError` for another shape.
    """
    if start.spec["kind"] == "sparse":
        model.load_state_dict(start.state_dict())
        return
    if start.spec["kind"] != "dense":
        rule = "training.init_from must hold a dense or sparse model when training.method is sparse"
        raise InputError(f"{rule}, got one of kind {start.spec['kind']!r}")
    backbone = sparse_backbone(model)
    model.normalize.load_state_dict(start.normalize.state_dict())
    backbone.dense.load_state_dict(start.backbone.state_dict())
    backbone.reset_scores()


def _tensors(masked: SparseBackbone) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """The Dense backbone's tensors by name, with the rows and columns that the masks keep of each, None for all."""
    slices = masked.layout.slices(masked.surviving_channels())
    for name, value in masked.dense.state_dict().items():
        rows, columns = slices[name.rpartition(".")[0]]
        yield name, value, rows if value.dim() else None, columns if value.dim() > 1 else None


def _part(whole: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    part = whole.clone() if rows is None else whole.index_select(0, rows)
    return part if columns is None else part.index_select(1, columns)

"""Robust structured pruning: a sparse model's masks as a pathway, and the small dense network that they leave."""

from advmoe.pruning.compaction import adopt, compact, dense_form, deployed, expand, slimmed
from advmoe.pruning.masks import masks, write_masks

__all__ = ["adopt", "compact", "dense_form", "deployed", "expand", "masks", "slimmed", "write_masks"]

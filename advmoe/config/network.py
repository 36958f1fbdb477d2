"""The section that says which network is trained: every field, its default and its meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from advmoe.config.fields import (
    ExpertInit,
    ExpertLayout,
    Experts,
    ModelKind,
    RoutePer,
    RouterKind,
    RouterNorm,
    Share,
    Strict,
    Width,
    check_types,
    require,
    require_path,
)
from advmoe.tables import ROUTERS

OWN_MODEL: dict[str, Any] = {
    "name": "own", "kind": "dense", "scale": 1.0, "route_per": "image", "experts": "independent",
    "experts_init": "shared", "width": None,
}  # fmt: skip
"""What the fields that describe a backbone hold for a network of the user's own (`kind`: `moe` if converted)."""


@dataclass(kw_only=True)
class ModelConfig(Strict):
    """Which network: a backbone and how it is made a mixture of experts."""

    name: str = "resnet18"
    """Backbone, by its registered name."""
    kind: ModelKind = "moe"
    """`moe`, the `dense` backbone, `s-dense`: the backbone with every layer's channels multiplied by `scale`, or
    `sparse`: the backbone under masks, learnt by the method of that name, that keep `scale` of every layer's channels.
    """
    scale: Share = 0.5
    """Model scale r: the fraction of a layer's channels that one pathway uses. In (0, 1]."""
    num_experts: Experts = 2
    """Experts N per MoE layer."""
    router: RouterKind = "layer"
    """One router per layer, a shallow embedding with one head per layer, or one small CNN that chooses for all
    (`image`). `fixed-FORM` and `linear`: whether the image's brightness in a part of it, or a learnt average of its
    pixels, exceeds a threshold, which is the training images' median or starts there: choices that can be proved
    (`advmoe certify`). `fixed-top-bottom` and `linear-2` decide twice, for each half of the layers,
    `fixed-late` for the second half alone.
    """
    router_norm: RouterNorm = "batch"
    """Norms of the routers: batch norms, norms over an image's own channels (and pixels), which keep no statistics (Ba
    et al., 2016; Wu & He, ECCV 2018), or none. The paper does not say; centred over the data alone, untrained routers
    tell images apart.
    """
    route_per: RoutePer = "image"
    """One choice of experts per image, or one per token (transformers, layer routers): no pathway per image then."""
    experts: ExpertLayout = "subset"
    """Experts as windows of the backbone's channels (`subset`), or with no channel shared (`independent`)."""
    experts_init: ExpertInit = "independent"
    """Whether experts start as copies of one another (`shared`) or not."""
    width: Width | None = None
    """Channels of the first stage at scale 1; by default the backbone's own, which is the paper's (ResNet: 64)."""
    source: str | None = None
    """A network of your own, FILE.py:FACTORY, which is executed. The fields above but `num_experts` and `router` then
    say nothing, and take the values that describe it.
    """
    to_moe: bool = False
    """Convert the source: every convolution becomes an MoE layer of `num_experts` copies of it."""
    skip: str | None = None
    """Layers of the source that stay plain, by name or pattern, separated by commas: `conv1,*.downsample`."""
    linear: str | None = None
    """Linear layers of the source to convert too, by name or pattern, separated by commas: `*.mlp`."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        if self.route_per == "token":
            able = " or ".join(name for name, each in ROUTERS.items() if each.in_layers)
            require(
                ROUTERS[self.router].in_layers, "model.router", f"{able} when model.route_per is token", self.router
            )
        if self.kind == "moe" and (experts := ROUTERS[self.router].experts) is not None:
            rule = f"{experts} when model.router is {self.router}"
            require(self.num_experts == experts, "model.num_experts", rule, self.num_experts)
        if self.router_norm != "batch":
            able = " or ".join(name for name, each in ROUTERS.items() if each.norms)
            rule = f"{able} when model.router_norm is {self.router_norm}"
            require(ROUTERS.find(self.router).norms, "model.router", rule, self.router)
            rule = f"left out when model.router_norm is {self.router_norm}"
            require(self.source is None, "model.source", rule, self.source)
        for name in ("skip", "linear"):
            patterns = getattr(self, name)
            require(patterns is None or self.to_moe, f"model.{name}", "left out without model.to_moe", patterns)
        if self.source is None:
            rule = "false without a source (--model FILE.py:FACTORY)"
            require(not self.to_moe, "model.to_moe", rule, self.to_moe)
            return
        require_path("model.source", self.source)
        require(bool(re.fullmatch(r".+\.py:\w+", self.source)), "model.source", "FILE.py:FACTORY", self.source)
        for name, value in OWN_MODEL.items():
            setattr(self, name, value)
        self.kind = "moe" if self.to_moe else "dense"

    def backbone(self) -> dict[str, Any]:
        """The fields that describe a backbone of ours: what `create_model` takes. Younger ones are left out at their
        defaults, so that descriptions of older models, and their digests, stay as they are.
        """
        own = ("source", "to_moe", "skip", "linear", *["router_norm"] * (self.router_norm == "batch"))
        return {name: value for name, value in vars(self).items() if name not in own}

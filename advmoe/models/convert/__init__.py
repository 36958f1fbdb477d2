"""Any network as a mixture of experts: its convolutions become MoE layers that start from their weights.

Every expert is a copy of the whole layer, so that the converted network computes what it did until it is trained:
sparse upcycling (Komatsuzaki et al., ICLR 2023), here of convolutions, with one expert per image and layer. No noise is
added to tell the experts apart: routers send them different images, whose gradients do.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from advmoe.config import Channels, Experts, ModelConfig, RouterKind, Within, typed
from advmoe.errors import InputError
from advmoe.models.classifier import Classifier
from advmoe.models.convert.candidates import Candidate, candidates, watch
from advmoe.models.convert.probe import SAME, image_spec, logits_of, require_same, spec_of
from advmoe.models.convert.replacing import Conversion, ConvertedClassifier, convert, normalizer
from advmoe.moe.layer import moe_layers
from advmoe.moe.routing import require_numbered
from advmoe.tables import ROUTERS
from advmoe.text import one_line, show


def to_moe(
    module: nn.Module,
    num_experts: int = 2,
    router: RouterKind = "layer",
    skip: Sequence[str] = (),
    linear: Sequence[str] = (),
    *,
    example: Tensor | None = None,
    depthwise: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    inplace: bool = False,
) -> ConvertedClassifier:
    """Make a network a mixture of experts that computes the same function until it is trained.

    Every `Conv2d` becomes an MoE layer with `num_experts` copies of it as experts and, by default, a router of its own.
    The result takes [0, 1] pixels (N, C, H, W) to logits (N, K) as `module` does, and works with all else here. Its
    `conversion` lists what was converted and what was not, with the reason: depthwise convolutions; layers that are
    shared, parametrised or hooked; subclasses with buffers, or with parameters of modules inside (others keep their
    `forward`); and, with an `example`, layers that do not run, or not on one row per image, or whose weights the
    network reads itself. An MoE layer has the other attributes of the layer that it replaces. A layer that runs several
    times in a pass makes its choice the first time and keeps it.

    Args:
        module: the network, or a plain `Classifier` of ours. It is copied, and left as it is, unless `inplace`.
        num_experts: E. router: see `config.ModelConfig`.
        skip: layers to leave plain, by name or pattern (`conv1`, `layer4`, `*.downsample`); a module's name stands for
            all in it. The paper leaves the first convolution and the shortcuts' plain: name them here to follow it.
        linear: `Linear` layers to convert too, named in the same way (`*.mlp` for those of every MLP).
        example: images (N, C, H, W) in [0, 1], N >= 2. The network is run on them: layers are numbered in the order in
            which they run (else in that of `named_modules`), and the result is compared with the original. Without it,
            a layer that does not run in some pass is an error of that pass, and costs are not counted.
        depthwise: whether depthwise convolutions are converted too.
        mean, std: pixel statistics per channel, where `module` takes normalised images.

    The routers' weights are drawn from PyTorch's generator. Train mode needs batches of at least two images. Raises
    `ValueError` that names the argument, the rule and the value.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not 1 <= num_experts <= 1024:
        raise InputError(f"num_experts must be a whole number >= 1 and <= 1024, got {show(num_experts)}")
    ROUTERS.require("router", router)
    skipped, wanted_too = _patterns("skip", skip), _patterns("linear", linear)
    module = _own(module, inplace)
    told: dict[str, Any] = {}
    if isinstance(module, Classifier):
        if module.spec["kind"] == "sparse":
            raise InputError("module must be a network without masks (advmoe.models.compact), got a sparse one")
        told = {name: module.spec[name] for name in _TOLD if module.spec.get(name) is not None}
        if mean is None and std is None:
            mean, std, module = module.spec["mean"], module.spec["std"], module.backbone
    _require_plain(module)
    normalize = normalizer(mean, std)
    logits = None if example is None else logits_of(nn.Sequential(normalize, module), example)
    if example is not None and not bool(example.isfinite().all()):
        raise InputError("example must be finite images, which tell whether the network stays the same, got NaN or inf")
    layers = candidates(module, skipped, wanted_too, depthwise=depthwise)
    if example is not None:
        watch(layers, nn.Sequential(normalize, module), example)
    wanted = sorted((each for each in layers if each.reason is None), key=lambda each: each.turn)
    conversion = Conversion(
        converted=tuple(each.name for each in wanted),
        skipped={each.name: each.reason for each in layers if each.reason is not None},
    )
    images = image_spec(module) if example is None or logits is None else spec_of(example, logits)
    if mean is not None and images["in_channels"] not in (None, len(mean)):
        raise InputError(f"mean and std must have one number per channel ({images['in_channels']}), got {show(mean)}")
    settings = {
        "num_experts": num_experts, "router": router, "mean": _plain(mean), "std": _plain(std), **images, **told,
    }  # fmt: skip
    model = convert(module, conversion, settings)
    if example is not None and logits is not None:
        try:
            require_same(model, example, logits)
        except InputError:
            _undo(module, wanted)
            raise
    return model


_TOLD = ("num_classes", "in_channels", "input_size", "classes", "cut")
"""What a model of ours knows of its images and classes, and keeps."""


def _undo(module: nn.Module, layers: Iterable[Candidate]) -> None:
    """Put the plain layers back into a network that was converted in place."""
    for each in layers:
        parent, _, child = each.name.rpartition(".")
        if each.name:
            setattr(module.get_submodule(parent), child, each.module)


def own_classifier(module: nn.Module, config: ModelConfig, example: Tensor) -> Classifier:
    """The user's `module` as the model that `config` describes: converted (`to_moe`), or as it is. Takes it over.

    `example` are images (N, C, H, W) such as it will see, N >= 2. Raises `ValueError` for a module that cannot be used.
    """
    if config.to_moe:
        skip, linear = ((text or "").split(",") for text in (config.skip, config.linear))
        model: Classifier = to_moe(
            module, config.num_experts, config.router, skip, linear, example=example, inplace=True
        )
    else:
        model = _as_it_is(module, spec_of(example, logits_of(module, example)))
    model.spec["source"] = config.source
    return model


def rebuilt(spec: dict[str, Any], module: nn.Module, most: int) -> Classifier:
    """The model that `spec` describes, built from the user's `module`, which is taken over; the weights come later.

    Raises `ValueError` where the module lacks a layer that was converted, and before it makes more than `most` weights.
    """
    _require_room(spec, module, most)
    if any(is_lazy(each) for each in module.parameters()):  # they take their shape from the first images
        logits_of(module, torch.zeros(2, spec["in_channels"], spec["input_size"], spec["input_size"]))
    if "layers" in spec:
        _require_plain(module)
        conversion = Conversion(tuple(spec["layers"]), dict(spec["skipped"]))
        model: Classifier = convert(module, conversion, spec)
    else:
        model = _as_it_is(module, spec)
    model.spec = dict(spec)
    return model


def _require_room(spec: dict[str, Any], module: nn.Module, most: int) -> None:
    """Raise `ValueError` where a stranger's `spec` asks for more than can be."""
    for name, hint in (("in_channels", Channels), ("input_size", Annotated[int, Within(1, 4096)])):
        if spec[name] is not None:
            typed(name, hint, spec[name])
    if "layers" in spec:
        experts, there = typed("num_experts", Experts, spec["num_experts"]), dict(module.named_modules())
        layers = [there[name] for name in spec["layers"] if name in there]
        weights = sum(each.numel() for layer in layers for each in layer.parameters(recurse=False) if not is_lazy(each))
        if experts * weights > most:
            raise InputError(f"num_experts must fit the {most:,} weights that there are, got {experts}")


def _as_it_is(module: nn.Module, images: dict[str, Any]) -> Classifier:
    require_numbered(module)
    kind = "moe" if moe_layers(module) else "dense"
    spec = {"name": type(module).__name__, "kind": kind, "source": None, "mean": None, "std": None, **images}
    return Classifier(nn.Identity(), module, None, spec)


def _require_plain(module: nn.Module) -> None:
    if layers := moe_layers(module):
        raise InputError(f"module must have no MoE layers yet, got one with a {type(layers[0]).__name__}")


def _plain(numbers: Sequence[float] | None) -> list[float] | None:
    return None if numbers is None else [float(number) for number in numbers]


def _own(module: Any, inplace: bool) -> nn.Module:
    """The module to convert: a copy, unless `inplace`. Raises `ValueError` for what cannot be converted, or copied."""
    if not isinstance(module, nn.Module):
        raise InputError(f"module must be a torch.nn.Module, got {show(module)}")
    if hasattr(module, "_orig_mod"):  # its layers would be those of the compiled code
        raise InputError(f"module must be the network before torch.compile, got an {type(module).__name__}")
    if inplace:
        return module
    try:
        return copy.deepcopy(module)
    except Exception as error:
        rule = "module must be one that copy.deepcopy takes, or inplace must be true"
        raise InputError(f"{rule}, got {one_line(error)}") from error


def _patterns(name: str, given: Sequence[str]) -> tuple[str, ...]:
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [None]
    if not all(isinstance(each, str) for each in patterns):
        raise InputError(f"{name} must be names or patterns of layers, got {show(given)}")
    return tuple(each.strip() for each in patterns if each.strip())


__all__ = ["SAME", "Conversion", "ConvertedClassifier", "own_classifier", "rebuilt", "to_moe"]

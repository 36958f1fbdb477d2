"""Any network as a mixture of experts: its convolutions become MoE layers that start from their weights.

Every expert is a copy of the whole layer, so that the converted network computes what it did until it is trained:
sparse upcycling (Komatsuzaki et al., ICLR 2023), here of convolutions, with one expert per image and layer. No noise is
added to tell the experts apart: routers send them different images, whose gradients do.

Axes: `N` batch, `C` channels, `H W` size, `K` classes, `E` experts, `L` MoE layers.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from advmoe.config import Channels, Experts, ModelConfig, RouterKind, Within, typed
from advmoe.errors import InputError
from advmoe.models.classifier import Classifier
from advmoe.models.modes import evaluating
from advmoe.models.normalize import Normalize
from advmoe.moe.conv import MoEConv2d
from advmoe.moe.described import asks_no_values
from advmoe.moe.layer import MoELayer
from advmoe.moe.linear import MoELinear
from advmoe.moe.routers import MakeRouter
from advmoe.moe.routing import forward_scope
from advmoe.moe.wrapped import MoEWrapped
from advmoe.ops import listened
from advmoe.tables import ROUTERS
from advmoe.text import few, one_line, show

SAME = 1e-3
"""Largest difference of logits before and after, relative to the largest: grouped samples take other kernels, which
round apart. A layer that does not run as it seems to makes a far larger one."""


@dataclass(frozen=True)
class Conversion:
    """What became of a network's layers."""

    converted: tuple[str, ...]
    """Those that are MoE layers now, by name, in the order of the pathway."""
    skipped: dict[str, str]
    """Why each of the others stayed plain, by name."""
    in_place: tuple[str, ...] = ()
    """Of the converted, those whose output the network changes in place (or may: nobody has looked)."""

    def __str__(self) -> str:
        total = len(self.converted) + len(self.skipped)
        head = f"{len(self.converted)} of {total} layers are MoE layers"
        return "\n".join([head, *(f"  plain  {name}: {reason}" for name, reason in self.skipped.items())])


class ConvertedClassifier(Classifier):
    """A `Classifier` that `to_moe` made of a network; `conversion` says of which of its layers."""

    def __init__(
        self, normalize: nn.Module, backbone: nn.Module, router: nn.Module | None, spec: dict[str, Any],
        conversion: Conversion,
    ) -> None:  # fmt: skip
        super().__init__(normalize, backbone, router, spec)
        self.conversion = conversion

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K), under the active routing. Raises `ValueError` unless every layer chose once per image."""
        with forward_scope() as routing:
            logits = super().forward(x)
            names = self.conversion.converted
            number = x.shape[0]  # not `len`, which a graph for any batch size cannot keep open
            chosen = {layer: choice.shape[0] for layer, choice in routing.choices.items()}
            if len(chosen) != len(names) or any(each != number for each in chosen.values()):
                wrong = [f"{name} with {chosen.get(i, 0)}" for i, name in enumerate(names) if chosen.get(i) != number]
                rule = "every MoE layer must make one choice per image (leave others plain: `to_moe(..., skip=...)`)"
                raise InputError(f"{rule}, got of {number} images {few(wrong)}")
            return logits


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
    `forward`); and, where an `example` is given, layers that do not run, or not on one row per image, or whose weights
    the network reads itself. MoE layers answer for the other attributes of what they replace. A layer that runs several
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
    module = module if inplace else copy.deepcopy(module)
    if isinstance(module, Classifier) and mean is None and std is None:
        mean, std, module = module.spec["mean"], module.spec["std"], module.backbone
    _require_plain(module)
    normalize = _normalize(mean, std)
    logits = None if example is None else _logits(nn.Sequential(normalize, module), example)
    layers = _candidates(module, _words(skip), _words(linear), depthwise=depthwise)
    if example is not None:
        _watch(layers, nn.Sequential(normalize, module), example)
    wanted = sorted((each for each in layers if each.reason is None), key=lambda each: each.turn)
    conversion = Conversion(
        converted=tuple(each.name for each in wanted),
        skipped={each.name: each.reason for each in layers if each.reason is not None},
        in_place=tuple(each.name for each in wanted if each.in_place),
    )
    images = _image_spec(module) if example is None or logits is None else _described(example, logits)
    settings = {"num_experts": num_experts, "router": router, "mean": _plain(mean), "std": _plain(std), **images}
    model = _converted(module, conversion, settings)
    if example is not None and logits is not None:
        _require_same(model, example, logits)
    return model


def own_classifier(module: nn.Module, config: ModelConfig, example: Tensor) -> Classifier:
    """The user's `module` as the model that `config` describes: converted (`to_moe`), or as it is. Takes it over.

    `example` are images (N, C, H, W) as it will be given, N >= 2. Raises `ValueError` for a module that cannot be used.
    """
    if config.to_moe:
        skip, linear = ((text or "").split(",") for text in (config.skip, config.linear))
        model: Classifier = to_moe(
            module, config.num_experts, config.router, _words(skip), _words(linear), example=example, inplace=True
        )
    else:
        model = _as_it_is(module, _described(example, _logits(module, example)))
    model.spec["source"] = config.source
    return model


def rebuilt(spec: dict[str, Any], module: nn.Module, most: int) -> Classifier:
    """The model that `spec` describes, made of the user's `module`, which is taken over; its weights are not yet those.

    Raises `ValueError` where the module lacks a layer that was converted, and before it makes more than `most` weights.
    """
    _require_room(spec, module, most)
    if any(is_lazy(each) for each in module.parameters()):  # they take their shape from the first images
        _logits(module, torch.zeros(2, spec["in_channels"], spec["input_size"], spec["input_size"]))
    if "layers" in spec:
        _require_plain(module)
        conversion = Conversion(tuple(spec["layers"]), dict(spec["skipped"]), tuple(spec["in_place"]))
        model: Classifier = _converted(module, conversion, spec)
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
    routed = any(isinstance(each, MoELayer) for each in module.modules())
    kind = "moe" if routed else "dense"
    spec = {"name": type(module).__name__, "kind": kind, "source": None, "mean": None, "std": None, **images}
    return Classifier(nn.Identity(), module, None, spec)


def _require_plain(module: nn.Module) -> None:
    found = next((each for each in module.modules() if isinstance(each, MoELayer)), None)
    if found is not None:
        raise InputError(f"module must have no MoE layers yet, got one with a {type(found).__name__}")


def _normalize(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    if mean is None and std is None:
        return nn.Identity()
    if mean is None or std is None or len(mean) != len(std) or not min(std) > 0:
        raise InputError(f"mean and std must both have one entry per channel, std > 0, got {mean!r} and {std!r}")
    return Normalize(mean, std)


def _plain(numbers: Sequence[float] | None) -> list[float] | None:
    return None if numbers is None else [float(number) for number in numbers]


def _words(given: Sequence[str]) -> tuple[str, ...]:
    words = [given] if isinstance(given, str) else given
    return tuple(word.strip() for word in words if word.strip())


# Which layers


@dataclass
class _Layer:
    """A layer that might be converted."""

    name: str
    module: nn.Conv2d | nn.Linear
    reason: str | None
    """Why it is not, if so."""
    turn: int
    """Its place among the layers, in the order of the pathway."""
    in_place: bool = True


def _candidates(module: nn.Module, skip: tuple[str, ...], linear: tuple[str, ...], *, depthwise: bool) -> list[_Layer]:
    """Every convolution and every linear layer asked for, in the order of `named_modules`."""
    names, owners = _occurrences(module)
    there = {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
    _require_matches("linear", linear, [name for name, each in there.items() if isinstance(each, nn.Linear)])
    wanted = {name: each for name, each in there.items() if isinstance(each, nn.Conv2d) or _matching(name, linear)}
    _require_matches("skip", skip, list(wanted))
    found: list[_Layer] = []
    for name, layer in wanted.items():
        reason = "named in skip" if _matching(name, skip) else _obstacle(name, layer, names, owners)
        if reason is None and isinstance(layer, nn.Conv2d) and 1 < layer.in_channels == layer.groups:
            reason = None if depthwise else "depthwise"
        found.append(_Layer(name, layer, reason, len(found)))
    return found


def _occurrences(module: nn.Module) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """The names of each module, and of the modules that own each parameter, by identity."""
    names, owners = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
    for name, each in module.named_modules(remove_duplicate=False):
        if id(each) not in names:
            for parameter in each.parameters(recurse=False):
                owners[id(parameter)].append(name)
        names[id(each)].append(name)
    return names, owners


def _obstacle(
    name: str, layer: nn.Conv2d | nn.Linear, names: dict[int, list[str]], owners: dict[int, list[str]]
) -> str | None:
    """Why this layer cannot be replaced by copies of itself, if so."""
    if any(is_lazy(each) for each in chain(layer.parameters(), layer.buffers())):
        return "its shape is not known before it has run (give an example)"
    if is_parametrized(layer):
        return "parametrised"
    others = [other for other in names[id(layer)] if other != name]
    others += [other for parameter in layer.parameters() for other in owners[id(parameter)] if other != name]
    if others:
        return f"shared with {others[0]}"
    if any(map(listened, layer.modules())):
        return "it has hooks"
    if "forward" in vars(layer):
        return "its forward was replaced"
    inside = chain.from_iterable(child.parameters() for child in layer.children())
    if next(chain(inside, layer.buffers()), None) is not None:
        return f"a {type(layer).__name__} with buffers, or parameters of modules inside"
    rows = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    if layer._parameters.get("weight") is None or {each.shape[:1] for each in layer.parameters()} != {(rows,)}:
        return f"a {type(layer).__name__} whose parameters are not one row per output"
    return None


def _matching(name: str, patterns: Sequence[str]) -> list[str]:
    """The patterns that name this layer, or a module that it lies in."""
    words = name.split(".")
    above = [".".join(words[: i + 1]) for i in range(len(words))]
    return [pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in above)]


def _require_matches(argument: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(_matching(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            there = f"did you mean {near[0]}?" if near else f"there are {few(names) or 'none'}"
            kind = "Linear layers" if argument == "linear" else "layers to convert"
            raise InputError(f"{argument} must name {kind} of the network ({there}), got {pattern!r}")


def _watch(layers: list[_Layer], model: nn.Module, example: Tensor) -> None:
    """Run `model` on `example`, and note of each layer when it runs, on what, whether its output is changed, and
    whether its parameters are read by others.
    """
    outputs: dict[str, tuple[Tensor, int]] = {}

    def hook(each: _Layer, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0] if args else None
        axes = 4 if isinstance(each.module, nn.Conv2d) else None
        if not isinstance(x, Tensor) or x.dim() != (axes or max(2, x.dim())) or len(x) != len(example):
            shape = tuple(x.shape) if isinstance(x, Tensor) else "no tensor"
            each.reason = f"it does not run on one row per image (of {len(example)}, on {shape})"
        if each.name not in outputs:
            each.turn = len(outputs)
        outputs[each.name] = output, output._version

    watched = [each for each in layers if each.reason is None]
    reads = _Reads(watched)
    handles = [
        each.module.register_forward_hook(lambda _, args, output, each=each: hook(each, args, output))
        for each in watched
    ]
    for each in watched:
        handles.append(each.module.register_forward_pre_hook(lambda module, _: reads.running.add(id(module))))
        handles.append(each.module.register_forward_hook(lambda module, *_: reads.running.discard(id(module))))
    try:
        with reads:
            _logits(model, example)
    finally:
        for handle in handles:
            handle.remove()
    for each in watched:
        if each.name not in outputs:
            each.reason = each.reason or "it does not run"
        else:
            output, version = outputs[each.name]
            each.in_place = output._version != version


class _Reads(TorchFunctionMode):
    """Notes of each layer whose parameters are computed with while it does not run itself."""

    def __init__(self, layers: list[_Layer]) -> None:
        super().__init__()
        self.owners = {
            id(parameter): (name, each) for each in layers for name, parameter in each.module.named_parameters()
        }
        self.running = set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Have PyTorch do it, and note what it is done to."""
        kwargs = kwargs or {}
        if not asks_no_values(func, args):
            for value in _flat((*args, *kwargs.values())):
                name, layer = self.owners.get(id(value), ("", None))
                if layer is not None and id(layer.module) not in self.running:
                    layer.reason = layer.reason or f"the network reads its {name}"
        return func(*args, **kwargs)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


# The model


def _converted(module: nn.Module, conversion: Conversion, settings: dict[str, Any]) -> ConvertedClassifier:
    """`module` with the layers of `conversion` replaced, and the router that sees the image, if any."""
    num_experts, router = settings["num_experts"], settings["router"]
    name = type(module).__name__
    if not conversion.converted:
        listed = few([f"{layer} ({reason})" for layer, reason in conversion.skipped.items()])
        raise InputError(f"module must have a Conv2d to convert, got {name} with {listed or 'none'}")
    image_router = None
    if not ROUTERS[router].in_layers:
        image_router = _image_router(module, settings, len(conversion.converted))
    for index, layer in enumerate(conversion.converted):
        try:
            plain = module.get_submodule(layer)
        except AttributeError:
            plain = None
        if not isinstance(plain, nn.Conv2d | nn.Linear):
            raise InputError(f"module must have the layers that were converted, got {name} without {layer}")
        made = _moe_layer(plain, num_experts, index, make_router=ROUTERS[router].layer)
        made.copies = layer in conversion.in_place
        made.title = f"MoE layer {index} ({layer})" if layer else made.title
        _answer_for(made, plain)
        if not layer:
            module = made
        else:
            parent, _, child = layer.rpartition(".")
            setattr(module.get_submodule(parent), child, made)
    spec = {
        "name": name, "kind": "moe", "source": None, **settings, "layers": list(conversion.converted),
        "in_place": list(conversion.in_place), "skipped": conversion.skipped,
    }  # fmt: skip
    normalize = _normalize(settings["mean"], settings["std"]).to(_place(module)[0])
    model = ConvertedClassifier(normalize, module, image_router, spec, conversion)
    model.training = module.training  # of the parts, each keeps its own
    return model


def _moe_layer(
    layer: nn.Conv2d | nn.Linear, num_experts: int, index: int, *, make_router: MakeRouter | None
) -> MoELayer:
    """`layer` as an MoE layer, all of whose experts are copies of it; on its device, in its precision and mode."""
    device, dtype, rows = layer.weight.device, layer.weight.dtype, num_experts * len(layer.weight)
    shared: dict[str, Any] = {"num_experts": num_experts, "layer": index, "make_router": make_router}
    made: MoELayer
    if type(layer) is nn.Conv2d:
        padding = layer.padding if isinstance(layer.padding, str) else _two(layer.padding)
        made = MoEConv2d(
            layer.in_channels, layer.out_channels, _two(layer.kernel_size), _two(layer.stride), padding,
            dilation=_two(layer.dilation), groups=layer.groups, bias=layer.bias is not None,
            padding_mode=layer.padding_mode, bank_rows=rows, **shared,
        )  # fmt: skip
    elif type(layer) is nn.Linear:
        made = MoELinear(layer.in_features, layer.out_features, bias=layer.bias is not None, bank_rows=rows, **shared)
    else:
        made = MoEWrapped(layer, layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features, **shared)
    if not isinstance(made, MoEWrapped):
        with torch.no_grad():
            for bank, own in zip(made.banks(), layer.parameters(recurse=False), strict=True):
                bank.copy_(own.repeat(num_experts, *[1] * (own.dim() - 1)))
                bank.requires_grad_(own.requires_grad)
    made.to(device, dtype).train(layer.training)
    if made.router is not None:
        made.router.to(torch.promote_types(dtype, torch.float32))
    return made


def _answer_for(made: MoELayer, layer: nn.Module) -> None:
    """Have `made` hold the plain attributes of the `layer` that it replaces, for whoever asks it for them."""
    for name in dir(layer):
        if not name.startswith("_") and not hasattr(made, name):
            value = inspect.getattr_static(layer, name, layer)  # no property is run; parts are not found so
            if not (callable(value) or hasattr(value, "__get__") or isinstance(value, Tensor)):
                setattr(made, name, value)


def _two(numbers: tuple[int, ...]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def _image_router(module: nn.Module, settings: dict[str, Any], num_layers: int) -> nn.Module:
    """The router that sees the image: as wide as the network begins, and at the resolution that it begins with."""
    first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
    if first is None:
        raise InputError(f"router must be layer for a network without Conv2d, got {settings['router']!r}")
    build = ROUTERS[settings["router"]].build
    assert build is not None
    router: nn.Module = build(
        settings["in_channels"] or first.in_channels, first.out_channels, num_layers, settings["num_experts"],
        pool=_two(first.stride)[0],
    )  # fmt: skip
    device, dtype = _place(module)
    return router.to(device, torch.promote_types(dtype, torch.float32)).train(module.training)


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module's parameters lie, and in what precision: the first one's."""
    first = next((each for each in module.parameters() if each.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


# A look at what it computes


def _image_spec(module: nn.Module) -> dict[str, Any]:
    """What the network alone says about its images: their channels, if it begins with a convolution."""
    first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
    return {"num_classes": None, "input_size": None, "in_channels": None if first is None else first.in_channels}


def _described(example: Tensor, logits: Tensor) -> dict[str, Any]:
    channels, height, width = example.shape[1:]
    return {
        "num_classes": logits.shape[1],
        "input_size": height if height == width else None,
        "in_channels": channels,
    }


def _logits(model: nn.Module, example: Tensor) -> Tensor:
    """The logits (N, K) of `example`, in eval mode and without gradients. Raises `ValueError` where there are none."""
    if not isinstance(example, Tensor) or example.dim() != 4 or len(example) < 2 or not example.is_floating_point():
        rule = "example must be floating-point images (N, C, H, W) with N >= 2"
        raise InputError(f"{rule}, got {_shown(example)}")
    device, dtype = _place(model)
    shape = tuple(example.shape)
    try:
        with torch.random.fork_rng(devices=[]), evaluating(model), torch.no_grad():
            logits = model(example.to(device, dtype))
    except AttributeError as error:
        asked = f" (asked of {error.obj.title})" if isinstance(error.obj, MoELayer) else ""
        raise InputError(f"module must take images {shape} without an error, got {one_line(error)}{asked}") from error
    except Exception as error:
        raise InputError(f"module must take images {shape} without an error, got {one_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(example):
        raise InputError(f"module must make logits (N, K) of images {shape}, got {_shown(logits)}")
    return logits


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _require_same(model: Classifier, example: Tensor, before: Tensor) -> None:
    after = _logits(model, example)
    bound = SAME * max(1.0, before.abs().nan_to_num().max().item())
    if not torch.allclose(after, before, rtol=0, atol=bound, equal_nan=True):
        apart = (after - before).abs().max().item()
        rule = "module must compute the same when its layers are replaced (deterministic, layers called as they are)"
        raise InputError(f"{rule}, got logits {apart:.3g} apart")

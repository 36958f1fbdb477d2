"""What `create_model` makes: layers by kind, both parts' parameters, modes, errors."""

import pytest
import torch
from torch import nn

from advmoe.models import create_model, save_model, split_parameters
from advmoe.models.modes import frozen
from advmoe.moe import MoEConv2d, MoELayer, pathway, route, routers_of

ROUTERS = ["layer", "embedding", "image"]


def small(**kwargs):
    return create_model("resnet18", **{"num_classes": 7, "width": 8, **kwargs})


@pytest.mark.parametrize("router", ROUTERS)
def test_every_convolution_is_an_moe_layer_but_stem_and_shortcuts(router):
    model = small(router=router)
    moe = [m for m in model.modules() if isinstance(m, MoEConv2d)]
    plain = [name for name, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)]
    assert [m.layer for m in moe] == list(range(16))
    # Stages 2 to 4 begin with the blocks 2, 4 and 6, which change the shape.
    assert plain == ["stem.0", *(f"blocks.{block}.shortcut.0" for block in (2, 4, 6))]
    assert model.routed and len(list(routers_of(model))) == (16 if router == "layer" else 1)
    assert isinstance(model.backbone.classifier, nn.Linear)


@pytest.mark.parametrize(("kind", "widths"), [("dense", [8, 16, 32, 64]), ("s-dense", [4, 8, 16, 32])])
def test_plain_kinds(kind, widths):
    model = small(kind=kind)
    assert not model.routed and not list(routers_of(model))
    assert [model.backbone.blocks[i].conv2.out_channels for i in (1, 3, 5, 7)] == widths


@pytest.mark.parametrize("router", ROUTERS)
def test_a_pathway_is_as_wide_as_s_dense(router):
    # Forced through one expert, the routed model with S-Dense's filters in that expert's rows is S-Dense.
    torch.manual_seed(0)
    routed, narrow = small(router=router).eval(), small(kind="s-dense").eval()
    state = narrow.backbone.state_dict()
    with torch.no_grad():
        for name, module in routed.backbone.named_modules():
            if isinstance(module, MoEConv2d):
                module.bank[module.rows[1]] = state.pop(f"{name}.weight")
    missing, unexpected = routed.backbone.load_state_dict(state, strict=False)
    assert not unexpected and all("router" in name or name.endswith("bank") for name in missing)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad(), route(forced=torch.ones(3, 16, dtype=torch.long)):
        torch.testing.assert_close(routed(x), narrow(x))


@pytest.mark.parametrize("kwargs", [{"router": r} for r in ROUTERS] + [{"kind": "dense"}], ids=str)
def test_psi_and_phi_partition_the_parameters(kwargs):
    model = small(**kwargs)
    psi, phi = split_parameters(model)
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in psi} | {id(p) for p in phi} == everything
    assert len(psi) + len(phi) == len(everything)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("router" in names[id(p)] for p in phi) and not any("router" in names[id(p)] for p in psi)
    assert bool(phi) == model.routed


def test_pixels_are_normalised_inside():
    model = small(kind="dense", mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0]).eval()
    x = torch.tensor([0.6, 0.7, 0.8]).view(1, 3, 1, 1).repeat(1, 1, 8, 8)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    # (0.6 - 0.1) / 0.5, (0.7 - 0.2) / 0.25, (0.8 - 0.3) / 1
    assert seen[0][0, :, 5, 5].tolist() == pytest.approx([1.0, 2.0, 0.5])


@pytest.mark.parametrize(("in_channels", "size"), [(1, 8), (3, 16), (4, 28)])
def test_other_images(in_channels, size):
    for router in ROUTERS:
        model = small(in_channels=in_channels, input_size=size, router=router, num_experts=3)
        assert model(torch.rand(2, in_channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet19"}, "model.name must be one of resnet18, resnet34, "),
        ({"num_classes": 1}, "num_classes must be >= 2, got 1"),
        ({"num_classes": "10"}, "num_classes must be a whole number, got '10'"),
        ({"input_size": 4}, "input_size must be >= 8, got 4"),
        ({"in_channels": 0}, "in_channels must be >= 1, got 0"),
        ({"scale": 0.0}, "model.scale must be > 0 and <= 1, got 0.0"),
        ({"num_experts": 0}, "model.num_experts must be >= 1, got 0"),
        ({"width": 0}, "model.width must be >= 1, got 0"),
        (
            {"router": "none"},
            "model.router must be one of layer, embedding, image, "
            "fixed-top, fixed-top-bottom, fixed-mean, fixed-late, linear, linear-2, got 'none'",
        ),
        ({"kind": "pruned"}, "model.kind must be one of moe, dense, s-dense, sparse, got 'pruned'"),
        ({"experts": "all"}, "model.experts must be one of subset, independent, got 'all'"),
        ({"experts_init": "zero"}, "model.experts_init must be one of independent, shared, got 'zero'"),
        ({"experts_init": "shared", "num_experts": 3}, "model.experts_init must be independent where experts overlap"),
        ({"mean": [0.5]}, "mean and std must have in_channels=3 entries, got [0.5] and [0.25, 0.25, 0.25]"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be > 0 in every channel, got [0.2, 0.0, 0.2]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_argument_rule_and_value(change, message):
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "resnet18", "num_classes": 10, "width": 8, **change})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"scale": 0.1}, "0.1 of the 8 of stem.0"),
        ({"scale": 0.1, "kind": "s-dense"}, "0.1 of the 8 of stem.0"),
        ({"scale": 0.1, "kind": "sparse"}, "0.1 of the 8 of stem.0"),
        ({"name": "resnet50", "scale": 0.1}, "0.1 of the 8 of stem.0"),
        ({"name": "wrn-10-2", "scale": 0.1}, "0.1 of the 4 of stem.0"),
        ({"name": "vgg16", "input_size": 16, "scale": 0.1}, "0.1 of the 8 of features.0"),
        # Growth is half of the width: of 8 channels a fifth are one and a half, of 4 less than one.
        ({"name": "densenet40", "scale": 0.2}, "0.2 of the 4 of blocks.0.conv2"),
        ({"name": "densenet40", "scale": 0.2, "kind": "sparse"}, "0.2 of the 4 of blocks.0.conv2"),
        # Four hidden units for each channel of the embedding.
        ({"name": "deit-tiny", "scale": 0.03}, "0.03 of the 32 of blocks.0.mlp.0"),
    ],
    ids=str,
)
def test_every_layer_keeps_a_whole_channel(change, left):
    settings = {"name": "resnet18", "num_classes": 3, "width": 8, "input_size": 8, **change}
    with pytest.raises(ValueError) as error:
        create_model(**settings)
    rule = "model.scale must leave every layer a whole channel (take a larger scale, or a larger model.width), got "
    assert str(error.value) == rule + left
    create_model(**{**settings, "kind": "dense"})  # of which the scale says nothing


def test_one_whole_channel_is_enough():
    # 7 of its forty-ninths are 1 - 1e-16 in floating point.
    model = create_model("resnet18", num_classes=3, width=49, scale=1 / 49, num_experts=49)
    assert model.backbone.stem[0].out_channels == 1
    assert create_model("wrn-10-1", num_classes=3, width=4, scale=0.25).backbone.stem[0].out_channels == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_experts": 9},
            "model.num_experts must be <= the 8 channels of every layer, of which experts are windows",
        ),
        ({"name": "densenet40", "width": 1}, "model.width must be >= 2 for a DenseNet (it grows by half of it), got 1"),
        ({"name": "wrn-28-10", "width": 9}, "model.width must be >= 10 for a Wide ResNet of that widening, got 9"),
        ({"name": "wrn-1000-100"}, "the model must have at most 10,000,000,000 weights, got more"),
        (
            {"name": "wrn-1006-1"},
            "model.name wrn-D-K must have D = 6n + 4 >= 10 and <= 1000, and K >= 1 and <= 100, got",
        ),
        ({"name": "wrn-\u0661\u0660-1"}, "model.name must be one of resnet18, "),
        ({"width": 16_384}, "the model must have at most 10,000,000,000 weights, got more"),
        ({"mean": [float("nan")] * 3}, "mean must be finite in every channel, got [nan, nan, nan]"),
        ({"std": [float("inf")] * 3}, "std must be > 0 in every channel, got [inf, inf, inf]"),
        ({"num_classes": 10**12}, "num_classes must be >= 2 and <= 1000000, got 1000000000000"),
        ({"input_size": 2**40}, "input_size must be >= 8 and <= 4096, got 1099511627776"),
    ],
    ids=str,
)
def test_what_no_machine_makes_is_refused_before_it_is_tried(change, message):
    width = {} if str(change.get("name", "")).startswith("wrn") else {"width": 8}
    with pytest.raises(ValueError) as error:
        create_model(**{"name": "resnet18", "num_classes": 10, **width, **change})
    assert str(error.value).startswith(message)


def test_experts_apart_may_be_more_than_a_layer_has_channels():
    assert create_model("resnet18", num_classes=3, width=8, num_experts=9, experts="independent").routed


def test_frozen_restores_what_it_found():
    model = small()
    model.backbone.stem.eval()
    model.backbone.classifier.weight.requires_grad_(False)
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert {True, False} == set(modes) == set(wanted)
    with pytest.raises(RuntimeError, match="planned"), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError("planned")
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    with frozen(lambda x: x):  # any callable can be attacked
        pass


@pytest.mark.parametrize("router", ["layer", "embedding", "image", "fixed-top", "linear"])
def test_in_half_precision_routers_stay_in_fp32(router):
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=3, width=8, input_size=8, router=router).eval()
    x, paths = torch.rand(4, 3, 8, 8), None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    paths = pathway(model, x)
    low = model.bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    for name, value in low.state_dict().items():
        routers = "router" in name
        assert not value.is_floating_point() or value.dtype == (torch.float32 if routers else torch.bfloat16)
        assert not routers or torch.equal(value, before[name])
    if router not in ("layer",):  # which sees features that were rounded
        close = (pathway(low, x.bfloat16()) == paths).float().mean()
        assert close > 0.7


def test_a_model_made_without_memory_computes_what_it_loads():
    settings = {"num_classes": 3, "width": 8, "input_size": 8, "scale": 0.7}
    torch.manual_seed(0)
    model, x = create_model("resnet18", **settings).eval(), torch.rand(4, 3, 8, 8)
    with torch.device("meta"):
        empty = create_model("resnet18", **settings)
    empty = empty.to_empty(device="cpu")
    for layer in empty.modules():
        if isinstance(layer, MoELayer):
            layer.row_index.fill_(10**6)  # what there was in that memory
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty.eval()(x), model(x))


@pytest.mark.parametrize("wrong", [0.5, ["a", "b", "c"], [None] * 3])
def test_statistics_are_numbers(wrong):
    with pytest.raises(ValueError, match=r"^mean and std must be numbers, one for each channel, got "):
        create_model("resnet18", num_classes=3, width=4, input_size=8, mean=wrong)


def test_statistics_of_a_tensor_are_kept_as_numbers(tmp_path):
    mean = torch.tensor([0.25, 0.5, 0.75])
    model = create_model("resnet18", num_classes=3, width=4, input_size=8, mean=mean)
    assert model.spec["mean"] == [0.25, 0.5, 0.75]
    save_model(model, tmp_path)

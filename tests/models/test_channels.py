"""Which channels belong together: small networks by hand, and the backbones."""

import torch
from torch import nn

from advmoe.models import create_model
from advmoe.models.channels import Axis, channel_layout


class Small(nn.Module):
    """A stem, a residual block, a concatenation, and two linear layers on 2x2 pixels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 5, 1)
        self.outer = nn.Conv2d(5, 4, 1)
        self.grown = nn.Conv2d(4, 2, 1)
        self.after = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 4, 8)
        self.logits = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.outer(self.inner(x).relu())
        x = self.after(torch.cat((x, self.grown(x)), 1))
        return self.logits(self.hidden(x.flatten(1)).relu())


def test_a_small_network_by_hand():
    layout = channel_layout(Small())
    # The stem's with the block's output, the block's inside, what is concatenated, the hidden units; not the logits.
    assert layout.sizes == (4, 5, 2, 8)
    assert layout.outputs == {
        "stem": Axis((0,)), "norm": Axis((0,)), "inner": Axis((1,)), "outer": Axis((0,)), "grown": Axis((2,)),
        "after": Axis((0, 2)), "hidden": Axis((3,)), "logits": Axis(()),
    }  # fmt: skip
    assert layout.inputs == {
        "stem": Axis(()), "inner": Axis((0,)), "outer": Axis((1,)), "grown": Axis((0,)),
        "hidden": Axis((0, 2), repeat=4), "logits": Axis((3,)),
    }  # fmt: skip


def test_slices_by_hand():
    surviving = [torch.tensor(channels) for channels in ([1, 3], [0], [1], [2, 5])]
    slices = channel_layout(Small()).slices(surviving)
    indices = {name: [None if part is None else part.tolist() for part in both] for name, both in slices.items()}
    assert indices == {
        "stem": [[1, 3], None], "norm": [[1, 3], None], "inner": [[0], [1, 3]], "outer": [[1, 3], [0]],
        "grown": [[1], [1, 3]],
        "after": [[1, 3, 5], None],  # the second of the two that follow four
        "hidden": [[2, 5], [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]],  # four pixels of each channel
        "logits": [None, [2, 5]],
    }  # fmt: skip


class Twice(nn.Module):
    """Two streams that a later sum makes one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.logits = nn.Linear(2, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        c = self.c(x)
        b = b + c
        a += b
        return self.logits(a.mean((2, 3)))


def test_sums_join_groups_whatever_their_order():
    layout = channel_layout(Twice())
    assert layout.sizes == (2,) and {layout.outputs[name] for name in "abc"} == {Axis((0,))}


def backbone(name, **kwargs):
    return create_model(name, kind="dense", num_classes=3, **kwargs).backbone


def test_a_stage_of_a_resnet_is_one_stream():
    layout = channel_layout(backbone("resnet18", width=4))
    assert layout.sizes == (4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32)  # a stream and the inside of its two blocks
    stream = {name for name, axis in layout.outputs.items() if axis == layout.outputs["blocks.2.conv2"]}
    assert stream == {f"blocks.{block}.{part}2" for block in (2, 3) for part in ("conv", "norm")} | {
        "blocks.2.shortcut.0",
        "blocks.2.shortcut.1",
    }
    assert layout.outputs["stem.0"] == layout.outputs["blocks.1.conv2"] == layout.inputs["blocks.2.shortcut.0"]


def test_a_bottleneck_s_stem_is_no_part_of_the_stream():
    layout = channel_layout(backbone("resnet50", width=4))
    assert layout.sizes[:7] == (4, 4, 4, 16, 4, 4, 4)
    assert layout.outputs["stem.0"] != layout.outputs["blocks.0.conv3"] == layout.outputs["blocks.0.shortcut.0"]


def test_a_wide_resnet_s_stem_belongs_to_the_stream_only_without_a_projection():
    for name, joined in (("wrn-10-1", True), ("wrn-10-2", False)):
        layout = channel_layout(backbone(name, width=4))
        assert (layout.outputs["stem.0"] == layout.outputs["blocks.0.conv2"]) == joined
        assert layout.outputs["norm"] == layout.outputs["blocks.2.conv2"] == layout.inputs["classifier"]


def test_densenet_s_pieces_keep_their_own():
    layout = channel_layout(backbone("densenet40", width=8))
    first, second, third = (layout.inputs[f"blocks.{layer}.conv1"].groups for layer in range(3))
    assert (first, second[:1], third[:2]) == ((0,), first, second) and len(set(third)) == 3
    assert [layout.sizes[g] for g in third] == [8, 4, 4]  # the stem, and two layers' growth
    transition = layout.inputs["blocks.6.conv"].groups
    assert len(transition) == 7 and layout.inputs["blocks.7.conv1"].groups == layout.outputs["blocks.6.conv"].groups


def test_vgg_s_classifier_reads_four_pixels_a_channel():
    layout = channel_layout(backbone("vgg16", width=4, input_size=32))
    assert layout.inputs["classifier.0"] == Axis((12,), repeat=4) and layout.sizes[12:] == (32, 16, 16)
    assert layout.outputs["classifier.4"] == Axis(())

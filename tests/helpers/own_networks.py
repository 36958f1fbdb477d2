"""Networks of somebody's own, as `to_moe` meets them."""

import torch
from torch import nn
from torch.nn import functional as F


class Plain(nn.Module):
    """A stem, grouped, dilated and biased convolutions without norms, in-place activations, a shortcut, dropout."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {
                "a": nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=4),
                "b": nn.Conv2d(16, 8, (1, 3), padding="same", padding_mode="circular"),
                "depth": nn.Conv2d(8, 8, 3, padding=1, groups=8),
            }
        )
        self.down = nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 5))

    def forward(self, x):
        x = self.norm(self.conv1(x)).relu_()
        y = F.relu(self.block["a"](x), inplace=True)
        y = self.block["b"](y)
        y += self.down(x)
        return self.head(self.block["depth"](y).mean((2, 3)))


class SameConv(nn.Conv2d):
    """As TensorFlow pads: by the image's size, more below and to the right."""

    def forward(self, x):
        sides = []
        for length, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-length // s) - 1) * s + k - length, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardisedConv(nn.Conv2d):
    """Standardises its weights per filter, times a learnt gain."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = self.gain * centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Counting(nn.Conv2d):
    """Keeps a number of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("calls", torch.zeros(()))


class StaticSamePadding(nn.Conv2d):
    """A convolution that pads by a module, as of EfficientNets that follow TensorFlow's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))
        self.flavour = "same"

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride)


class TimmStyle(nn.Module):
    """Squeeze-and-excite between subclasses of `Conv2d`, and an MLP on channels-last tokens."""

    def __init__(self):
        super().__init__()
        self.conv_stem = SameConv(3, 8, 3, stride=2, bias=False)
        self.blocks = nn.Sequential(StandardisedConv(8, 8, 3, padding=1), nn.SiLU(inplace=True))
        self.se = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 1), nn.Sigmoid())
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.blocks(self.conv_stem(x))
        x = x * self.se(x.mean((2, 3), keepdim=True))
        return self.fc(x.flatten(2).transpose(1, 2).mean(1) + self.mlp(x.permute(0, 2, 3, 1)).mean((1, 2)))


class Attention(nn.Module):
    """A transformer on patches, whose fused attention reads weights itself."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head((x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))).mean(1))


class Watched(nn.Module):
    """`late` is defined early; `idle` runs in train mode alone; `folded` sees 2 rows per image; `again` runs twice."""

    def __init__(self):
        super().__init__()
        self.folded, self.late, self.idle = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(4, 5, 1), nn.Conv2d(3, 5, 1)
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.folded(x.repeat(2, 1, 1, 1))[: len(x)]
        y = self.late(self.first(self.again(self.again(x).relu()))).mean((2, 3))
        return y + self.idle(x).mean((2, 3)) if self.training else y


class Reads(nn.Module):
    """Reads a layer's weight as well as calling it."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 5, 1), 1.0

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return y if isinstance(self.conv, nn.Conv2d) else y + self.scale


NETS = {"plain": (Plain, ()), "timm style": (TimmStyle, ("mlp",)), "attention": (Attention, ("mlp",))}


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def images(n=12, size=12, seed=1):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def net_with(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.c = nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 5)
            change(self)

        def forward(self, x):
            return self.fc(self.c(self.b(self.a(x))).mean((2, 3)))

    return make(Net)


def shared_weight(net):
    net.c.weight = net.b.weight

"""Vision transformers of DeiT's shape (Touvron et al., ICML 2021), as Dense, S-Dense and MoE-ViT.

Axes: `N` batch, `C` channels, `H W` size, `T` tokens, `D` embedding, `K` classes.

What the model scale narrows here are the hidden units of the MLPs, and the MLPs are the MoE layers. Embedding,
attention and norms keep the backbone's width in every kind: tokens must fit the residual stream whichever experts they
pass. So one pathway costs what S-Dense costs, plus its routers, as in a CNN, but S-Dense at r = 1/2 saves 28% of
DeiT-Tiny and not three quarters: the MLPs are 56% of its multiply-accumulates.

The embedding's width is `model.width` (DeiT-Tiny: 192), with one attention head per 64 of it and at least one. The
patch follows the images: the largest divisor of their side, up to 16, that leaves at least 8 patches along it (16 at
224, 8 at 64, 4 at 32). Neither dropout nor stochastic depth: an attack needs the same network at every step.

Weights start as Glorot's (as in Dosovitskiy et al., ICLR 2021), which follow the width; DeiT's do not, and with them
an MoE-ViT of width 32 learnt slower by SGD (10,000 CIFAR-10 images, 2 epochs, one seed: loss 2.00 against 1.96).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe.errors import InputError
from advmoe.models.layers import LayerFactory, linear
from advmoe.ops import as_written


def patch_size(input_size: int) -> int:
    """The side in pixels of a patch for images of side `input_size`. Raises `ValueError` where none but 1 will do."""
    patch = max(p for p in range(1, 17) if p == 1 or (input_size % p == 0 and input_size // p >= 8))
    if patch == 1 and input_size >= 16:
        raise InputError(f"input_size must be < 16 or divisible into 8 or more patches of 2 to 16, got {input_size}")
    return patch


def num_heads(width: int) -> int:
    """Attention heads of an embedding of `width`. Raises `ValueError` where they cannot share it evenly."""
    heads = max(1, width // 64)
    if width % heads:
        raise InputError(f"model.width must be divisible by its {heads} attention heads (one per 64), got {width}")
    return heads


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(dim, 3 * dim), linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        n, t, d = x.shape
        query, key, value = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if as_written():  # PyTorch's kernels for CPUs have no second derivatives
            mixed = (query @ key.mT / math.sqrt(d // self.heads)).softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return out


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and beside a shortcut."""

    def __init__(self, layers: LayerFactory, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), layers.mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches with a class token and learned positions, `depth` blocks, and a classifier on the class token."""

    def __init__(
        self, layers: LayerFactory, *, depth: int, width: int, in_channels: int, num_classes: int, input_size: int
    ) -> None:
        super().__init__()
        heads, patch = num_heads(width), patch_size(input_size)
        self.input_size, self.router_pool = input_size, max(1, patch // 4)
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (input_size // patch) ** 2, width))
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.blocks = nn.Sequential(*(Block(layers, width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W). Raises `ValueError` for images of another side."""
        side = self.input_size
        if x.shape[2:] != (side, side):
            raise InputError(
                f"images must be {side} pixels on a side, as positions are learned, got {tuple(x.shape[1:])}"
            )
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)[:, 0]))
        return logits

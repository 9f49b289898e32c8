"""A transformer on the patches of a field over one, two or three axes, told the noise level and any conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from polydiff.core.errors import ConfigError
from polydiff.core.nn.embeddings import ConditionSpec, Embedding, FieldEmbeddings
from polydiff.core.nn.unet import zero


def patches(x: Tensor, size: int) -> tuple[Tensor, tuple[int, ...]]:
    """Cut a field into patches; an axis that is no multiple of ``size`` is continued by zeros.

    Args:
        x: (b, c, *axes).
        size: p, places of a patch along each axis.
    Returns:
        tokens (b, n, c p^axes), the last axis of the field running fastest, and the number of patches along each axis.
    """
    short = [-length % size for length in x.shape[2:]]
    if any(short):
        x = F.pad(x, [amount for missing in reversed(short) for amount in (0, missing)])
    counts = tuple(length // size for length in x.shape[2:])
    axes = len(counts)
    x = x.reshape(*x.shape[:2], *(part for count in counts for part in (count, size)))
    order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
    return x.permute(order).reshape(len(x), math.prod(counts), -1), counts


def unpatch(tokens: Tensor, counts: tuple[int, ...], size: int, lengths: tuple[int, ...]) -> Tensor:
    """Put patches together again: the inverse of :func:`patches`, cropped to ``lengths``."""
    axes = len(counts)
    x = tokens.reshape(len(tokens), *counts, -1, *(size,) * axes)
    order = (0, axes + 1, *(place for axis in range(axes) for place in (1 + axis, axes + 2 + axis)))
    x = x.permute(order).reshape(len(tokens), -1, *(count * size for count in counts))
    for axis, length in enumerate(lengths):
        x = x.narrow(axis + 2, 0, length)
    return x


def positions(counts: tuple[int, ...], width: int, like: Tensor) -> Tensor:
    r"""Sines and cosines of each patch's index along every axis, (n, width).

    .. math:: [\sin k_a \omega_j, \cos k_a \omega_j], \quad \omega_j = 10000^{-j/m},\ m = \lfloor width / 2 axes \rfloor

    Source:
        Vaswani et al. 2017, section 3.5, for each axis of its own as in Dosovitskiy et al. 2021, appendix D.4.
    """
    m = width // (2 * len(counts))
    rates = 10_000 ** (-torch.arange(m, device=like.device, dtype=torch.float32) / m)
    grid = torch.meshgrid(*(torch.arange(count, device=like.device) for count in counts), indexing="ij")
    angles = [index.flatten()[:, None] * rates for index in grid]
    features = torch.cat([feature for angle in angles for feature in (angle.sin(), angle.cos())], dim=1)
    return F.pad(features, (0, width - features.shape[1])).to(like.dtype)


def unit(x: Tensor, scale: Tensor) -> Tensor:
    """Scale the last axis to a mean square of one, times ``scale``, in the dtype of ``x``."""
    return F.rms_norm(x, x.shape[-1:], scale.to(x.dtype), eps=1e-6)


class Block(nn.Module):
    r"""Attention among all patches, then a perceptron on each, both modulated and added through gates that start at zero.

    .. math:: x' = x + g_1 \, A((1 + s_1) \, \mathrm{norm}(x) + b_1), \quad y = x' + g_2 \, M((1 + s_2) \, \mathrm{norm}(x') + b_2)

    Args:
        width: of a token, a multiple of ``head_channels``.
        head_channels: channels of an attention head.
        expansion: hidden width of the perceptron in units of ``width``.
        dropout: probability of dropping a hidden activation of the perceptron.
    Source:
        Peebles and Xie 2023 (DiT), section 3.2, "adaLN-Zero block". Queries and keys are normalised to unit mean square
        with a learned scale (Dehghani et al. 2023, section 2.1), which keeps attention from saturating.
    """

    def __init__(self, width: int, head_channels: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.heads = width // head_channels
        self.width = width
        self.qkv = nn.Linear(width, 3 * width)
        self.query_scale, self.key_scale = (nn.Parameter(torch.ones(head_channels)) for _ in range(2))
        self.out = nn.Linear(width, width)
        hidden = round(expansion * width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Dropout(dropout), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor, modulation: Tensor, keys: Tensor | None = None) -> Tensor:
        """Transform tokens.

        Args:
            x: (b, n, width).
            modulation: (b, 6 width): shift, scale and gate of either half.
            keys: (b, 1, 1, n) bool, which tokens may be looked at.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)
        h = self.qkv(self.modulated(x, shift1, scale1))
        q, k, v = rearrange(h, "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        h = F.scaled_dot_product_attention(unit(q, self.query_scale), unit(k, self.key_scale), v, attn_mask=keys)
        x = torch.addcmul(x, gate1, self.out(rearrange(h, "b heads n d -> b n (heads d)")))
        return torch.addcmul(x, gate2, self.perceptron(self.modulated(x, shift2, scale2)))

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Layer norm with a scale and a shift of each item's own."""
        return torch.addcmul(shift, F.layer_norm(x, (self.width,), eps=1e-6), 1 + scale)


class DiT(nn.Module):
    """Diffusion transformer: the field is cut into patches, and every patch attends to all.

    Any size works, since the positions are not learned. The output starts at zero.

    Args:
        axes: 1, 2 or 3.
        in_channels: channels of the input, without those of ``("field", c)`` conditions.
        out_channels: of the output; default ``in_channels``.
        patch: places of a patch along each axis; cost grows with its inverse to the power ``axes``, at least.
        width: of a token.
        depth: blocks.
        head_channels: channels of an attention head, a divisor of ``width``.
        expansion: hidden width of the perceptrons in units of ``width``.
        dropout: probability of dropping a hidden activation of the perceptrons.
        conditions: as of :class:`polydiff.core.nn.unet.UNet`.
    Raises:
        ConfigError: an argument that does not fit the others.
    Source:
        Peebles and Xie 2023 (DiT, arXiv 2212.09748), section 3.
    """

    def __init__(
        self,
        axes: int = 2,
        in_channels: int = 1,
        out_channels: int | None = None,
        *,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        head_channels: int = 64,
        expansion: float = 4.0,
        dropout: float = 0.0,
        conditions: Mapping[str, ConditionSpec] | None = None,
    ) -> None:
        super().__init__()
        self.axes, self.in_channels, self.patch = axes, in_channels, patch
        self.out_channels = out_channels or in_channels
        if axes not in (1, 2, 3):
            raise ConfigError(f"DiT: axes={axes}; it works on 1, 2 or 3 axes")
        sizes = {"patch": patch, "width": width, "depth": depth, "head_channels": head_channels}
        for name, value in {**sizes, "expansion": expansion * width}.items():
            if value < 1:
                raise ConfigError(f"DiT: {name}={sizes.get(name, expansion)} must be at least 1")
        if width % head_channels or width < 2 * axes:
            raise ConfigError(
                f"DiT: width={width} is no multiple of head_channels={head_channels}, or below {2 * axes}"
            )
        conditions = conditions or {}
        self.fields = FieldEmbeddings(conditions)
        others = {name: spec for name, spec in conditions.items() if name not in self.fields}
        self.embedding = Embedding(width, others)
        self.first = nn.Linear((in_channels + self.fields.channels) * patch**axes, width)
        self.blocks = nn.ModuleList(Block(width, head_channels, expansion, dropout) for _ in range(depth))
        # One map makes the modulation of all blocks, and shift and scale of the last norm.
        self.modulation = zero(nn.Linear(width, (6 * depth + 2) * width))
        self.last = zero(nn.Linear(width, self.out_channels * patch**axes))

    def forward(
        self,
        x_t: Tensor,
        c_noise: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Apply the network; arguments and errors are those of :meth:`polydiff.core.nn.unet.UNet.forward`."""
        if x_t.ndim != self.axes + 2 or x_t.shape[1] != self.in_channels:
            raise ConfigError(
                f"DiT: the input has {x_t.shape[1]} channels, this network was built for {self.in_channels} "
                f"on {self.axes} axes, not for a shape of {tuple(x_t.shape)}"
            )
        present = present or {}
        x, others = self.fields(x_t, cond or {}, present)
        modulation = self.modulation(self.embedding(c_noise, others, present))
        *each, shift, scale = modulation.split(
            [*[6 * self.first.out_features] * len(self.blocks), *[self.first.out_features] * 2], dim=1
        )
        valid = keys = None
        if mask is not None:
            valid = mask.view(len(mask), *(1,) * self.axes, -1)
            x = x.masked_fill(~valid, 0)
            cells = patches(valid.expand(-1, 1, *x.shape[2:]), self.patch)[0].any(-1)
            keys = cells[:, None, None, :]
        tokens, counts = patches(x, self.patch)
        tokens = self.first(tokens)
        tokens = tokens + positions(counts, tokens.shape[2], tokens)
        for block, part in zip(self.blocks, each, strict=True):
            tokens = block(tokens, part, keys)
        tokens = F.layer_norm(tokens, tokens.shape[2:], eps=1e-6)
        tokens = self.last(torch.addcmul(shift.unsqueeze(1), tokens, 1 + scale.unsqueeze(1)))
        y = unpatch(tokens, counts, self.patch, tuple(x_t.shape[2:]))
        return y if valid is None else y.masked_fill(~valid, 0)

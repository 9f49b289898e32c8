"""A U-Net for fields over one, two or three axes, told the noise level and any conditions.

Shapes: b items, c channels, ``*axes`` the places of the field; channels come first. How it spends its work: resampling
happens before the convolutions on the way down and after them on the way up, one linear map makes the modulation of all
blocks, and attention stays where the field is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polydiff.core.errors import ConfigError
from polydiff.core.nn.attention import SelfAttention
from polydiff.core.nn.embeddings import ConditionSpec, Embedding, FieldEmbeddings
from polydiff.core.nn.norms import AdaptiveGroupNorm, GroupNorm

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MEAN_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Padding(NamedTuple):
    """What one level knows of the padding: 1 where valid, and the valid share of the places each cell was pooled from."""

    mask: Tensor
    share: Tensor


def pool(x: Tensor, padding: Padding | None = None) -> Tensor:
    """Halve every axis, rounding up, by the mean over the (valid) places of each cell; x (b, c, *axes) is zero on padding."""
    kernel = [min(2, size) for size in x.shape[2:]]
    y = MEAN_POOL[x.ndim - 2](x, kernel, 2, ceil_mode=True)
    return y if padding is None else y / padding.share


def paddings(mask: Tensor, axes: int, levels: int, dtype: torch.dtype) -> list[Padding]:
    """The padding on every level of the pyramid; a cell is valid when any place it was pooled from is.

    Args:
        mask: (b, n) bool along the last axis of the field.
        axes: axes of the field; the mask is the same along all but the last.
        levels: number of levels.
        dtype: of the field.
    """
    ones = (1,) * axes
    mask = mask.to(dtype)
    result, share = [], torch.ones_like(mask)
    for _ in range(levels):
        result.append(Padding(*(value.view(len(mask), *ones, -1) for value in (mask, share))))
        share = pool(mask.unsqueeze(1)).squeeze(1)
        mask = (share > 0).to(dtype)
        share = torch.where(share > 0, share, 1)
    return result


class ResidualBlock(nn.Module):
    r"""Two convolutions around an adaptive group norm, in a residual branch that starts at zero.

    .. math:: y = (P x + W_2 \, \mathrm{silu}((1 + s) \, \mathrm{norm}(W_1 \, \mathrm{silu}(\mathrm{norm}(x))) + b)) / \sqrt2

    x is first pooled, or narrowed, enlarged and joined to a field from the way down; then comes the formula, then attention.

    Args:
        axes: 1, 2 or 3.
        in_channels: of x.
        out_channels: of y.
        joined: channels of the field that is joined to x; 0 for none.
        resample: ``"down"`` halves the axes; ``"up"`` enlarges x to the size of the joined field; ``""`` keeps them.
        head_channels: channels of an attention head; 0 for no attention.
        dropout: probability of dropping an activation before the second convolution.
    Source:
        Dhariwal and Nichol 2021 (ADM), section 3, eq. 3; Karras et al. 2022 (EDM), table 7 for the 1/sqrt 2.
    Differs from the source:
        resampling comes before every convolution on the way down and after a narrowing 1x1 one on the way up, so none
        runs on a large field with the channels of a small one.
    """

    def __init__(
        self,
        axes: int,
        in_channels: int,
        out_channels: int,
        *,
        joined: int = 0,
        resample: str = "",
        head_channels: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTION[axes]
        self.resample = resample
        if resample == "up":
            self.narrow = convolution(in_channels, out_channels, 1)
            in_channels = out_channels
        width = in_channels + joined
        self.norm1 = GroupNorm(width)
        self.conv1 = convolution(width, out_channels, 3, padding=1, bias=False)
        self.norm2 = AdaptiveGroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(convolution(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if width == out_channels else convolution(width, out_channels, 1)
        self.attention = SelfAttention(out_channels, head_channels) if head_channels else None

    def forward(
        self, x: Tensor, modulation: Tensor, joined: Tensor | None = None, padding: Padding | None = None
    ) -> Tensor:
        """Transform a field.

        Args:
            x: (b, in_channels, *axes), zero on padding.
            modulation: (b, 2 out_channels), scale - 1 and shift of the second norm.
            joined: (b, joined, *axes), at the size of the result.
            padding: of the level of the result.
        """
        mask = None if padding is None else padding.mask
        if self.resample == "down":
            x = pool(x, padding)
        elif self.resample == "up" and joined is not None:
            # For an odd size, place i still comes from cell i // 2: the last cell is used once.
            x = clear(F.interpolate(self.narrow(x), size=joined.shape[2:], mode="nearest"), padding)
        if joined is not None:
            x = torch.cat([x, joined], dim=1)
        h = F.silu(self.norm1(x, mask))
        h = F.silu(self.norm2(self.conv1(h), modulation, mask))
        x = clear((self.skip(x) + self.conv2(self.dropout(h))) * 0.5**0.5, padding)
        return x if self.attention is None else self.attention(x, mask)


class UNet(nn.Module):
    """Blocks on a pyramid of sizes: down to the smallest, and up again with the fields of the way down joined in.

    Level l has ``channels * multipliers[l]`` channels and the size of the input over 2^l, rounded up: any size works.
    The output starts at zero.

    Args:
        axes: 1, 2 or 3.
        in_channels: channels of the input, without those of ``("field", c)`` conditions.
        out_channels: of the output; default ``in_channels``.
        channels: channels of level 0 for a multiplier of 1.
        multipliers: one for each level.
        blocks: residual blocks of each level, on either way; one number or one for each level.
        middle: residual blocks between the two ways, the first of them with attention where the last level has it.
        attention: levels whose blocks attend over the whole field; -1 is the smallest.
        head_channels: channels of an attention head.
        dropout: probability of dropping an activation inside a block.
        embedding: width of the vector of noise level and conditions; default ``4 * channels``.
        conditions: by name, a number of classes, ``("tensor", size)`` for a vector, ``("setting", size)`` for one that is
            never absent, or ``("field", c)`` for a field of the input's size that is joined to it as further channels.
    Raises:
        ConfigError: an argument that does not fit the others.
    Source:
        Dhariwal and Nichol 2021 (ADM); Song et al. 2021 (DDPM++), as in Karras et al. 2022 (EDM), table 7.
    Differs from the source:
        as many blocks on the way up as down (theirs have one more a level), and see :class:`ResidualBlock`.
    """

    def __init__(
        self,
        axes: int = 2,
        in_channels: int = 1,
        out_channels: int | None = None,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int | Sequence[int] = 2,
        middle: int = 1,
        attention: Sequence[int] = (),
        head_channels: int = 64,
        dropout: float = 0.0,
        embedding: int | None = None,
        conditions: Mapping[str, ConditionSpec] | None = None,
    ) -> None:
        super().__init__()
        self.axes, self.in_channels = axes, in_channels
        if axes not in CONVOLUTION:
            raise ConfigError(f"UNet: axes={axes}; it works on 1, 2 or 3 axes")
        sizes = {"channels": [channels], "multipliers": multipliers, "head_channels": [head_channels]}
        for name, values in sizes.items():
            if any(value < 1 for value in values):
                raise ConfigError(f"UNet: {name}={values if name == 'multipliers' else values[0]} must be at least 1")
        levels = len(multipliers)
        counts = [blocks] * levels if isinstance(blocks, int) else list(blocks)
        if not levels or len(counts) != levels or min(counts) < 1:
            raise ConfigError(f"UNet: blocks={blocks} must be >= 1 for each of the {levels} levels of {multipliers=}")
        if any(not -levels <= level < levels for level in attention):
            raise ConfigError(f"UNet: attention={list(attention)} names a level outside 0..{levels - 1}")
        conditions = conditions or {}
        self.fields = FieldEmbeddings(conditions)
        others = {name: spec for name, spec in conditions.items() if name not in self.fields}
        self.embedding = Embedding(embedding or 4 * channels, others)
        widths = [channels * multiplier for multiplier in multipliers]
        heads = [head_channels if {level, level - levels} & set(attention) else 0 for level in range(levels)]

        def block(level: int, width: int, **options: Any) -> ResidualBlock:
            options = {"head_channels": heads[level], "dropout": dropout, **options}
            return ResidualBlock(axes, width, widths[level], **options)

        self.first = CONVOLUTION[axes](in_channels + self.fields.channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.levels = [level for level, count in enumerate(counts) for _ in range(count)]
        width, last = widths[0], 0
        for level in self.levels:
            self.down.append(block(level, width, resample="down" if level != last else ""))
            width, last = widths[level], level
        self.middle = nn.ModuleList(block(-1, width, **({"head_channels": 0} if k else {})) for k in range(middle))
        for level in reversed(self.levels):
            self.up.append(block(level, width, joined=widths[level], resample="up" if level != last else ""))
            width, last = widths[level], level
        # One linear map for all blocks: many small ones would cost more than they compute.
        self.modulation_widths = [2 * int(m.conv2.out_channels) for m in (*self.down, *self.middle, *self.up)]
        self.modulation = nn.Linear(self.embedding.width, sum(self.modulation_widths))
        self.norm = GroupNorm(width)
        self.last = zero(CONVOLUTION[axes](width, out_channels or in_channels, 3, padding=1))

    def forward(
        self,
        x_t: Tensor,
        c_noise: Tensor,
        mask: Tensor | None = None,
        cond: Mapping[str, Tensor] | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Map a batch of fields.

        Args:
            x_t: (b, in_channels, *axes).
            c_noise: (b,), the noise level.
            mask: (b, n) bool along the last axis, the same along any others. What lies on padding is never read and comes
                out as zero: the valid part is, to rounding, what the network gives for it alone, without padding.
            cond: values by name; a declared condition that is missing counts as absent.
            present: by name, bool (b,); a condition that is missing here is present for the whole batch.
        Returns:
            (b, out_channels, *axes).
        Raises:
            ConfigError: an input of other channels than the network was built for, or an undeclared condition.
        """
        if x_t.shape[1] != self.in_channels:
            raise ConfigError(
                f"UNet: the input has {x_t.shape[1]} channels, this network was built for {self.in_channels}"
            )
        present = present or {}
        x, others = self.fields(x_t, cond or {}, present)
        modulations = iter(
            self.modulation(self.embedding(c_noise, others, present)).split(self.modulation_widths, dim=1)
        )
        padding: list[Padding | None] = [None] * (self.levels[-1] + 1)
        if mask is not None:
            padding = [*paddings(mask, self.axes, len(padding), x.dtype)]
            x = x.masked_fill(~mask.view(len(mask), *(1,) * self.axes, -1), 0)
        x = clear(self.first(x), padding[0])
        joined = []
        for level, block in zip(self.levels, self.down, strict=True):
            x = block(x, next(modulations), None, padding[level])
            joined.append(x)
        for block in self.middle:
            x = block(x, next(modulations), None, padding[-1])
        for level, block in zip(reversed(self.levels), self.up, strict=True):
            x = block(x, next(modulations), joined.pop(), padding[level])
        x = F.silu(self.norm(x, None if padding[0] is None else padding[0].mask))
        return clear(self.last(x), padding[0])


def clear(x: Tensor, padding: Padding | None) -> Tensor:
    """Put zero on padding."""
    return x if padding is None else x * padding.mask


def zero(layer: nn.Module) -> nn.Module:
    """Set weight and bias to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
